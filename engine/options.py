"""The command line: the options of the scripts, and the arguments of a run that they make.

A training script takes `training_parser`, adds its own options and calls `parse`, which fills in
the recipe's defaults or, with --resume, the options of the run.
"""

import argparse
import math
import os
import re
from pathlib import Path

from accelerate.tracking import get_available_trackers

from engine.checkpoint import default_folder, newest_folder, read_config
from engine.processes import cores
from inputs.errors import UserError, need, note
from inputs.labels import RATIOS

Recipes = dict[str, dict]  # data set -> the defaults of the training options

# ViTs use AdamW; the backbone of a pretrained one learns at a fortieth of the rate. Published for
# DINOv2 backbones (UniMatch V2, Yang et al. 2024), not measured here.
ADAMW = dict(optimizer="adamw", lr=2e-4, weight_decay=0.01)
VIT_LR_SCALE = 1 / 40

# Options that may differ on --resume, since they do not change the result
HARMLESS = {"resume", "out_dir", "num_workers", "save_interval", "log_interval", "log_with"}
HARMLESS |= {"cache_dir", "data_path", "init_from"}
# The recipe entries that --paper sets to the paper's values
METHOD = ("balanced_sampling", "class_balance", "average_statistics")
NOT_GIVEN = object()
STEPS = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


class Parser(argparse.ArgumentParser):
    """Raises UserError (one line, exit status 2) where argparse would print the usage."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # the help text explains a default of None
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def new_parser(description: str | None, **options) -> Parser:
    return Parser(description=description, formatter_class=Formatter, **options)


def number(kind, low, high, what: str):
    """A type for argparse: `kind` (int or float) from low to high; messages call it `what`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return convert


positive = number(int, 1, 10**9, "an integer from 1 to 10^9")
natural = number(int, 0, 10**9, "an integer from 0 to 10^9")
size = number(int, 1, 2**16, "an integer from 1 to 65536")  # more would fill the memory
positive_float = number(float, 1e-12, 1e12, "a number above 0")
non_negative = number(float, 0, 1e12, "a number of 0 or more")
share = number(float, 0, 1, "a number from 0 to 1")


# ------------------------------------------------------------------------------------- options
def training_parser(description: str | None, script: str, recipes: Recipes) -> Parser:
    """The options of both training scripts. A default of None means the recipe's."""
    parser = new_parser(description, prog=script, usage="%(prog)s [options]")
    parser.set_defaults(script=script)
    by = describe_recipes(recipes)
    add_data_options(parser.add_argument_group("data").add_argument, list(recipes), by)
    add_model_options(parser.add_argument_group("model").add_argument, by)
    add_reco_options(parser.add_argument_group("regional contrast (ReCo)").add_argument)
    add_class_options(parser.add_argument_group("rare classes").add_argument, by)
    add_optimisation_options(parser.add_argument_group("optimisation").add_argument, by)
    add_run_options(parser.add_argument_group("run").add_argument, by)
    return parser


def describe_recipes(recipes: Recipes) -> dict[str, str]:
    """Each option's values in the recipes, for its help: "camvid: 2000, others: 40000"."""

    def text(value) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    described = {}
    for name in next(iter(recipes.values())):
        values = {dataset: text(recipe[name]) for dataset, recipe in recipes.items()}
        common = max(values.values(), key=list(values.values()).count)
        special = [f"{dataset}: {value}" for dataset, value in values.items() if value != common]
        described[name] = ", ".join([*special, f"others: {common}"]) if special else common
    return described


def add_data_options(add, datasets: list[str], by: dict[str, str]) -> None:
    add(
        "--dataset",
        choices=datasets,
        default="street",
        help="street is drawn in memory; folder is your own data",
    )
    add("--data-path", metavar="DIR", help="the data set, as downloaded and extracted")
    add(
        "--recipe",
        choices=datasets,
        help="use the defaults of this data set (street: small images and a small network from "
        "random weights; default: --dataset)",
    )
    add(
        "--paper",
        action="store_true",
        help="the paper's method on any data: without --balanced-sampling and --class-balance, and "
        "with the teacher's own batch-norm statistics (cityscapes, pascal, sun have it anyway)",
    )
    add(
        "--num-labeled",
        type=natural,
        metavar="N",
        help=f"number of fully labelled images, 0 = every image ({by['num_labeled']})",
    )
    add(
        "--label-ratio",
        choices=list(RATIOS),
        help="partial labels: every image keeps 1 pixel, 1 %%, 5 %%, 25 %% of each class's pixels",
    )
    add("--labeled-list", metavar="FILE", help="a published split: one image per line")
    add(
        "--seed",
        type=natural,
        default=0,
        help="seed of split, weights, order, augmentation and sampling",
    )
    add(
        "--crop-size",
        type=size,
        nargs="+",
        metavar="N",
        help=f"training crop, one side or height and width ({by['crop_size']}; ViTs: the nearest "
        "multiple of the patch)",
    )
    add(
        "--scale",
        type=positive_float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help=f"random scale of training images ({by['scale']})",
    )
    add(
        "--max-size",
        type=size,
        metavar="N",
        help=f"folder: larger images are scaled down to this longer side ({by['max_size']})",
    )
    add(
        "--num-workers",
        type=natural,
        help="processes that read images, per loader (street: 0, others: one per core, shared by "
        "the loaders, at most 8)",
    )
    add("--cache-dir", metavar="DIR", help="keep training-size copies of the images here")


def add_model_options(add, by: dict[str, str]) -> None:
    add(
        "--model",
        choices=["reconet", "deeplabv3plus"],
        default="reconet",
        help="reconet = DeepLabV3+ with the representation head of ReCo",
    )
    add(
        "--backbone",
        metavar="NAME",
        help=f"any timm model with a feature pyramid, or a ViT ({by['backbone']})",
    )
    add(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"start from timm's ImageNet weights ({by['pretrained']})",
    )
    add(
        "--backbone-weights",
        metavar="FILE",
        help="read the pretrained weights from a file (without internet): safetensors, or a state "
        "dict or checkpoint of torch.save (tensors and plain values only)",
    )
    add(
        "--decoder-stride",
        type=int,
        choices=[2, 4, 8],
        help=f"stride of the decoder and the representation ({by['decoder_stride']})",
    )
    add("--channels", type=size, help=f"width of the ASPP and the heads ({by['channels']})")
    add(
        "--init-from",
        metavar="RUN",
        help="start from the weights of a run with the same classes, by default at a tenth of the "
        "learning rate; model.safetensors keeps them until better ones are found",
    )


def add_reco_options(add) -> None:
    add("--reco", action="store_true", help="add the regional contrast loss")
    add("--reco-weight", type=non_negative, default=1.0, help="its weight")
    add(
        "--reco-temp",
        type=positive_float,
        default=0.5,
        help="temperature of the similarities and of the class-relation graph",
    )
    add("--reco-num-queries", type=size, default=256, help="queries per class")
    add("--reco-num-negatives", type=size, default=512, help="negative keys per query")
    add(
        "--reco-threshold",
        type=share,
        default=0.97,
        help="strong threshold: pixels predicted below it are hard queries; train_semi.py also "
        "weights unlabelled images by it",
    )
    add(
        "--reco-random-queries",
        action="store_true",
        help="ablation: any valid pixel can be a query, not only hard ones",
    )
    add(
        "--reco-random-keys",
        action="store_true",
        help="ablation: negative keys from all other classes equally, not by the class relations",
    )


def add_class_options(add, by: dict[str, str]) -> None:
    add(
        "--balanced-sampling",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw labelled images and crops so that every class is shown equally often "
        f"({by['balanced_sampling']})",
    )
    add(
        "--class-balance",
        type=share,
        metavar="X",
        help="weight of a class in the cross-entropy: 0 = by its pixels, 1 = all the same, between "
        f"them (its share of the pixels)^-X ({by['class_balance']})",
    )


def add_optimisation_options(add, by: dict[str, str]) -> None:
    add("--iterations", type=positive, help=f"training steps ({by['iterations']})")
    add(
        "--batch-size",
        type=size,
        help="images per step and process; in train_semi.py unlabelled ones, plus as many labelled "
        f"ones ({by['batch_size']})",
    )
    add(
        "--gradient-accumulation-steps",
        type=size,
        metavar="K",
        help="micro-batches per optimiser step: K times the batch in the same memory (default: "
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS, or 1)",
    )
    add(
        "--lr",
        type=positive_float,
        help=f"base learning rate, used as given ({by['lr']}, adamw: {ADAMW['lr']}; the default is "
        "proportional to the global batch)",
    )
    add(
        "--optimizer",
        choices=["sgd", "adamw"],
        help="SGD with Nesterov momentum 0.9, or AdamW with betas 0.9, 0.999 (ViTs: adamw, others: "
        "sgd)",
    )
    add("--weight-decay", type=non_negative, help="for all weights (sgd: 0.0005, adamw: 0.01)")
    add(
        "--backbone-lr-scale",
        type=non_negative,
        metavar="X",
        help="the backbone's learning rate is X times --lr; 0 freezes it (pretrained ViTs: 0.025, "
        "others: 1)",
    )
    add("--compile", action="store_true", help="torch.compile the student and the teacher")


def add_run_options(add, by: dict[str, str]) -> None:
    add(
        "--out-dir",
        metavar="DIR",
        help="the run folder (default runs/<dataset>-<method>-<labels>-seed<seed>, numbered if "
        "taken)",
    )
    add(
        "--resume",
        action="store_true",
        help="resume the run in --out-dir (default: the newest run of the default name) with its "
        "own options",
    )
    add("--val-interval", type=positive, help=f"steps between validations ({by['val_interval']})")
    add("--save-interval", type=positive, help="steps between checkpoints (as --val-interval)")
    add("--log-interval", type=positive, default=25, help="steps between points of the curves")
    add(
        "--log-with",
        default="tensorboard",
        metavar="NAME",
        help="a tracker that Accelerate supports (only TensorBoard gets images), or none",
    )


def add_prediction_options(add) -> None:
    """Options that evaluate.py and predict.py share."""
    add("--flip", action="store_true", help="average with the mirrored image")
    add(
        "--scales",
        type=number(float, 0.01, 10, "a number from 0.01 to 10"),
        nargs="+",
        default=[1.0],
        metavar="S",
        help="average over these scales",
    )
    add(
        "--sliding-window",
        action="store_true",
        help="average over tiles of the training crop's size that overlap by a third",
    )


# ----------------------------------------------------------------- from options to arguments
def parse(parser: Parser, recipes: Recipes, argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with the recipe's defaults filled in; with --resume those of the run. UserError
    for options that exclude each other and for values that cannot work."""
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, NOT_GIVEN))))
    given = {name: value for name, value in given.items() if value is not NOT_GIVEN}
    for name, value in given.items():
        need(value != "", f"{flag(name)}: the value is empty")
    args = argparse.Namespace(**{**defaults, **given})
    trackers = ["none", *map(str, get_available_trackers())]
    need(
        args.log_with in trackers,
        f"--log-with {args.log_with}: no such tracker, or not installed; available: "
        f"{', '.join(trackers)}",
    )
    args.method = getattr(args, "mixing_strategy", "supervised") + ("-reco" if args.reco else "")
    if args.resume:
        if args.num_labeled is None:
            args.num_labeled = recipes[args.dataset]["num_labeled"]
        return resumed_options(args, given)
    fill_from_recipe(args, recipes)
    check_combinations(args, given)
    check_values(args)
    return args


def resumed_options(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The options of the run to resume; UserError if a given one differs."""
    folder = Path(args.out_dir) if args.out_dir else newest_folder(default_folder(args))
    saved = read_config(folder)["arguments"]
    need(
        saved["script"] == args.script,
        f"--resume: {folder} is a run of {saved['script']}, not of {args.script}",
    )
    differing = [
        f"{flag(name)} {value} (the run: {saved.get(name)})"
        for name, value in given.items()
        if name not in HARMLESS and both_sides(saved.get(name)) != both_sides(value)
    ]
    need(
        not differing,
        f"--resume {folder}: {', '.join(differing)} would change the result; leave it out, or "
        f"start a new run with --init-from {folder}",
    )
    harmless = {name: value for name, value in given.items() if name in HARMLESS}
    resumed = {**vars(args), **saved, **harmless, "out_dir": str(folder), "resume": True}
    if resumed.get("labeled_list") and (folder / "labeled.txt").exists():
        resumed["labeled_list"] = str(folder / "labeled.txt")  # the user's list may have moved
    return argparse.Namespace(**resumed)


def fill_from_recipe(args: argparse.Namespace, recipes: Recipes) -> None:
    """Set the options that were not given to the recipe's values."""
    start = read_config(Path(args.init_from)) if args.init_from else None
    seen = {}  # --init-from: the sizes at which the run saw its images
    if start and not args.recipe:
        before = start["arguments"]
        args.recipe = before.get("recipe")
        seen = {k: before[k] for k in ("crop_size", "scale", "max_size") if k in before}
    recipe = recipes[args.recipe or args.dataset] | seen
    recipe["num_labeled"] = recipes[args.dataset]["num_labeled"]
    if args.paper:
        recipe |= {name: recipes["cityscapes"][name] for name in METHOD}
    if args.label_ratio or args.labeled_list:
        recipe["num_labeled"] = 0
    if recipe["num_workers"] is None:  # shared by the processes of a node and by the loaders
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        loaders = 2 if args.script == "train_semi.py" else 1
        recipe["num_workers"] = max(1, min(8, cores() // processes // loaders))
    if start:  # the network is the run's
        recipe |= {k: v for k, v in start["model"].items() if k in recipe and v is not None}
    if args.backbone_weights:  # also where the recipe starts from random weights
        recipe["pretrained"] = True
    fit_vit(args, recipe)
    if start:
        recipe["lr"] /= 10  # the full rate would undo what the weights have learned
    lr_given = args.lr is not None
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.gradient_accumulation_steps is None:
        steps = os.environ.get(STEPS, "1")
        need(steps.isdecimal() and int(steps) > 0, f"{STEPS}={steps}: must be an integer above 0")
        args.gradient_accumulation_steps = int(steps)
    if not lr_given:
        scale_learning_rate(args, recipe["batch_size"])
    args.save_interval = args.save_interval or args.val_interval
    args.crop_size = both_sides(args.crop_size)


def fit_vit(args: argparse.Namespace, recipe: dict) -> None:
    """Change the recipe for a ViT: AdamW, its rates, and a crop of whole patches. timm's names of
    ViTs contain the patch size."""
    patch = re.search(r"patch(\d+)", args.backbone or recipe["backbone"])
    patch = int(patch[1]) if patch else 0
    if args.optimizer == "adamw" or (patch and not args.optimizer):
        recipe |= ADAMW
    if patch:
        crop = [max(1, round(side / patch)) * patch for side in recipe["crop_size"]]
        pretrained = recipe["pretrained"] if args.pretrained is None else args.pretrained
        scale = VIT_LR_SCALE if pretrained or args.init_from else 1.0
        recipe |= dict(crop_size=crop, backbone_lr_scale=scale)


def scale_learning_rate(args: argparse.Namespace, recipe_batch: int) -> None:
    """Scale the recipe's learning rate by the images of an optimiser step, and print a note."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = args.batch_size * processes * args.gradient_accumulation_steps
    if batch != recipe_batch:
        before, args.lr = args.lr, args.lr * batch / recipe_batch
        note(
            f"learning rate {args.lr:g} = {before:g} x {batch}/{recipe_batch}, in proportion to "
            "the global batch; --lr overrides it"
        )


def check_values(args: argparse.Namespace) -> None:
    """UserError for values that cannot work."""
    need(
        len(args.crop_size) <= 2 and min(args.crop_size) >= 32,
        f"--crop-size {' '.join(map(str, args.crop_size))}: one side or height and width, 32 or "
        "more",
    )
    low, high = args.scale
    need(low <= high, f"--scale {low} {high}: MIN must not exceed MAX")
    for name in ("batch_size", "labeled_batch_size"):
        value = getattr(args, name, None)
        need(
            value is None or value >= 2,
            f"{flag(name)} {value}: batch norm and mixing require at least two images",
        )
    warmup = getattr(args, "warmup_iterations", 0)
    need(
        warmup < args.iterations,
        f"--warmup-iterations {warmup}: with only {args.iterations} iterations, no unlabelled "
        "image would be used",
    )


def check_combinations(args: argparse.Namespace, given: dict) -> None:
    """UserError for options that exclude each other; a note for options without effect."""
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
        "--labeled-list excludes --num-labeled and --label-ratio: the list names the labelled "
        "images",
    )
    need(
        not (args.backbone_weights and given.get("pretrained") is False),
        "--backbone-weights and --no-pretrained exclude each other",
    )
    needed = {name: "--reco" for name in given if name.startswith("reco_") and not args.reco}
    if not args.reco:
        needed["weak_threshold"] = "--reco"
        if args.script == "train_semi.py":  # the strong threshold also weights unlabelled images
            needed.pop("reco_threshold", None)
    if args.init_from:
        needed["pretrained"] = needed["backbone_weights"] = "a new network (no --init-from)"
    if args.dataset == "street":
        needed["cache_dir"] = "a data set on disk"
    if args.dataset != "folder":
        needed["max_size"] = "--dataset folder"
    for name in given.keys() & needed.keys():
        note(f"{flag(name)} has no effect without {needed[name]}")


def flag(name: str) -> str:
    """weight_decay -> --weight-decay"""
    return "--" + name.replace("_", "-")


def both_sides(value):
    """[N], which --crop-size allows, becomes [N, N]; other values stay."""
    return list(value) * 2 if isinstance(value, (list, tuple)) and len(value) == 1 else value


def reco_options(args: argparse.Namespace) -> dict:
    """The keyword arguments of `reco.reco_loss`."""
    return dict(
        temperature=args.reco_temp,
        num_queries=args.reco_num_queries,
        num_negatives=args.reco_num_negatives,
        strong_threshold=args.reco_threshold,
        active_queries=not args.reco_random_queries,
        active_keys=not args.reco_random_keys,
        return_stats=True,
    )
