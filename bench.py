"""Time a training step by part, with and without ReCo, and the loss, on synthetic images; with
--data-path also the loaders; with --predict only the prediction of a trained run.

    python bench.py                                   # street, on the device of this machine
    python bench.py --dataset cityscapes --steps 20   # ResNet-101, 2 + 2 crops of 512x512
    python bench.py --script train_supervised.py --dataset pascal --backbone resnet50
    accelerate launch --mixed_precision bf16 bench.py --dataset cityscapes --compile
    python bench.py --dataset cityscapes --data-path dataset/cityscapes --num-workers 8
    python bench.py --loss-only                       # the loss at the paper's sizes
    python bench.py --predict RUN IMAGES              # predict.py, and its forward passes

All other options are those of the training script. The weights are random.
"""

import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable
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
from inputs.files import output_file, read_image
from inputs.labels import split_train
from inputs.source import Source
from inputs.transforms import resize_image, to_float
from models import MeanTeacher, new_model
from reco import reco_loss

SCRIPTS = {"train_semi.py": train_semi, "train_supervised.py": train_supervised}
# the parts of a step: functions of the training script, none of which calls another one
PARTS = {
    "to device": ["to_float", "to_device"],
    "augmentation": ["augment", "batch_scale_crop", "mix"],
    "teacher": ["pseudo_label"],
    "student forward": [],
    "ReCo": ["reco_targets", "reco_loss"],
    "backward": [],
    "optimiser + EMA": [],
    "step": [],
}
# what the loss is timed on: name, shape of rep [B, D, h, w], classes
LOSS_SIZES = [
    ("Cityscapes", (4, 256, 128, 128), 19),
    ("Pascal", (20, 256, 81, 81), 21),
    ("SUN RGB-D", (10, 256, 81, 81), 37),
    ("150 classes", (4, 256, 128, 128), 150),
]


class Clock:
    """Seconds by part; waits for the device before it reads the time."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, defaultdict(float)

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def timed(self, part: str, function: Callable) -> Callable:
        """The function; the time it takes is added to the part."""

        def call(*arguments, **options):
            begun = self.now()
            result = function(*arguments, **options)
            self.parts[part] += self.now() - begun
            return result

        return call


class CountOperations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches inside the with block, without views and
    allocations: on a GPU each is one kernel or a few."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += not (operation.is_view or "empty" in str(operation))
        return operation(*args, **(kwargs or {}))


def peak_memory(device: torch.device) -> float:
    """In MB: on a GPU that of tensors since the last reset, on a CPU that of the process so far
    (not a number on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource  # Windows has no such module

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)  # a Mac counts bytes, Linux kB


def random_rectangles(batch: int, size, classes: int) -> torch.Tensor:
    """Label maps of rectangles of random classes, int64 [B, H, W]."""
    coarse = torch.randint(classes, (batch, 1, 8, 8)).float()
    return F.interpolate(coarse, size=tuple(size), mode="nearest")[:, 0].long()


def random_batch(batch_size: int, size, classes: int, device: torch.device) -> list[torch.Tensor]:
    """Images uint8 [B, 3, h, w] and labels uint8 [B, h, w]."""
    images = torch.randint(256, (batch_size, 3, *size), dtype=torch.uint8)
    batch = [images, random_rectangles(batch_size, size, classes).byte()]
    return [x.pin_memory() for x in batch] if device.type == "cuda" else batch


def batch_sizes(args: Namespace) -> list[int]:
    """Images per step and process: labelled and, in train_semi.py, unlabelled."""
    if args.script == "train_supervised.py":
        return [args.batch_size]
    labelled = args.batch_size * (2 if args.label_ratio else 1)
    return [args.labeled_batch_size or labelled, args.batch_size]


def time_steps(args: Namespace, accelerator: Accelerator, steps: int, trace: Path | None) -> list:
    """A row of the table of steps; times are medians in ms of `steps` steps, after three to warm
    up. On a GPU whole steps are then timed again, without a wait after each part. One more step
    counts operations, and another one is written to `trace` as a timeline."""
    device, script = accelerator.device, SCRIPTS[args.script]
    classes = len(DATASETS[args.dataset].source.classes) or 3  # a user's own data: three
    source = Source(args.dataset, [str(i) for i in range(classes)], [(0, 0, 0)] * classes)
    model, _ = new_model(args, source, accelerator)
    optimizer = new_optimizer(args, model)
    options = dict(compiled=args.compile, average_statistics=args.average_statistics)
    teacher = MeanTeacher(model, **options)
    student, optimizer = accelerator.prepare(model, optimizer)
    student.train()
    networks = [student, teacher] if script is train_semi else [student]

    def one_step(step: int, batches: list) -> None:
        rng = start_step(args, optimizer, accelerator, 0, step)
        common = optimizer, accelerator, args, rng, args.label_ratio is not None
        script.train_step(*batches, *networks, *common)

    clock, sizes, times = Clock(device), batch_sizes(args), []
    functions = [(script, f, part) for part in PARTS for f in PARTS[part] if hasattr(script, f)]
    functions += [(student, "forward", "student forward"), (accelerator, "backward", "backward")]
    update = [(optimizer, "step"), (optimizer, "zero_grad"), (teacher, "update")]
    functions += [(owner, name, "optimiser + EMA") for owner, name in update]
    with contextlib.ExitStack() as stack:
        for owner, name, part in functions:
            timed = clock.timed(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        for step in tqdm(range(steps + 3), args.method, leave=False, disable=None):
            if step == 3 and device.type == "cuda":  # until then cuDNN tries its algorithms
                torch.cuda.reset_peak_memory_stats()
            batches = [random_batch(n, args.crop_size, classes, device) for n in sizes]
            clock.parts = defaultdict(float)
            clock.timed("step", one_step)(step, batches)
            times.append(clock.parts)
    memory = peak_memory(device)
    seconds = {part: statistics.median(t[part] for t in times[3:]) for part in PARTS}
    if device.type == "cuda":  # the host now works ahead of the device
        begun = clock.now()
        for step in range(steps):
            one_step(step, batches)
        seconds["step"] = (clock.now() - begun) / steps
    with torch.compiler.set_stance("force_eager"), CountOperations() as operations:
        one_step(steps, batches)
    if trace:
        with torch.profiler.profile() as profile:
            one_step(steps + 1, batches)
        if accelerator.is_main_process:
            profile.export_chrome_trace(str(trace))
    accelerator.free_memory()
    rate = sum(sizes) * accelerator.num_processes / seconds["step"]
    name, times = f"{args.dataset} {args.method}", [1000 * value for value in seconds.values()]
    return [name, *times, rate, memory, operations.number]


def time_loaders(args: Namespace, accelerator: Accelerator, steps: int) -> float:
    """Images per second from the loaders of the training script while nothing else runs, over
    `steps` steps or more. The steps that the processes read ahead do not count."""
    source = load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    ahead, steps = 3 + 2 * args.num_workers, max(steps, 8 * args.num_workers)
    args = Namespace(**{**vars(args), "iterations": ahead + steps})
    split = split_train(source, args)
    loaders = SCRIPTS[args.script].training_loaders(args, source, split, accelerator, 0)
    batches = zip(*loaders, strict=True)
    for _ in range(ahead):
        next(batches)
    begun = time.perf_counter()
    steps = sum(1 for _ in batches)
    rate = steps / (time.perf_counter() - begun)
    return rate * sum(batch_sizes(args)) * accelerator.num_processes


def time_loss(name: str, shape, classes: int, device: torch.device, steps: int) -> list:
    """A row of the table of losses: median ms of the ReCo loss, forward and backward, with its
    default options. `shape` is that of rep, [B, D, h, w]."""
    torch.manual_seed(0)
    batch, _, h, w = shape
    rep = torch.randn(shape, device=device, requires_grad=True)
    label = random_rectangles(batch, (h, w), classes).to(device)
    prob = torch.randn(batch, classes, h, w, device=device).softmax(dim=1)
    valid = torch.rand(batch, h, w, device=device) < 0.9
    clock, times = Clock(device), []
    for _ in range(steps + 2):
        rep.grad, begun = None, clock.now()
        reco_loss(rep, label, prob, valid).backward()
        times.append(clock.now() - begun)
    return [name, "x".join(map(str, shape)), classes, 1000 * statistics.median(times[2:])]


def time_prediction(run: str, folder: str, steps: int) -> None:
    """Print the images per second of predict.py on all images of a folder, and of forward passes
    only, on the first `steps` of them, read before."""
    model = models.load(run).to(Accelerator().device)
    clock = Clock(model.mean.device)
    with tempfile.TemporaryDirectory() as out, torch.no_grad():
        targets = predict.find_images([folder], Path(out))
        images = [read_image(path) for path in list(targets)[:steps]]
        small = [resize_image(image, model.network_size(*image.shape[-2:])) for image in images]
        batches = [to_float(image[None], clock.device) for image in small]
        for _ in range(2):  # the first pass warms up
            begun = clock.now()
            for batch in batches:
                model(batch)
            forward = len(batches) / (clock.now() - begun)
        options = predict.parse_options([run, folder, "--out-dir", out])
        begun = clock.now()
        predict.predict_all(model, targets, options)
        rate = len(targets) / (clock.now() - begun)
    print(f"{len(targets)} images: {rate:.2f} images/s; forward passes only: {forward:.2f}")


def line(cells: Iterable) -> str:
    """A line of a table. Floats get one decimal place."""
    first, *others = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"{first:24s}" + "".join(f"{cell:>17}" for cell in others)


def parse_options() -> tuple[Namespace, list[str]]:
    """The options of this script, and the other words, which are for the training script."""
    parser = new_parser(__doc__, usage="%(prog)s [options] [options of the training script]")
    add = parser.add_argument
    add("--script", choices=list(SCRIPTS), default="train_semi.py", help="whose step is timed")
    add("--steps", type=positive, default=10, help="timed steps, after three to warm up")
    add("--loss-only", action="store_true", help="time only the loss")
    add("--predict", nargs=2, metavar=("RUN", "IMAGES"), help="time only the prediction of images")
    add("--trace", metavar="FILE", help="timeline of a step's operations, for ui.perfetto.dev")
    add("--overwrite", action="store_true", help="replace the file of --trace")
    own, rest = parser.parse_known_args()
    if own.trace:
        own.trace = output_file("--trace", own.trace, own.overwrite)
    return own, rest


def training_options(script: str, words: list[str]) -> Namespace:
    """The training script's options, for random weights and without a tracker."""
    args = SCRIPTS[script].parse_options([*words, "--log-with", "none"])
    random_weights = dict(pretrained=False, backbone_weights=None, init_from=None)
    return Namespace(**{**vars(args), **random_weights, "warmup_iterations": 0})


def main() -> None:
    own, rest = parse_options()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports a missing GPU as an error
    if own.predict:
        return time_prediction(*own.predict, own.steps)
    args = training_options(own.script, rest)
    accelerator = start_accelerator(args)
    device, say = accelerator.device, accelerator.print
    threads = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    say(f"{name}, torch {torch.__version__}, precision {accelerator.mixed_precision}")
    if args.data_path and not own.loss_only:
        rate = time_loaders(args, accelerator, own.steps)
        say(f"loaders of {args.num_workers} processes each: {rate:.1f} images/s")
    if not own.loss_only:
        say("\n" + line(["ms", *PARTS, "images/s", "peak MB", "operations"]))
        both = args.model == "reconet" and not args.reco
        for extra in [[], ["--reco"]] if both else [[]]:
            args = training_options(own.script, [*rest, *extra])
            say(line(time_steps(args, accelerator, own.steps, own.trace)))
    say("\n" + line(["the loss", "rep", "classes", "ms"]))
    for size in LOSS_SIZES:
        say(line(time_loss(*size, device, own.steps)))


if __name__ == "__main__":
    launch(main)
