"""What every run needs and no experiment is about: options, the run's folder, checkpoint and resume, logging."""

import argparse
import io
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from tqdm import tqdm

import data
import evaluate
import loaders
import models
import processes
from data import UserError, need
from mixing import STRATEGIES

# Defaults by data set. lr is for `batch_size` images per step (the labelled ones; train_semi.py adds as many unlabelled,
# train_supervised.py doubles them at the same rate, as in the paper).
PAPER = dict(
    backbone="resnet101.tv_in1k",
    pretrained=True,
    output_stride=16,
    decoder_stride=4,
    channels=256,
    low_channels=48,
    rep_dim=256,
    aspp_rates=[6, 12, 18],
    crop_size=[321],
    scale=[0.5, 1.5],
    batch_size=10,
    lr=2.5e-3,
    iterations=40_000,
    val_interval=500,
    warmup_iterations=0,
    num_labeled=0,
    num_workers=None,
)
RECIPES = {
    "cityscapes": PAPER | dict(crop_size=[512], scale=[1.0, 1.0], batch_size=2),
    "pascal": PAPER,
    "sun": PAPER | dict(batch_size=5),
    "folder": PAPER | dict(batch_size=8),
    # no pretrained weights, 64x64 images: a small network of output stride 8 with a decoder at stride 2, and a higher rate
    "street": PAPER
    | dict(
        backbone="test_resnet",
        pretrained=False,
        output_stride=8,
        decoder_stride=2,
        channels=64,
        low_channels=24,
        rep_dim=32,
        aspp_rates=[1, 2, 3],
        crop_size=[64],
        scale=[0.8, 1.25],
        batch_size=8,
        lr=0.2,
        iterations=3000,
        val_interval=500,
        warmup_iterations=0,
        num_labeled=20,
        num_workers=0,
    ),
}
# What may differ between a run and its resumption without changing the result.
HARMLESS = {
    "resume",
    "out_dir",
    "num_workers",
    "save_interval",
    "log_interval",
    "log_with",
    "cache_dir",
    "data_path",
}


# ------------------------------------------------------------------------------------------------------------- options
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the options)")


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # a default of None is told in the text
        return (
            action.help
            if action.default is None or action.default is False
            else super()._get_help_string(action)
        )


def number(kind, low, high, what):
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


def training_parser(description: str, semi: bool) -> Parser:
    """The options of both training scripts. A default of None stands for the data set's own (RECIPES)."""
    parser = Parser(description=description, formatter_class=Formatter)
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        choices=list(data.SOURCES),
        default="street",
        help="street is drawn in memory; folder is your own data",
    )
    add("--data-path", metavar="DIR", help="where the data set lies, as downloaded and extracted")
    add(
        "--recipe",
        choices=list(RECIPES),
        help="take the defaults of this data set (street: small pictures, a small network from random weights; default: --dataset)",
    )
    add(
        "--num-labeled",
        type=natural,
        metavar="N",
        help="number of fully labelled images, 0 = every image (street: 20, others: 0)",
    )
    add(
        "--label-ratio",
        choices=list(data.RATIOS),
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
        help="training crop, one side or height and width (cityscapes 512, street 64, others 321)",
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
        help="processes that read images, for each loader (street: 0, others: the cores that this process has, at most 8)",
    )
    add(
        "--cache-dir",
        metavar="DIR",
        help="keep training-size copies of the images here, written once, reused",
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        choices=["reconet", "deeplabv3plus"],
        default="reconet",
        help="reconet = DeepLabV3+ with the representation head of ReCo",
    )
    add(
        "--backbone",
        metavar="NAME",
        help="any timm name that yields a feature pyramid, or a ViT (street: test_resnet, others: resnet101.tv_in1k)",
    )
    add(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="start from timm's ImageNet weights (street: no, others: yes)",
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
        help="width of the ASPP and the heads (street: 64, others: 256)",
    )
    add(
        "--low-channels",
        type=positive,
        help="width of the projected low-level features (street: 24, others: 48)",
    )
    add("--rep-dim", type=positive, help="channels of the representation (street: 32, others: 256)")
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
        help="start from the weights of a finished run (of the same classes), by default at a tenth of the rate; they stay the run's model until others are better",
    )
    add = parser.add_argument_group("regional contrast (ReCo)").add_argument
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
        help="strong threshold: pixels predicted below it are hard queries; it also sets the weight "
        "of the unlabelled images",
    )
    add(
        "--reco-random-queries",
        action="store_true",
        help="ablation: any valid pixel is a query, not the hard ones alone",
    )
    add(
        "--reco-random-keys",
        action="store_true",
        help="ablation: negative keys from the other classes alike, not by the class-relation graph",
    )
    add(
        "--reco-sampling",
        choices=["stratified", "independent"],
        default="stratified",
        help="how queries and keys are drawn: same expectation, stratified has less variance; independent is the paper's plain sampling",
    )
    if semi:
        add = parser.add_argument_group("mean teacher and mixing").add_argument
        add(
            "--mixing-strategy",
            choices=STRATEGIES,
            default="classmix",
            help="how unlabelled images are mixed",
        )
        add(
            "--weak-threshold",
            type=share,
            default=0.7,
            help="pseudo-labels of at least this confidence join ReCo",
        )
        add(
            "--joint-forward",
            action="store_true",
            help="labelled and unlabelled images pass the student together: fewer kernels, common batch-norm statistics, lower mIoU where it was measured",
        )
        add(
            "--warmup-iterations",
            type=natural,
            help="supervised steps before the unlabelled images join (0; needed where a teacher from random weights never starts)",
        )
    add = parser.add_argument_group("optimisation").add_argument
    add("--iterations", type=positive, help="training steps (street: 3000, others: 40000)")
    add(
        "--batch-size",
        type=positive,
        help="images per step and process"
        + (": so many labelled and as many unlabelled" if semi else "")
        + (
            " (cityscapes 2, sun 5, street and folder 8, pascal 10"
            + (")" if semi else "; without unlabelled images twice that)")
        ),
    )
    add(
        "--lr",
        type=positive_float,
        help="base learning rate, used as given (street: 0.2, others: 0.0025; by default it follows the global batch in proportion)",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the student (through Accelerate's dynamo plugin) and the teacher",
    )
    add = parser.add_argument_group("run").add_argument
    add(
        "--out-dir",
        metavar="DIR",
        help="the run's folder (default runs/<dataset>-<method>-<labels>-seed<seed>, numbered when taken)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out-dir (default: the newest of the default name); options not given are the run's",
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
    return parser


def parse(parser: Parser, semi: bool, argv=None) -> argparse.Namespace:
    """Options with the data set's defaults filled in; for --resume those of the run. Raises UserError for what has no meaning."""
    args = parser.parse_args(argv)
    for action in parser._actions:  # once more, to learn which options were given
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    trackers = ["none", *map(str, get_available_trackers())]
    need(
        args.log_with in trackers,
        f"--log-with {args.log_with}: no such tracker, or not installed; there are {', '.join(trackers)}",
    )
    args.method = (args.mixing_strategy if semi else "supervised") + ("-reco" if args.reco else "")
    if args.resume:
        folder = Path(args.out_dir) if args.out_dir else newest(default_folder(args))
        saved = read_config(folder)["arguments"]
        need(
            saved["script"] == parser.prog,
            f"--resume: {folder} is a run of {saved['script']}, not of {parser.prog}",
        )
        differing = [
            f"--{k.replace('_', '-')} {given[k]} (the run: {saved.get(k)})"
            for k in given
            if k not in HARMLESS and normal(saved.get(k), k) != normal(given[k], k)
        ]
        need(
            not differing,
            f"--resume {folder}: {', '.join(differing)} would change the result; leave it out, or start a new run",
        )
        args = argparse.Namespace(
            **{
                **vars(args),
                **saved,
                **{k: v for k, v in given.items() if k in HARMLESS},
                "out_dir": str(folder),
                "resume": True,
            }
        )
        return args

    args.script, args.lr_given = parser.prog, args.lr is not None
    begun = read_config(Path(args.init_from)) if args.init_from else None
    args.recipe = args.recipe or (begun and begun["arguments"].get("recipe"))
    recipe = RECIPES[args.recipe or args.dataset] | {
        "num_labeled": RECIPES[args.dataset]["num_labeled"]
    }
    if not semi:
        recipe["batch_size"] *= 2
        del recipe["warmup_iterations"]
    args.recipe_batch = recipe["batch_size"]
    if args.label_ratio or args.labeled_list:
        recipe["num_labeled"] = 0
    if recipe["num_workers"] is None:
        recipe["num_workers"] = max(
            1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // (2 if semi else 1))
        )
    if begun:  # the network is that of the run
        recipe |= {k: v for k, v in begun["model"].items() if k in recipe and v is not None}
        recipe["lr"] /= 10  # the full rate would undo what the weights know
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.save_interval = args.save_interval or args.val_interval
    args.crop_size = normal(args.crop_size, "crop_size")

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
        "--labeled-list excludes --num-labeled and --label-ratio: the list says which images are labelled",
    )
    need(
        len(args.crop_size) <= 2 and min(args.crop_size) >= 16,
        f"--crop-size {' '.join(map(str, args.crop_size))}: one side or height and width, 16 or more",
    )
    need(
        args.scale[0] <= args.scale[1],
        f"--scale {args.scale[0]} {args.scale[1]}: the smaller one stands first",
    )
    idle = [k for k in given if k.startswith("reco_") and not (semi and k == "reco_threshold")]
    for name, without, there in (
        *((k, "--reco", args.reco) for k in idle),
        ("rep_dim", "--model reconet", args.model == "reconet"),
        ("weak_threshold", "--reco", args.reco),
        ("cache_dir", "a data set on disk", args.dataset != "street"),
        (
            "pretrained",
            "a network that begins here (--init-from brings its weights)",
            not args.init_from,
        ),
    ):
        need(
            name not in given or there,
            f"--{name.replace('_', '-')} has no meaning without {without}",
        )
    need(
        args.batch_size >= 2,
        f"--batch-size {args.batch_size}: batch norm needs two images or more, and mixing a neighbour",
    )
    need(
        "max_size" not in given or args.dataset == "folder",
        "--max-size has a meaning with --dataset folder alone; the other data sets have a fixed size",
    )
    need(
        not semi or args.warmup_iterations < args.iterations,
        f"--warmup-iterations {getattr(args, 'warmup_iterations', 0)}: the run has only {args.iterations} iterations, so no unlabelled image would be used",
    )
    return args


def normal(value, name: str):
    return (
        list(value) * 2
        if name == "crop_size" and isinstance(value, (list, tuple)) and len(value) == 1
        else value
    )


# ---------------------------------------------------------------------------------------------------------- the folder
def default_folder(args: argparse.Namespace) -> Path:
    number = RECIPES[args.dataset]["num_labeled"] if args.num_labeled is None else args.num_labeled
    labels = args.label_ratio or (
        Path(args.labeled_list).stem if args.labeled_list else number or "all"
    )
    return Path("runs") / f"{args.dataset}-{args.method}-{labels}-seed{args.seed}"


def numbered(folder: Path):
    yield folder
    for i in range(2, 10_000):
        yield folder.with_name(f"{folder.name}-{i}")


def newest(folder: Path) -> Path:
    taken = [p for p in numbered(folder) if p.exists()] if folder.exists() else []
    need(taken, f"--resume: there is no run {folder}; name it with --out-dir")
    return taken[-1]


def choose_folder(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """The run's folder, the same on every process. Nothing is written yet."""
    choice = [None]
    if accelerator.is_main_process:
        folder = (
            Path(args.out_dir)
            if args.out_dir
            else next(p for p in numbered(default_folder(args)) if not p.exists())
        )
        choice = [str(folder)]
        if not args.resume and (folder / "config.json").exists():
            choice = [
                UserError(
                    f"--out-dir {folder}: holds a run already; go on with it (--resume) or choose another folder"
                )
            ]
        elif not args.resume and folder.exists() and not folder.is_dir():
            choice = [UserError(f"--out-dir {folder}: is a file, not a folder")]
        elif not args.resume:
            parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
            if not os.access(parent, os.W_OK | os.X_OK):
                choice = [UserError(f"--out-dir {folder}: {parent} is not writable")]
    broadcast_object_list(choice)
    if isinstance(choice[0], UserError):
        raise choice[0]
    return Path(choice[0])


def write(path: Path, writer) -> None:
    """`data.atomic_write`, the folder made where needed; a full disk or a missing right is told in one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data.atomic_write(path, writer)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); what stood there before is whole"
        ) from None


def write_json(path: Path, content) -> None:
    write(
        path, lambda file: file.write((json.dumps(content, indent=1, default=str) + "\n").encode())
    )


def write_torch(path: Path, content) -> None:
    buffer = io.BytesIO()  # in memory first: torch's own writer hides what the disk says
    torch.save(content, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def write_weights(folder: Path, model: nn.Module) -> None:
    """model.safetensors, the weights to use."""
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    write(folder / "model.safetensors", lambda file: file.write(save(tensors)))


def read_config(folder: Path) -> dict:
    need(folder.is_dir(), f"{folder}: no such run folder")
    try:
        config = json.loads((folder / "config.json").read_text())
        dataset, classes, colours = (
            config["arguments"]["dataset"],
            config["classes"],
            np.asarray(config["palette"], np.uint8),
        )
        (height, width), _ = config["crop_size"], config["arguments"]["script"]
        if not (
            config["model"]["num_classes"] == len(classes)
            and colours.shape == (len(classes), 3)
            and dataset in data.SOURCES
            and min(height, width) > 0
        ):
            raise ValueError("its entries contradict one another")
        return config
    except FileNotFoundError:
        raise UserError(f"{folder}: is no run's folder (it has no config.json)") from None
    except OSError as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{folder / 'config.json'}: is damaged ({type(error).__name__}: {error})"
        ) from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], origin) -> None:
    """Into the model, all of them; UserError where names or shapes do not fit."""
    own = model.state_dict()
    shapes = [
        f"{k} is {tuple(v.shape)}, expected {tuple(own[k].shape)}"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    missing, extra = [k for k in own if k not in weights], [k for k in weights if k not in own]
    if shapes or missing or extra:
        what = (
            shapes[0]
            if shapes
            else f"it lacks {missing[0]}"
            if missing
            else f"it has {extra[0]} beyond the network"
        )
        raise UserError(
            f"{origin}: does not fit the network ({what}; {len(shapes) + len(missing) + len(extra)} entries differ): another architecture or class count"
        )
    model.load_state_dict(weights)


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the run has not been validated yet") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: is truncated or no safetensors file ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from None


def read_torch(path: Path):
    """torch.load without unpickling code; UserError for a damaged file or one with anything but tensors in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # the unpickler and the zip reader raise many kinds
        raise UserError(
            f"{path}: is damaged or holds more than plain tensors, so it is not loaded ({type(error).__name__})"
        ) from None


def build_model(config: dict) -> nn.Module:
    return models.DeepLabV3Plus(**{**config["model"], "pretrained": False})


def load_trained(args: argparse.Namespace, device) -> tuple[nn.Module, dict]:
    """The trained network in eval mode, and its config, of a run or of a published ReCo checkpoint."""
    need(bool(args.run) != bool(args.checkpoint), "name either a run's folder or --checkpoint FILE")
    if args.checkpoint:
        need(
            args.dataset not in (None, "street", "folder"),
            "--checkpoint needs --dataset cityscapes, pascal or sun: the file does not say what it was trained on",
        )
        state = read_torch(Path(args.checkpoint))
        need(
            isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values()),
            f"{args.checkpoint}: is no dictionary of tensors, as the published checkpoints are",
        )
        classes, palette = {
            "cityscapes": ([c[1] for c in data.CITYSCAPES], [c[2] for c in data.CITYSCAPES]),
            "pascal": (data.PASCAL, data.voc_palette(21)),
            "sun": (data.SUN, data.voc_palette(38)[1:]),
        }[args.dataset]
        config = {
            "model": {"num_classes": len(classes), "backbone": "resnet101", "rep_dim": 256},
            "classes": classes,
            "palette": palette,
            "crop_size": RECIPES[args.dataset]["crop_size"] * 2,
            "arguments": {"dataset": args.dataset, "data_path": None, "max_size": None},
        }
        model, weights, origin = (
            build_model(config),
            models.convert_reco_checkpoint(state),
            args.checkpoint,
        )
    else:
        config, origin = read_config(Path(args.run)), Path(args.run) / "model.safetensors"
        weights = read_weights(origin)
        try:
            model = build_model(config)
        except UserError:
            raise
        except Exception as error:  # whatever timm and torch make of entries that are not theirs
            raise UserError(
                f"{Path(args.run) / 'config.json'}: describes a network that cannot be built ({type(error).__name__})"
            ) from None
    load_weights(model, weights, origin)
    return model.to(device).eval(), config


def load_checkpoint(folder: Path) -> dict | None:
    """checkpoint/state.pt, or None for a run that was stopped before its first checkpoint."""
    for partial in [
        *folder.glob(".*.part"),
        *folder.glob("checkpoint/.*.part"),
    ]:  # of a run killed while it wrote
        partial.unlink(missing_ok=True)  # every process tries
    path = folder / "checkpoint" / "state.pt"
    return read_torch(path) if path.exists() else None


# ---------------------------------------------------------------------------------------------------------- beginnings
def start_accelerator(args: argparse.Namespace) -> Accelerator:
    # DDP sends rank 0's batch-norm statistics round at every forward: all processes evaluate and save the same network
    # a resumed run keeps its precision (the launcher says "no" where nothing was asked for; Record refuses another)
    keep = (
        getattr(args, "mixed_precision", None)
        if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no"
        else None
    )
    if args.num_workers:
        processes.start_server()
    accelerator = Accelerator(
        mixed_precision=keep,
        log_with=None if args.log_with == "none" else args.log_with,
        project_dir=".",
        dynamo_backend="inductor" if args.compile else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=True),
            InitProcessGroupKwargs(timeout=processes.COLLECTIVE_LIMIT),
        ],
    )
    need(
        accelerator.mixed_precision != "fp16" or accelerator.device.type != "cpu",
        "mixed precision fp16 needs a GPU; on a CPU train with bf16 or without",
    )
    if (
        accelerator.device.type == "cpu"
        and accelerator.num_processes == 1
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        torch.set_num_threads(
            cores()
        )  # `accelerate launch` allows a CPU run one thread, plain python all
    need(
        not (args.reco and args.reco_sampling == "independent") or accelerator.num_processes == 1,
        "--reco-sampling independent runs on one process only: its keys are too many to exchange",
    )
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return accelerator


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_step(seed: int, step: int, rank: int) -> np.random.Generator:
    """Everything drawn in a step is a function of (seed, step, process): torch is seeded for the sampling and the mixing, the
    generator returned draws the augmentation."""
    sequence = np.random.SeedSequence([seed, 7, step, rank])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)


def learning_rate(base: float, step: int, iterations: int) -> float:
    """Polynomial decay of power 0.9 with a floor of 1e-6; a function of the step, so it ends where it should on any number of processes."""
    return max(base * (1 - step / iterations) ** 0.9, 1e-6)


def to_device(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = convert_sync_batchnorm(
            model
        )  # timm's keeps the activations of its own norm layers. A process holds few images; statistics come from all
    return model.to(accelerator.device, memory_format=torch.channels_last)


def new_model(
    args: argparse.Namespace, source: data.Source, fresh: bool = True
) -> tuple[nn.Module, dict]:
    """The network with its first weights (`fresh`; a checkpoint brings its own), and what config.json says of it."""
    torch.manual_seed(args.seed)
    shape = dict(
        num_classes=len(source.classes),
        backbone=args.backbone,
        rep_dim=args.rep_dim if args.model == "reconet" else None,
        output_stride=args.output_stride,
        decoder_stride=args.decoder_stride,
        channels=args.channels,
        low_channels=args.low_channels,
        aspp_rates=args.aspp_rates,
    )
    model = models.DeepLabV3Plus(
        **shape, pretrained=args.pretrained and fresh and not args.init_from
    )
    if args.init_from and fresh:
        weights = read_weights(Path(args.init_from) / "model.safetensors")
        need(
            read_config(Path(args.init_from))["classes"] == source.classes,
            f"--init-from {args.init_from}: was trained on other classes than those of --dataset {args.dataset}",
        )
        if args.model == "deeplabv3plus":
            weights = {k: v for k, v in weights.items() if not k.startswith("representation.")}
        load_weights(model, weights, f"--init-from {args.init_from}")
    return model, {
        "model": shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": source.classes,
        "palette": source.palette,
        "mean": data.MEAN,
        "std": data.STD,
        "crop_size": args.crop_size,
        "arguments": vars(args),
    }


# ---------------------------------------------------------------------------------------------------------- the record
class Record:
    """What is seen and kept of a run: start line, progress bar, curves, pictures, validation, the best weights, checkpoints. It trains nothing."""

    def __init__(
        self,
        args,
        accelerator: Accelerator,
        folder: Path,
        source: data.Source,
        config: dict,
        labelled: list,
        unlabelled: list | None,
        partial: bool,
        state: dict | None,
    ):
        self.args, self.accelerator, self.folder, self.source, self.config = (
            args,
            accelerator,
            folder,
            source,
            config,
        )
        self.main, world = accelerator.is_main_process, accelerator.num_processes
        self.step, self.best, self.history, self.skipped, self.loaders = 0, None, [], 0, []
        self.sums, self.since, self.first_bad, self.bad_parts = {}, time.monotonic(), None, None
        self.control = (
            torch.distributed.new_group(backend="gloo", timeout=processes.COLLECTIVE_LIMIT)
            if world > 1
            else None
        )  # carries a signal round without the device
        self.base_rate = (
            args.lr if args.lr_given else args.lr * args.batch_size * world / args.recipe_batch
        )
        self.val_loader = loaders.evaluation_loader(
            loaders.EvaluationImages(source, source.val),
            4 if source.name != "street" else 50,
            min(2, args.num_workers),
            accelerator.process_index,
            world,
            accelerator.device.type == "cuda",
        )
        if state:
            self.step, self.best, self.history, self.skipped = (
                state["step"],
                state["best"],
                state["history"],
                state["skipped"],
            )
        if args.resume:
            saved = read_config(folder)["arguments"]
            differing = [
                f"{what} {now} (the run: {saved[key]})"
                for key, what, now in (
                    ("processes", "processes", world),
                    ("mixed_precision", "mixed precision", accelerator.mixed_precision),
                )
                if saved[key] != now
            ]
            names = (
                (folder / "labeled.txt").read_text().split("\n")[:-1]
                if (folder / "labeled.txt").exists()
                else None
            )
            if names is not None and names != [s.name for s in labelled]:
                differing.append("the labelled images (the data have changed)")
            need(
                not differing, f"--resume {folder}: {', '.join(differing)} would change the result"
            )
        self.names_labelled, self.begun, self.writer = [s.name for s in labelled], False, None
        self.announce(labelled, unlabelled, partial)
        self.bar = None
        self.stop, self.stopping = processes.Stop(), 0
        processes.speak_for_itself()

    def begin(self) -> None:
        """Open the run's folder: after the first step (--init-from: before its first validation), so that bad input found until then leaves nothing behind."""
        self.begun, args, accelerator = True, self.args, self.accelerator
        need(
            not self.main or args.resume or not (self.folder / "config.json").exists(),
            f"{self.folder}: another run that began meanwhile took this folder; begin again, or choose one with --out-dir",
        )
        self.bar = tqdm(
            total=args.iterations,
            initial=self.step,
            unit="step",
            disable=not self.main,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )  # a log file gets a line every half minute
        if self.main and not args.resume:
            self.config["arguments"] = {
                **vars(args),
                "processes": accelerator.num_processes,
                "mixed_precision": accelerator.mixed_precision,
            }
            write(
                self.folder / "labeled.txt",
                lambda file: file.write(
                    "".join(f"{name}\n" for name in self.names_labelled).encode()
                ),
            )
            write_json(self.folder / "config.json", self.config)
        if args.log_with != "none":
            accelerator.project_configuration.logging_dir = str(self.folder)
            if args.log_with == "tensorboard":
                accelerator.init_trackers(
                    "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}}
                )
                self.writer = (
                    accelerator.get_tracker("tensorboard", unwrap=True) if self.main else None
                )
            else:
                accelerator.init_trackers("reco", config=self.plain_arguments)
        self.val_loader.start()  # beside the next steps, so that a validation starts no process

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def announce(self, labelled: list, unlabelled: list | None, partial: bool) -> None:
        args, accelerator, source = self.args, self.accelerator, self.source
        processes, model = accelerator.num_processes, self.config["model"]
        kind = (
            ""
            if not partial
            else f" with {args.label_ratio} partial labels"
            if args.label_ratio
            else " with sparse masks: the partial-label recipe is on"
        )
        images = (
            f"{len(labelled)} labelled{kind}"
            + (f" + {len(unlabelled)} unlabelled" if unlabelled is not None else "")
            + f", {len(source.val)} validation images"
        )
        batch = args.batch_size * processes
        recipe = (
            ""
            if args.lr_given or batch == args.recipe_batch
            else f" = {args.lr:g} x {batch}/{args.recipe_batch}, in proportion to the batch; --lr overrides"
        )
        self.say(
            f"{source.name}: {images}, {len(source.classes)} classes | {args.method}, {args.model} on {model['backbone']}, {self.config['parameters'] / 1e6:.1f} M parameters | "
            f"{accelerator.device.type} x {processes}, precision {accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}"
            f"{', SyncBatchNorm' if processes > 1 and accelerator.device.type == 'cuda' else ''} | "
            f"global batch {batch}{' + ' + str(batch) if unlabelled is not None else ''}, learning rate {self.base_rate:g}{recipe} | writes to {self.folder}"
            + (f" | goes on at step {self.step} of {args.iterations}" if args.resume else "")
        )

    @property
    def plain_arguments(self) -> dict:
        """What trackers take: no lists, no None."""
        return {k: v for k, v in vars(self.args).items() if isinstance(v, (int, float, str, bool))}

    def loader(
        self, samples: list[data.Sample], stream: int, scale: tuple[float, float]
    ) -> loaders.Loader:
        """Batches (image uint8 [B, 3, h, w], label uint8 [B, h, w], index) for the steps that remain."""
        args, accelerator = self.args, self.accelerator
        crops = loaders.TrainingCrops(
            self.source, samples, tuple(args.crop_size), scale, args.label_ratio, args.seed
        )
        sampler = loaders.StepSampler(
            len(samples),
            args.batch_size,
            self.step,
            args.iterations,
            args.seed,
            stream,
            accelerator.process_index,
            accelerator.num_processes,
        )
        name = ("labelled", "unlabelled")[stream]
        pin_memory = accelerator.device.type == "cuda"
        self.loaders.append(
            loaders.training_loader(name, crops, sampler, args.num_workers, pin_memory)
        )
        return self.loaders[-1]

    def restore(self, state: dict, model: nn.Module, optimizer, teacher=None) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if teacher:
            teacher.load_state_dict(state["teacher"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def add(self, step: int, rate: float, parts: dict[str, Tensor]) -> None:
        """After each step. Sums stay on the device until the logging interval."""
        if not self.begun:
            self.begin()
        self.step = step + 1
        values = torch.stack(list(parts.values()))
        bad = ~torch.isfinite(values).all()
        if self.first_bad is None:
            self.first_bad, self.bad_parts = (
                torch.full_like(bad, -1, dtype=torch.long),
                torch.zeros_like(values),
            )
        if len(values) != len(self.bad_parts):  # once, when the unlabelled images have joined
            self.check_finite()
            self.bad_parts = torch.zeros_like(values)
        news = bad & (self.first_bad < 0)
        self.first_bad = torch.where(news, step, self.first_bad)
        self.bad_parts = torch.where(news, values, self.bad_parts)
        self.names = list(parts)
        for name, value in parts.items():
            total, times = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value, times + 1
        self.skipped += int(self.accelerator.optimizer_step_was_skipped)
        self.bar.update()
        if self.step % self.args.log_interval == 0 or self.step == self.args.iterations:
            self.check_finite()
            means = self.accelerator.reduce(
                torch.stack([total / times for total, times in self.sums.values()]), "mean"
            )
            means = dict(zip(self.sums, means.tolist()))
            done = max(times for _, times in self.sums.values())
            seconds, self.since = time.monotonic() - self.since, time.monotonic()
            images = (
                done * self.args.batch_size * self.accelerator.num_processes * len(self.loaders)
            )
            self.bar.set_postfix(
                {
                    name.split("/")[1][:5]: f"{value:.3f}"
                    for name, value in means.items()
                    if name.startswith("loss/")
                },
                refresh=False,
            )
            self.log(
                {
                    **means,
                    "learning rate": rate,
                    "images per second": images / seconds,
                    **({"skipped steps": self.skipped} if self.accelerator.scaler else {}),
                }
            )
            self.sums = {}
        self.stopping = self.stop.signal
        if self.control:  # all stop at one step, or none
            flag = torch.tensor(self.stopping)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.control)
            self.stopping = int(flag)

    def log(self, values: dict) -> None:
        if self.args.log_with != "none":
            self.accelerator.log(values, step=self.step)

    def check_finite(self) -> None:
        if self.first_bad is None or int(self.first_bad) < 0:
            return
        step = int(self.first_bad)
        batches = []
        for loader in self.loaders:  # a batch is a function of (seed, step), so it can be had again
            items = [loader.dataset[key] for key in loader.sampler.batch(step)]
            batches.append(torch.utils.data.default_collate(items))
        path = self.folder / f"nonfinite-step{step}-process{self.accelerator.process_index}.pt"
        write_torch(path, batches)
        parts = ", ".join(
            f"{name} {value:g}" for name, value in zip(self.names, self.bad_parts.tolist())
        )
        raise UserError(
            f"the loss was not finite at step {step} ({parts}); the last good checkpoint is kept, the batch is in {path}. A smaller --lr, or bf16 instead of "
            "fp16, usually helps"
        )

    @property
    def validation_due(self) -> bool:
        return self.step % self.args.val_interval == 0 or self.step == self.args.iterations

    @property
    def saving_due(self) -> bool:
        return (
            self.step % self.args.save_interval == 0
            or self.step == self.args.iterations
            or bool(self.stopping)
        )

    def validate(self, networks: dict[str, nn.Module], shown: dict[str, Tensor] = {}) -> None:
        """Evaluate on every validation image; the first network is the one that is reported and kept when it is the best so far."""
        if not self.begun:
            self.begin()
        self.check_finite()
        entered = time.monotonic()
        entry = {"step": self.step}
        for name, network in networks.items():
            self.share_buffers(network)
            results, confusion = evaluate.evaluate(
                network, self.val_loader, len(self.source.classes), self.accelerator
            )
            for key in ("miou", "boundary_iou", "accuracy"):
                entry[f"{name} {key}"] = results[key]
            if "miou" not in entry:
                entry |= results | {"confusion": confusion.tolist()}
        self.history.append(entry)
        better = self.best is None or entry["miou"] > self.best["miou"]
        if better:
            self.best = entry
            if self.main:
                write_weights(self.folder, next(iter(networks.values())))
        others = "".join(
            f", {name} {100 * entry[f'{name} miou']:.2f}" for name in list(networks)[1:]
        )
        self.say(
            f"step {self.step}: validation mIoU {100 * entry['miou']:.2f}, boundary IoU {100 * entry['boundary_iou']:.2f}, pixel accuracy {100 * entry['accuracy']:.2f}{others}"
            + (" *" if better else "")
        )
        self.log(
            {
                f"validation/{key}": value
                for key, value in entry.items()
                if isinstance(value, float) and " " in key
            }
            | {
                f"validation IoU/{name}": value
                for name, value in zip(self.source.classes, entry["iou"])
                if value is not None
            }
        )
        if self.main:
            write_json(self.folder / "history.json", self.history)
        self.pictures(next(iter(networks.values())), shown)
        self.since += time.monotonic() - entered  # the rate is that of training

    @torch.no_grad()
    def pictures(self, network: nn.Module, shown: dict[str, Tensor]) -> None:
        """To TensorBoard: some validation images (the same every time), the training batch, and the confusion matrix and class-relation graph as heat maps."""
        if not self.writer:
            return
        palette, names, device = self.source.palette, self.source.classes, self.accelerator.device
        rows = []
        for index in (
            torch.linspace(0, len(self.source.val) - 1, min(4, len(self.source.val)))
            .long()
            .tolist()
        ):
            image, label, _ = self.val_loader.dataset[index]
            network.eval()
            confidence, prediction = evaluate.predict_probabilities(
                network, data.to_float(image[None], device)
            ).max(dim=1)
            network.train()
            rows.append(
                panel(
                    image,
                    paint(label, palette),
                    paint(prediction[0].cpu(), palette),
                    confidence[0].cpu(),
                )
            )
        self.writer.add_image(
            "validation: image | truth | prediction | confidence", stack(rows), self.step
        )
        if shown:
            rows, last = [], len(shown["images"]) - 1
            for b in sorted(
                {0, min(1, last), max(last - 1, 0), last}
            ):  # labelled images stand first, unlabelled ones last
                image = denormalise(shown["images"][b].float().cpu())
                row = [
                    image,
                    paint(shown["label"][b].cpu(), palette),
                    shown["confidence"][b].float().cpu(),
                ]
                if "queries" in shown:
                    row.append(
                        mark_queries(
                            image,
                            shown["queries"],
                            shown["rep_size"],
                            b,
                            shown["label"][b].cpu(),
                            palette,
                        )
                    )
                rows.append(panel(*row))
            self.writer.add_image(
                "training: image | (pseudo-)label | confidence | queries of ReCo",
                stack(rows),
                self.step,
            )
        confusion = torch.tensor(self.history[-1]["confusion"]).float()
        self.writer.add_image(
            "confusion (row: truth)",
            heat_map(confusion / confusion.sum(1, keepdim=True).clamp_min(1), names),
            self.step,
        )
        if "relation" in shown:
            self.writer.add_image(
                "class relation (row: query class)",
                heat_map(shown["relation"].cpu(), names),
                self.step,
            )

    @torch.no_grad()
    def embedding(self, network: nn.Module) -> None:
        """A few hundred pixel representations of validation images, for TensorBoard's projector, coloured by class."""
        if not self.writer or self.args.model != "reconet":
            return
        generator, vectors, classes = torch.Generator().manual_seed(0), [], []
        network.eval()
        for index in (
            torch.linspace(0, len(self.source.val) - 1, min(24, len(self.source.val)))
            .long()
            .tolist()
        ):
            image, label, _ = self.val_loader.dataset[index]
            rep = (
                network(data.normalise(data.to_float(image[None], self.accelerator.device)))[1][0]
                .float()
                .cpu()
            )  # [D, h, w]
            label = data.shrink_label(label[None], rep.shape[-2:])[0].flatten()
            for c in label.unique().tolist():
                pixels = (label == c).nonzero()[:, 0]
                pixels = (
                    pixels[torch.randperm(len(pixels), generator=generator)[:4]]
                    if c < len(self.source.classes)
                    else pixels[:0]
                )
                vectors.append(rep.flatten(1)[:, pixels].T)
                classes += [c] * len(pixels)
        squares = (
            torch.tensor([self.source.palette[c] for c in classes], dtype=torch.float)[
                :, :, None, None
            ].expand(-1, -1, 8, 8)
            / 255
        )
        self.writer.add_embedding(
            torch.cat(vectors),
            [self.source.classes[c] for c in classes],
            squares,
            self.step,
            "representation",
        )

    def share_buffers(self, network: nn.Module) -> None:
        """Every process takes the main one's batch-norm statistics, so that all evaluate one network, the one that is saved."""
        if self.control:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def save(self, model: nn.Module, optimizer, teacher=None) -> None:
        """The state to go on from. It is the same on every process (see share_buffers), so the main one alone writes."""
        entered = time.monotonic()
        self.check_finite()
        if not torch.isfinite(
            torch.stack(torch._foreach_norm(list(model.parameters())))
        ).all():  # the same on every process
            raise UserError(
                f"the weights were not finite after step {self.step - 1}, though the losses were; the last good checkpoint is kept. A smaller --lr usually helps"
            )
        if self.main:
            # random state is no part of it: every draw is a function of (seed, step)
            state = {
                "step": self.step,
                "best": self.best,
                "history": self.history,
                "skipped": self.skipped,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "teacher": teacher.state_dict() if teacher else None,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            }
            write_torch(self.folder / "checkpoint" / "state.pt", state)
        if self.stopping and self.step < self.args.iterations:
            self.bar.close()
            self.accelerator.wait_for_everyone()
            self.say(
                f"stopped at step {self.step} of {self.args.iterations}, saved. Go on with: {resume_command(self.args, self.folder)}"
            )
            self.accelerator.end_training()
            sys.exit(128 + self.stopping)
        self.since += time.monotonic() - entered

    def finish(self, network: nn.Module) -> None:
        if self.bar:
            self.bar.close()
        self.embedding(network)
        if self.writer:
            self.writer.add_hparams(
                self.plain_arguments,
                {
                    "hparam/miou": self.best["miou"],
                    "hparam/boundary_iou": self.best["boundary_iou"],
                },
                run_name=".",
            )
        if self.best:
            self.say(evaluate.table(self.best, self.source.classes))
            self.say(
                f"best validation mIoU {100 * self.best['miou']:.2f} at step {self.best['step']} of {self.args.iterations}; weights in {self.folder / 'model.safetensors'}\n"
                f"predict with: python predict.py {shlex.quote(str(self.folder))} IMAGE_OR_FOLDER --out-dir predictions"
            )
        self.accelerator.end_training()


# ------------------------------------------------------------------------------------------------------------ pictures
def paint(label: Tensor, palette) -> Tensor:
    """[H, W] class ids -> uint8 [3, H, W] in the data set's colours; 255 is white."""
    colours = torch.full((256, 3), 255, dtype=torch.uint8)
    colours[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return colours[label.long()].permute(2, 0, 1)


def denormalise(image: Tensor) -> Tensor:
    """Normalised [3, H, W] -> uint8."""
    mean, std = torch.tensor(data.MEAN)[:, None, None], torch.tensor(data.STD)[:, None, None]
    return ((image * std + mean).clamp(0, 1) * 255).round().byte()


def panel(*images: Tensor, height: int = 192) -> Tensor:
    """Pictures (uint8 [3, H, W], or a map [H, W] in 0 .. 1) of one size side by side, at a height that can be seen -> uint8 [3, height, W']."""
    images = [(255 * i).byte()[None].expand(3, -1, -1) if i.dim() == 2 else i for i in images]
    size = (height, max(1, round(images[0].shape[-1] * height / images[0].shape[-2])))
    return torch.cat(
        [torch.nn.functional.interpolate(i[None], size=size, mode="nearest")[0] for i in images],
        dim=2,
    )


def stack(rows: list[Tensor]) -> Tensor:
    width = max(row.shape[-1] for row in rows)
    return torch.cat(
        [torch.nn.functional.pad(row, (0, width - row.shape[-1])) for row in rows], dim=1
    )


def mark_queries(image: Tensor, queries: Tensor, size, b: int, label: Tensor, palette) -> Tensor:
    """The image, dimmed, with the pixels that ReCo picked as queries in it, in the colour of their class."""
    h, w = size
    picked = torch.zeros(h * w, dtype=torch.bool)
    mine = queries.flatten().cpu() - b * h * w
    picked[mine[(mine >= 0) & (mine < h * w)]] = True
    picked = (
        torch.nn.functional.interpolate(
            picked.view(1, 1, h, w).float(), size=image.shape[-2:], mode="nearest"
        )[0]
        > 0
    )
    return torch.where(picked, paint(label, palette), image // 3)


def heat_map(matrix: Tensor, names: list[str]) -> Tensor:
    """A matrix in 0 .. 1 as a picture with class names -> uint8 [3, H, W]."""
    cell, font = 24, ImageFont.load_default(12)
    left = 8 + max(int(font.getlength(name)) for name in names)
    image = Image.new("RGB", (left + cell * len(names) + 4, left + cell * len(names) + 4), "white")
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        draw.text((left - 4, left + (i + 0.5) * cell), name, "black", font, anchor="rm")
        upright = Image.new("L", (left, cell))
        ImageDraw.Draw(upright).text((4, cell / 2), name, 255, font, anchor="lm")
        image.paste("black", (left + i * cell, 0), upright.rotate(90, expand=True))
        for j in range(len(names)):
            value = float(matrix[i, j])
            x, y = left + j * cell, left + i * cell
            draw.rectangle(
                [x, y, x + cell - 2, y + cell - 2],
                (round(255 - 220 * value), round(255 - 160 * value), round(255 - 90 * value)),
            )
            if value >= 0.005:
                draw.text(
                    (x + cell / 2 - 1, y + cell / 2),
                    f"{100 * value:.0f}",
                    "black" if value < 0.6 else "white",
                    ImageFont.load_default(10),
                    anchor="mm",
                )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resume_command(args: argparse.Namespace, folder: Path) -> str:
    launcher = (
        f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', 1)}"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1
        else "python"
    )
    on_cpu = "ACCELERATE_USE_CPU=1 " if os.environ.get("ACCELERATE_USE_CPU") else ""
    return f"{on_cpu}{launcher} {args.script} --out-dir {shlex.quote(str(folder))} --resume"
