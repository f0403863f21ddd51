"""Time a training step by part, with and without ReCo, and the loss alone, on synthetic images;
with --data-path also the loaders; with --predict only the prediction of a trained run.

    python bench.py                                   # street, on the device of this machine
    python bench.py --dataset cityscapes --steps 20   # ResNet-101, 2 + 2 crops of 512x512
    python bench.py --script train_supervised.py --dataset pascal --backbone resnet50
    accelerate launch --mixed_precision bf16 bench.py --dataset cityscapes --compile
    python bench.py --dataset cityscapes --data-path dataset/cityscapes --num-workers 8
    python bench.py --loss-only                       # the loss, and how its cost grows
    python bench.py --predict RUN IMAGES              # the network alone, and all of predict.py

All other options are those of the training script. The weights are random.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import models
import predict
import train_semi
import train_supervised
from data import DATASETS, load_source
from engine.options import new_parser, positive
from engine.processes import launch
from engine.setup import new_optimizer, start_accelerator, start_step
from inputs.files import output_file, read_image, write_json
from inputs.labels import split_train
from inputs.source import Source
from inputs.transforms import resize_image, to_float
from models import MeanTeacher, new_model
from reco import reco_loss

try:
    import resource
except ImportError:  # Windows
    resource = None

SCRIPTS = {"train_semi.py": train_semi, "train_supervised.py": train_supervised}
# the parts of a step and the functions of the training script that they consist of
PARTS = {
    "to device": ["to_float", "to_device"],
    "augmentation": ["augment", "strong_view"],
    "teacher": ["pseudo_label"],
    "student forward": [],
    "ReCo": ["reco_targets", "reco_loss"],
    "backward": [],
    "optimiser + EMA": [],
}

# What the loss is timed on: name, shape of rep [B, D, h, w], classes. The data sets at the paper's
# sizes, then the Cityscapes size with one number changed at a time.
LOSS_SIZES = [
    ("Cityscapes", (4, 256, 128, 128), 19),
    ("Pascal", (20, 256, 81, 81), 21),
    ("SUN RGB-D", (10, 256, 81, 81), 37),
]
GROWTH_SIZES = [
    ("37 classes", (4, 256, 128, 128), 37),
    ("81 classes", (4, 256, 128, 128), 81),
    ("150 classes", (4, 256, 128, 128), 150),
    ("a quarter of the pixels", (1, 256, 128, 128), 19),
    ("4 times the pixels", (4, 256, 256, 256), 19),
    ("64 channels", (4, 64, 128, 128), 19),
]


# ----------------------------------------------------------------------------------- measuring
class Clock:
    """Seconds by part since the last restart, each once the device has done its work."""

    def __init__(self, device: torch.device):
        self.device, self.parts, self.inside = device, defaultdict(float), False

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, whose time counts for the part; a timed function that it calls does not."""

        def call(*arguments, **options):
            if self.inside:
                return function(*arguments, **options)
            self.inside, begun = True, self.now()
            try:
                return function(*arguments, **options)
            finally:
                self.inside = False
                self.parts[part] += self.now() - begun

        return call

    @contextlib.contextmanager
    def watch(self, functions: list[tuple[object, str, str]]) -> Iterator[None]:
        """While entered, time functions given as (module or object, its name there, part)."""
        with contextlib.ExitStack() as stack:
            for owner, name, part in functions:
                timed = self.timed(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield


class CountOperations(TorchDispatchMode):
    """While entered, counts the operations that PyTorch dispatches, views and allocations aside: on
    a GPU each is a kernel, or a few."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += not (operation.is_view or "empty" in str(operation))
        return operation(*args, **(kwargs or {}))


def peak_memory(device: torch.device) -> float:
    """MB: on a GPU the most that tensors took since the last reset; on a CPU the most that the
    process has taken so far (not a number on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not resource:
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)  # a Mac counts bytes, Linux kB


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# ------------------------------------------------------------------------------------ the step
def random_rectangles(batch: int, size, classes: int) -> torch.Tensor:
    """Label maps of rectangles of random classes, int64 [B, H, W]."""
    coarse = torch.randint(classes, (batch, 1, 8, 8)).float()
    return F.interpolate(coarse, size=tuple(size), mode="nearest")[:, 0].long()


def random_batch(
    batch_size: int, size, classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [B, 3, h, w] in which a class has a colour, and labels uint8 [B, h, w]."""
    label = random_rectangles(batch_size, size, classes)
    noise = torch.randint(0, 50, (batch_size, 3, *size))
    images, label = (label[:, None] * 200 // classes + noise).byte(), label.byte()
    return (images.pin_memory(), label.pin_memory()) if device.type == "cuda" else (images, label)


def batch_sizes(args: argparse.Namespace) -> list[int]:
    """Images of a step and process: labelled and, in train_semi.py, unlabelled ones."""
    if args.script == "train_supervised.py":
        return [args.batch_size]
    partial = args.label_ratio is not None
    return [args.labeled_batch_size or args.batch_size * (2 if partial else 1), args.batch_size]


def time_steps(
    args: argparse.Namespace, accelerator: Accelerator, steps: int, trace: Path | None
) -> dict:
    """Median seconds of each part over `steps` steps, after three to warm up, and of the whole
    step; on a GPU the whole step is measured again without waiting between the parts. One more step
    counts operations, and one writes a timeline of every operation to `trace`."""
    classes, device = len(DATASETS[args.dataset].source.classes) or 3, accelerator.device
    names, script = [str(i) for i in range(classes)], SCRIPTS[args.script]
    model, _ = new_model(args, Source(args.dataset, names, [(0, 0, 0)] * classes), accelerator)
    optimizer = new_optimizer(args, model)
    teacher = MeanTeacher(model, compiled=args.compile)
    student, optimizer = accelerator.prepare(model, optimizer)
    student.train()
    networks = [student, teacher] if script is train_semi else [student]

    def new_batches() -> list:
        return [random_batch(n, args.crop_size, classes, device) for n in batch_sizes(args)]

    def one_step(step: int, batches: list) -> None:
        rng = start_step(args, optimizer, accelerator, 0, step)
        common = optimizer, accelerator, args, rng, args.label_ratio is not None
        script.train_step(*batches, *networks, *common)

    clock, times = Clock(device), []
    functions = [(script, f, part) for part in PARTS for f in PARTS[part] if hasattr(script, f)]
    functions += [(student, "forward", "student forward"), (accelerator, "backward", "backward")]
    update = [(optimizer, "step"), (optimizer, "zero_grad"), (teacher, "update")]
    functions += [(owner, name, "optimiser + EMA") for owner, name in update]
    with clock.watch(functions):
        progress = tqdm(
            range(steps + 3), f"{args.method}, {args.dataset}", leave=False, disable=None
        )
        for step in progress:
            if step == 3:  # before, cuDNN tries its algorithms
                reset_peak_memory(device)
            batches = new_batches()
            clock.parts.clear()
            begun = clock.now()
            one_step(step, batches)
            times.append({"step": clock.now() - begun, **clock.parts})
    memory = peak_memory(device)
    parts = {part: statistics.median(t.get(part, 0.0) for t in times[3:]) for part in PARTS}
    total = statistics.median(t["step"] for t in times[3:])
    if device.type == "cuda":  # the host now works ahead of the device
        begun = clock.now()
        for step in range(steps):
            one_step(step, batches)
        total = (clock.now() - begun) / steps
    with torch.compiler.set_stance("force_eager"), CountOperations() as operations:
        one_step(steps, batches)
    if trace:
        with torch.profiler.profile() as profile:
            one_step(steps + 1, batches)
        if accelerator.is_main_process:
            profile.export_chrome_trace(str(trace))
    accelerator.free_memory()
    return {
        "method": args.method,
        "dataset": args.dataset,
        "backbone": args.backbone,
        "crop": args.crop_size,
        "seconds": parts,
        "step": total,
        "images per second": sum(batch_sizes(args)) * accelerator.num_processes / total,
        "peak memory MB": memory,
        "ReCo share": parts["ReCo"] / sum(parts.values()),
        "operations": operations.number,
    }


# -------------------------------------------------------------------------------- the other parts
def time_loaders(args: argparse.Namespace, accelerator: Accelerator, steps: int) -> dict:
    """Images per second that the loaders of the training script deliver while nothing else runs,
    over `steps` steps or more, after those that their processes read ahead."""
    source = load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    ahead, steps = 3 + 2 * args.num_workers, max(steps, 8 * args.num_workers)
    args = argparse.Namespace(**{**vars(args), "iterations": ahead + steps})
    split = split_train(source, args)
    loaders = SCRIPTS[args.script].training_loaders(args, source, split, accelerator, 0)
    batches = zip(*loaders, strict=True)
    for _ in range(ahead):
        next(batches)
    begun = time.perf_counter()
    for _ in tqdm(batches, "loaders", total=steps, unit="step", leave=False, disable=None):
        pass
    images = sum(batch_sizes(args)) * accelerator.num_processes * steps
    return {
        "num workers": args.num_workers,
        "cache": bool(args.cache_dir),
        "images per second": images / (time.perf_counter() - begun),
    }


def loss_inputs(shape, classes: int, device) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    batch, _, h, w = shape
    rep = torch.randn(shape, device=device, requires_grad=True)
    label = random_rectangles(batch, (h, w), classes).to(device)
    prob = torch.randn(batch, classes, h, w, device=device).softmax(dim=1)
    return rep, label, prob, torch.rand(batch, h, w, device=device) < 0.9


def time_loss(name: str, shape, classes: int, device: torch.device, steps: int) -> dict:
    """Median seconds of the ReCo loss, forward and backward, with 256 queries and 512 negatives."""
    rep, label, prob, valid = loss_inputs(shape, classes, device)
    clock, times = Clock(device), []
    reset_peak_memory(device)
    for _ in range(steps + 2):
        rep.grad, begun = None, clock.now()
        reco_loss(rep, label, prob, valid).backward()
        times.append(clock.now() - begun)
    return {
        "name": name,
        "rep": list(shape),
        "classes": classes,
        "seconds": statistics.median(times[2:]),
        "rep MB": rep.numel() * rep.element_size() / 2**20,
        "peak memory MB": peak_memory(device),
    }


def time_prediction(run: str, folder: str, steps: int) -> dict:
    """Images per second of the network alone (forward passes on images in memory, at most `steps`
    of them, before and after) and of predict.py on all images of a folder."""
    model = models.load(run).to(Accelerator().device)
    clock = Clock(model.mean.device)
    with tempfile.TemporaryDirectory() as out:
        targets = predict.find_images([folder], Path(out))
        sample = [read_image(path) for path in list(targets)[:steps]]
        small = [resize_image(image, model.network_size(*image.shape[-2:])) for image in sample]
        batches = [to_float(image[None], clock.device) for image in small]

        def forward() -> float:
            begun = clock.now()
            with torch.no_grad():
                for batch in batches:
                    model(batch)
            return clock.now() - begun

        forward()  # warms up
        before, begun = forward(), clock.now()
        scores = predict.predict_all(
            model, targets, predict.parse_options([run, folder, "--out-dir", out])
        )
        whole = len(scores) / (clock.now() - begun)
    network = 2 * len(batches) / (before + forward())
    return {"network": network, "whole": whole, "share": whole / network, "images": len(scores)}


# ---------------------------------------------------------------------------------- the script
def line(name: str, *cells) -> str:
    return f"{name:24s}" + "".join(f"{cell:>17}" for cell in cells)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def steps_line(row: dict) -> str:
    times = [milliseconds(t) for t in (*row["seconds"].values(), row["step"])]
    rate, memory = f"{row['images per second']:.1f}", f"{row['peak memory MB']:.0f}"
    share = f"{100 * row['ReCo share']:.1f}%"
    name = f"{row['dataset']} {row['method']}"
    return line(name, *times, rate, memory, share, row["operations"])


def loss_line(row: dict) -> str:
    shape, memory = "x".join(map(str, row["rep"])), f"{row['peak memory MB']:.0f}"
    rep = f"{row['rep MB']:.1f}"
    return line(row["name"], shape, row["classes"], milliseconds(row["seconds"]), rep, memory)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest, which is the training script's."""
    parser = new_parser(__doc__, usage="%(prog)s [options] [options of the training script]")
    add = parser.add_argument
    add("--script", choices=list(SCRIPTS), default="train_semi.py", help="whose step is timed")
    add("--steps", type=positive, default=10, help="timed steps, after three to warm up")
    add(
        "--loss-only",
        action="store_true",
        help="time only the loss: at the sizes of the paper's data sets, and with more classes, "
        "pixels and channels",
    )
    add(
        "--predict",
        nargs=2,
        metavar=("RUN", "IMAGES"),
        help="time only the prediction of the images in a folder",
    )
    add("--json", metavar="FILE", help="also write the figures to this file")
    add(
        "--trace",
        metavar="FILE",
        help="write a timeline of every operation of one step, for ui.perfetto.dev",
    )
    add("--overwrite", action="store_true", help="replace the files of --json and --trace")
    own, rest = parser.parse_known_args()
    for name in ("json", "trace"):
        if file := getattr(own, name):
            setattr(own, name, output_file(f"--{name}", file, own.overwrite))
    return own, rest


def main() -> None:
    own, rest = parse_options()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # without the profiler's own lines
    if own.predict:
        row = time_prediction(*own.predict, own.steps)
        rates = f"{row['whole']:.2f} images/s, the network alone {row['network']:.2f}"
        print(f"{row['images']} images: {rates}: {100 * row['share']:.0f} %")
        if own.json:
            write_json(own.json, row)
        return

    def training_options(*extra: str) -> argparse.Namespace:
        args = SCRIPTS[own.script].parse_options([*rest, "--log-with", "none", *extra])
        args.warmup_iterations, args.pretrained = 0, False
        args.backbone_weights, args.init_from = None, None
        return args

    args = training_options()
    accelerator = start_accelerator(args)
    device, say = accelerator.device, accelerator.print
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    results = {"device": name, "torch": torch.__version__, "steps": [], "loss": [], "loaders": []}
    precision, compiled = accelerator.mixed_precision, ", compiled" if args.compile else ""
    say(f"{name}, torch {torch.__version__}, precision {precision}{compiled}")
    if args.data_path and not own.loss_only:
        results["loaders"].append(row := time_loaders(args, accelerator, own.steps))
        rate = f"{row['images per second']:.1f} images/s"
        say(f"loaders of {args.num_workers} processes each: {rate}")
    if not own.loss_only:
        say("\n" + line("ms", *PARTS, "step", "images/s", "peak MB", "ReCo", "operations"))
        both = args.model == "reconet" and not args.reco
        for extra in [[], ["--reco"]] if both else [[]]:
            trace = None if both and not extra else own.trace  # of the last one
            row = time_steps(training_options(*extra), accelerator, own.steps, trace)
            results["steps"].append(row)
            say(steps_line(row))
    say("\n" + line("the loss", "rep", "classes", "ms", "rep MB", "peak MB"))
    for size in LOSS_SIZES + (GROWTH_SIZES if own.loss_only else []):
        results["loss"].append(row := time_loss(*size, device, own.steps))
        say(loss_line(row))
    if own.json and accelerator.is_main_process:
        write_json(own.json, results)


if __name__ == "__main__":
    launch(main)
