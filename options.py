"""The command line of the training scripts: the options and what does not go together.

A script takes `training_parser`, declares the options that it alone has, and calls `parse`.
"""

import argparse
import math
import os
from pathlib import Path

from accelerate.tracking import get_available_trackers

from checkpoint import default_folder, newest_folder, read_config
from data import SOURCES
from errors import UserError, need
from labels import RATIOS
from recipes import RECIPES

# What may differ between a run and its resumption without changing the result.
HARMLESS = {"resume", "out_dir", "num_workers", "save_interval", "log_interval", "log_with"}
HARMLESS |= {"cache_dir", "data_path"}


class Parser(argparse.ArgumentParser):
    """Mistakes become a UserError: one line and exit status 2, as everywhere."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # a default of None is told in the text
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def new_parser(description: str | None, **options) -> Parser:
    return Parser(description=description, formatter_class=Formatter, **options)


def number(kind, low, high, what):
    """A type for argparse: a number of `kind` between low and high, called `what` in messages."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return convert


positive = number(int, 1, 2**40, "a whole number above 0")
natural = number(int, 0, 2**40, "a whole number from 0 on")
positive_float = number(float, 1e-12, 1e12, "a number above 0")
non_negative = number(float, 0, 1e12, "a number from 0 on")
share = number(float, 0, 1, "a number from 0 to 1")


# ------------------------------------------------------------------------------------- options
def training_parser(description: str | None, script: str) -> Parser:
    """What both training scripts take. A default of None stands for the recipe's."""
    parser = new_parser(description, prog=script)
    add_data_options(parser.add_argument_group("data").add_argument)
    add_model_options(parser.add_argument_group("model").add_argument)
    add_reco_options(parser.add_argument_group("regional contrast (ReCo)").add_argument)
    add_optimisation_options(parser.add_argument_group("optimisation").add_argument)
    add_run_options(parser.add_argument_group("run").add_argument)
    return parser


def add_data_options(add) -> None:
    add(
        "--dataset",
        choices=list(SOURCES),
        default="street",
        help="street is drawn in memory; folder is your own data",
    )
    add("--data-path", metavar="DIR", help="where the data set lies, as downloaded and extracted")
    add(
        "--recipe",
        choices=list(RECIPES),
        help="take the defaults of this data set (street: small pictures, a small network from "
        "random weights; default: --dataset)",
    )
    add(
        "--num-labeled",
        type=natural,
        metavar="N",
        help="number of fully labelled images, 0 = every image (street: 20, others: 0)",
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
        help="of everything random: split, weights, order, augmentation, sampling",
    )
    add(
        "--crop-size",
        type=positive,
        nargs="+",
        metavar="N",
        help="training crop, one side or height and width (cityscapes 512, camvid 224, street 64, "
        "others 321)",
    )
    add(
        "--scale",
        type=positive_float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="random scale of training images (cityscapes 1 1, street 0.8 1.25, others 0.5 1.5)",
    )
    add(
        "--max-size",
        type=positive,
        default=1024,
        metavar="N",
        help="folder: larger pictures are brought down to this longer side",
    )
    add(
        "--num-workers",
        type=natural,
        help="processes that read images, for each loader (street: 0, others: the cores that this "
        "process has, at most 8)",
    )
    add(
        "--cache-dir",
        metavar="DIR",
        help="keep training-size copies of the images here, written once, reused",
    )


def add_model_options(add) -> None:
    add(
        "--model",
        choices=["reconet", "deeplabv3plus"],
        default="reconet",
        help="reconet = DeepLabV3+ with the representation head of ReCo",
    )
    add(
        "--backbone",
        metavar="NAME",
        help="any timm name that yields a feature pyramid, or a ViT (street: test_resnet, camvid: "
        "tf_efficientnet_lite0.in1k, others: resnet101.tv_in1k)",
    )
    add(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="start from timm's ImageNet weights (street: no, others: yes)",
    )
    add(
        "--backbone-weights",
        metavar="FILE",
        help="the backbone's first weights from a file, for machines without a way to the hub: "
        "safetensors, or a state dict of tensors alone",
    )
    add(
        "--output-stride",
        type=int,
        choices=[8, 16, 32],
        help="of the deepest features (street: 8, others: 16)",
    )
    add(
        "--decoder-stride",
        type=int,
        choices=[2, 4, 8],
        help="of the decoder and of the representation (street: 2, others: 4)",
    )
    add(
        "--channels",
        type=positive,
        help="width of the ASPP and the heads (street, camvid: 64, others: 256)",
    )
    add(
        "--low-channels",
        type=positive,
        help="width of the projected low-level features (street, camvid: 24, others: 48)",
    )
    add(
        "--rep-dim",
        type=positive,
        help="channels of the representation (street: 32, camvid: 64, others: 256)",
    )
    add(
        "--aspp-rates",
        type=positive,
        nargs=3,
        metavar="R",
        help="atrous rates (street: 1 2 3, others: 6 12 18)",
    )
    add(
        "--init-from",
        metavar="RUN",
        help="start from the weights of a finished run (of the same classes), by default at a "
        "tenth of the rate; they stay the run's model until others are better",
    )


def add_reco_options(add) -> None:
    add("--reco", action="store_true", help="add the regional contrast loss")
    add("--reco-weight", type=non_negative, default=1.0, help="its weight")
    add(
        "--reco-temp",
        type=positive_float,
        default=0.5,
        help="temperature of similarities and of the class-relation graph",
    )
    add("--reco-num-queries", type=positive, default=256, help="queries per class")
    add("--reco-num-negatives", type=positive, default=512, help="negative keys per query")
    add(
        "--reco-threshold",
        type=share,
        default=0.97,
        help="strong threshold: pixels predicted below it are hard queries; it also sets the "
        "weight of the unlabelled images",
    )
    add(
        "--reco-random-queries",
        action="store_true",
        help="ablation: any valid pixel is a query, not the hard ones alone",
    )
    add(
        "--reco-random-keys",
        action="store_true",
        help="ablation: negative keys from the other classes alike, not by the class-relation "
        "graph",
    )
    add(
        "--reco-sampling",
        choices=["stratified", "independent"],
        default="stratified",
        help="how queries and keys are drawn: same expectation, stratified has less variance; "
        "independent is the paper's plain sampling",
    )


def add_optimisation_options(add) -> None:
    add(
        "--iterations",
        type=positive,
        help="training steps (street: 3000, camvid: 2000, others: 40000)",
    )
    add(
        "--batch-size",
        type=positive,
        help="labelled images per step and process; train_semi.py takes as many unlabelled ones "
        "besides (cityscapes 2, camvid 4, sun 5, street and folder 8, pascal 10; "
        "train_supervised.py twice that)",
    )
    add(
        "--lr",
        type=positive_float,
        help="base learning rate, used as given (street: 0.2, camvid: 0.02, others: 0.0025; by "
        "default it follows the global batch in proportion)",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the student (through Accelerate's dynamo plugin) and the teacher",
    )


def add_run_options(add) -> None:
    add(
        "--out-dir",
        metavar="DIR",
        help="the run's folder (default runs/<dataset>-<method>-<labels>-seed<seed>, numbered "
        "when taken)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out-dir (default: the newest of the default name); options "
        "not given are the run's",
    )
    add("--val-interval", type=positive, help="steps between validations")
    add(
        "--save-interval",
        type=positive,
        help="steps between checkpoints (default: the validation interval)",
    )
    add("--log-interval", type=positive, default=25, help="steps between points in the curves")
    add(
        "--log-with",
        default="tensorboard",
        metavar="NAME",
        help="a tracker that Accelerate knows (the pictures go to TensorBoard alone), or none",
    )


def add_prediction_options(add) -> None:
    """What evaluate.py and predict.py take beside their own."""
    add("--flip", action="store_true", help="average with the mirrored image")
    add(
        "--scales",
        type=positive_float,
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


# ----------------------------------------------------------------------------- reading and checks
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
    check_values(args)
    check_meaning(args, given)
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
        if name not in HARMLESS
        and both_sides(saved.get(name), name) != both_sides(given[name], name)
    ]
    need(
        not differing,
        f"--resume {folder}: {', '.join(differing)} would change the result; leave it out, or "
        "start a new run",
    )
    harmless = {name: value for name, value in given.items() if name in HARMLESS}
    resumed = {**vars(args), **saved, **harmless, "out_dir": str(folder), "resume": True}
    return argparse.Namespace(**resumed)


def fill_from_recipe(args: argparse.Namespace) -> None:
    """Give every option that was left open the recipe's value."""
    begun = read_config(Path(args.init_from)) if args.init_from else None
    if begun and not args.recipe:
        args.recipe = begun["arguments"].get("recipe")
    recipe = dict(RECIPES[args.recipe or args.dataset])
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
        recipe["lr"] /= 10  # the full rate would undo what the weights know
    if args.backbone_weights:  # also where the recipe begins with random weights
        recipe["pretrained"] = True
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.save_interval = args.save_interval or args.val_interval
    args.crop_size = both_sides(args.crop_size, "crop_size")


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
        not args.label_ratio or "num_labeled" not in given,
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


def both_sides(value, name: str):
    """A --crop-size of one side stands for height and width; every other option stays."""
    if name == "crop_size" and isinstance(value, (list, tuple)) and len(value) == 1:
        return list(value) * 2
    return value


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


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
