"""From the command line to the arguments of a run: the recipe's defaults, those of a run that is
resumed, and what does not go together."""

import argparse
import os
from pathlib import Path

from accelerate.tracking import get_available_trackers

from backbones import vit_patch
from checkpoint import default_folder, newest_folder, read_config
from errors import UserError, need, note
from options import Parser
from processes import cores
from recipes import ADAMW, PAPER, RECIPES, VIT_LR_SCALE

# What may differ between a run and its resumption without changing the result.
HARMLESS = {"resume", "out_dir", "num_workers", "save_interval", "log_interval", "log_with"}
HARMLESS |= {"cache_dir", "data_path", "init_from"}


def parse(parser: Parser, argv=None) -> argparse.Namespace:
    """The options with the recipe's defaults filled in; for --resume those of the run.

    A script with unlabelled images declares --mixing-strategy: by that it is known here. Raises
    UserError for what has no meaning."""
    args = parser.parse_args(argv)
    given = given_options(parser, argv)
    trackers = ["none", *map(str, get_available_trackers())]
    need(
        args.log_with in trackers,
        f"--log-with {args.log_with}: no such tracker, or not installed; there are "
        f"{', '.join(trackers)}",
    )
    args.script, args.lr_given = parser.prog, args.lr is not None
    args.method = getattr(args, "mixing_strategy", "supervised") + ("-reco" if args.reco else "")
    if args.resume:
        return resumed_options(args, given)
    fill_from_recipe(args)
    check_meaning(args, given)
    check_values(args)
    return args


def given_options(parser: Parser, argv=None) -> dict:
    """The options that stand on the command line: name -> value."""
    defaults = {action: action.default for action in parser._actions}
    for action in defaults:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    for action, default in defaults.items():
        action.default = default
    return given


def resumed_options(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The options of the run that --resume goes on with; UserError where one given differs."""
    if args.num_labeled is None:
        args.num_labeled = RECIPES[args.dataset]["num_labeled"]
    folder = Path(args.out_dir) if args.out_dir else newest_folder(default_folder(args))
    saved = read_config(folder)["arguments"]
    need(
        saved["script"] == args.script,
        f"--resume: {folder} is a run of {saved['script']}, not of {args.script}",
    )
    differing = [
        f"--{name.replace('_', '-')} {given[name]} (the run: {saved.get(name)})"
        for name in given
        if name not in HARMLESS and both_sides(saved.get(name)) != both_sides(given[name])
    ]
    need(
        not differing,
        f"--resume {folder}: {', '.join(differing)} would change the result; leave it out, or "
        f"begin a new run with --init-from {folder}",
    )
    harmless = {name: value for name, value in given.items() if name in HARMLESS}
    older = {name: PAPER[name] for name in ("optimizer", "weight_decay", "backbone_lr_scale")}
    resumed = {**vars(args), **older, **saved, **harmless, "out_dir": str(folder), "resume": True}
    if resumed.get("labeled_list") and (folder / "labeled.txt").exists():
        resumed["labeled_list"] = str(folder / "labeled.txt")  # the list itself may have moved
    return argparse.Namespace(**resumed)


def fill_from_recipe(args: argparse.Namespace) -> None:
    """Give every option that was left open the recipe's value."""
    begun = read_config(Path(args.init_from)) if args.init_from else None
    seen = {}  # how the run saw its pictures
    if begun and not args.recipe:
        before = begun["arguments"]
        args.recipe = before.get("recipe")
        seen = {k: before[k] for k in ("crop_size", "scale", "max_size") if k in before}
    recipe = RECIPES[args.recipe or args.dataset] | seen
    recipe["num_labeled"] = RECIPES[args.dataset]["num_labeled"]
    if args.label_ratio or args.labeled_list:
        recipe["num_labeled"] = 0
    semi = hasattr(args, "mixing_strategy")
    if not semi:
        recipe["batch_size"] *= 2
        del recipe["warmup_iterations"]
    args.recipe_batch = recipe["batch_size"]
    if recipe["num_workers"] is None:  # shared by the processes of a node and by two loaders
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        recipe["num_workers"] = max(1, min(8, cores() // processes // (2 if semi else 1)))
    if begun:  # the network is that of the run
        recipe |= {k: v for k, v in begun["model"].items() if k in recipe and v is not None}
    if args.backbone_weights:  # also where the recipe begins with random weights
        recipe["pretrained"] = True
    fit_backbone(args, recipe)
    if begun:
        recipe["lr"] /= 10  # the full rate would undo what the weights know
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.save_interval = args.save_interval or args.val_interval
    args.crop_size = both_sides(args.crop_size)


def fit_backbone(args: argparse.Namespace, recipe: dict) -> None:
    """The recipe's optimiser, rates, crop and output stride for the backbone: a ViT of one stride
    takes AdamW, and crops that its patches tile; what cannot be dilated keeps its stride of 32."""
    backbone, patch = args.backbone or recipe["backbone"], 0
    if backbone not in {known["backbone"] for known in RECIPES.values()}:
        strides = [getattr(args, n) or recipe[n] for n in ("output_stride", "decoder_stride")]
        try:
            patch = vit_patch(backbone, *strides)
        except UserError:
            if args.output_stride or strides[0] == 32:
                raise
            patch = vit_patch(backbone, 32, strides[1])
            note(f"--backbone {backbone} cannot be dilated: --output-stride 32, not {strides[0]}")
            recipe["output_stride"] = 32
    if args.optimizer == "adamw" or (patch and not args.optimizer):
        recipe |= ADAMW
    if patch:
        need(
            args.output_stride is None,
            f"--output-stride has no meaning with {backbone}: the stride of a ViT is its patch",
        )
        crop = [max(1, round(side / patch)) * patch for side in recipe["crop_size"]]
        pretrained = recipe["pretrained"] if args.pretrained is None else args.pretrained
        scale = VIT_LR_SCALE if pretrained or args.init_from else 1.0
        recipe |= dict(crop_size=crop, backbone_lr_scale=scale)


def check_values(args: argparse.Namespace) -> None:
    """Values that a run cannot work with."""
    need(
        len(args.crop_size) <= 2 and min(args.crop_size) >= 16,
        f"--crop-size {' '.join(map(str, args.crop_size))}: one side or height and width, 16 or "
        "more",
    )
    need(
        args.scale[0] <= args.scale[1],
        f"--scale {args.scale[0]} {args.scale[1]}: the smaller one stands first",
    )
    need(
        args.batch_size >= 2,
        f"--batch-size {args.batch_size}: batch norm needs two images or more, and mixing a "
        "neighbour",
    )
    labelled = getattr(args, "labeled_batch_size", None)
    need(
        labelled is None or labelled >= 2,
        f"--labeled-batch-size {labelled}: batch norm needs two images or more",
    )
    warmup = getattr(args, "warmup_iterations", 0)
    need(
        warmup < args.iterations,
        f"--warmup-iterations {warmup}: the run has only {args.iterations} iterations, so no "
        "unlabelled image would be used",
    )


def check_meaning(args: argparse.Namespace, given: dict) -> None:
    """Options that exclude each other, or that nothing would listen to."""
    need(
        not args.reco or args.model == "reconet",
        "--reco needs the representation head: use --model reconet (deeplabv3plus has none)",
    )
    need(
        not (args.label_ratio and given.get("num_labeled")),
        "--label-ratio and --num-labeled exclude each other: partial labels are on every image",
    )
    need(
        not args.labeled_list or not ("num_labeled" in given or args.label_ratio),
        "--labeled-list excludes --num-labeled and --label-ratio: the list says which images are "
        "labelled",
    )
    weights = "a network that begins here (--init-from brings its weights)"
    conditions = {
        "rep_dim": (args.model == "reconet", "--model reconet"),
        "weak_threshold": (args.reco, "--reco"),
        "cache_dir": (args.dataset != "street", "a data set on disk"),
        "max_size": (args.dataset == "folder", "--dataset folder; the others have a fixed size"),
        "pretrained": (not args.init_from, weights),
        "backbone_weights": (not args.init_from, weights),
    }
    for name in given:
        # the strong threshold weights the unlabelled images, with ReCo or without
        threshold = name == "reco_threshold" and hasattr(args, "mixing_strategy")
        if name.startswith("reco_") and not threshold:
            conditions[name] = (args.reco, "--reco")
    for name, (fulfilled, condition) in conditions.items():
        option = f"--{name.replace('_', '-')}"
        need(name not in given or fulfilled, f"{option} has no meaning without {condition}")
    need(
        not (args.backbone_weights and given.get("pretrained") is False),
        "--backbone-weights and --no-pretrained exclude each other",
    )


def both_sides(value):
    """One side, as --crop-size may have it, stands for height and width; all else stays."""
    return list(value) * 2 if isinstance(value, (list, tuple)) and len(value) == 1 else value


def reco_settings(args: argparse.Namespace) -> dict:
    """The keyword arguments of `reco.reco_loss` that the options stand for."""
    return dict(
        temperature=args.reco_temp,
        num_queries=args.reco_num_queries,
        num_negatives=args.reco_num_negatives,
        # no probability reaches 2, so every pixel is a hard one
        strong_threshold=2.0 if args.reco_random_queries else args.reco_threshold,
        sampling=args.reco_sampling,
        active_keys=not args.reco_random_keys,
        return_stats=True,
    )
