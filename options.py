"""The options of the scripts; --help prints what stands here.

A training script takes `training_parser`, declares the options that it alone has, and hands the
parser to `arguments.parse`.
"""

import argparse
import math

from data import SOURCES
from errors import UserError
from labels import RATIOS
from recipes import ADAMW, PAPER, RECIPES


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


def by_recipe(name: str) -> str:
    """What the recipes say of an option, for its help: "camvid: 2000, others: 40000"."""

    def text(value) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    others = text(PAPER[name])
    special = {dataset: text(recipe[name]) for dataset, recipe in RECIPES.items()}
    words = [f"{dataset}: {value}" for dataset, value in special.items() if value != others]
    return ", ".join([*words, f"others: {others}"])


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
        help=f"number of fully labelled images, 0 = every image ({by_recipe('num_labeled')})",
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
        help=f"training crop, one side or height and width ({by_recipe('crop_size')}; with a ViT "
        "the nearest multiple of its patch)",
    )
    add(
        "--scale",
        type=positive_float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help=f"random scale of training images ({by_recipe('scale')})",
    )
    add(
        "--max-size",
        type=positive,
        metavar="N",
        help=f"folder: larger pictures are brought down to this longer side ({PAPER['max_size']})",
    )
    add(
        "--num-workers",
        type=natural,
        help="processes that read images, for each loader (street: 0, others: the cores that this "
        "process has, half of them in train_semi.py with its two loaders; at most 8)",
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
        help=f"any timm name that yields a feature pyramid, or a ViT ({by_recipe('backbone')})",
    )
    add(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"start from timm's ImageNet weights ({by_recipe('pretrained')})",
    )
    add(
        "--backbone-weights",
        metavar="FILE",
        help="the backbone's first weights from a file, for machines without a way to the hub: "
        "safetensors, or what torch.save wrote: a state dict, or a checkpoint with one (no other "
        "objects in it)",
    )
    add(
        "--output-stride",
        type=int,
        choices=[8, 16, 32],
        help=f"of the deepest features ({by_recipe('output_stride')}; a backbone that cannot be "
        "dilated: 32)",
    )
    add(
        "--decoder-stride",
        type=int,
        choices=[2, 4, 8],
        help=f"of the decoder and of the representation ({by_recipe('decoder_stride')})",
    )
    add(
        "--channels",
        type=positive,
        help=f"width of the ASPP and the heads ({by_recipe('channels')})",
    )
    add(
        "--low-channels",
        type=positive,
        help=f"width of the projected low-level features ({by_recipe('low_channels')})",
    )
    add(
        "--rep-dim",
        type=positive,
        help=f"channels of the representation ({by_recipe('rep_dim')})",
    )
    add(
        "--aspp-rates",
        type=positive,
        nargs=3,
        metavar="R",
        help=f"atrous rates ({by_recipe('aspp_rates')})",
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
        help=f"training steps ({by_recipe('iterations')})",
    )
    add(
        "--batch-size",
        type=positive,
        help="images per step and process; in train_semi.py unlabelled ones, and as many labelled "
        "ones besides (partial labels: twice as many; --labeled-batch-size) "
        f"({by_recipe('batch_size')}; train_supervised.py twice that)",
    )
    add(
        "--lr",
        type=positive_float,
        help=f"base learning rate, used as given ({by_recipe('lr')}, adamw: {ADAMW['lr']}; by "
        "default it follows the global batch in proportion)",
    )
    add(
        "--optimizer",
        choices=["sgd", "adamw"],
        help="sgd with Nesterov momentum 0.9, or adamw with betas 0.9, 0.999 (ViTs: adamw, others: "
        "sgd)",
    )
    add("--weight-decay", type=non_negative, help="of all weights (sgd: 0.0005, adamw: 0.01)")
    add(
        "--backbone-lr-scale",
        type=non_negative,
        metavar="X",
        help="the backbone's learning rate is this times --lr; 0 freezes it (pretrained ViTs: "
        "0.025, others: 1)",
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
    add(
        "--val-interval",
        type=positive,
        help=f"steps between validations ({by_recipe('val_interval')})",
    )
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
