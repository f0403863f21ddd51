"""Time a training step by part, with and without ReCo, and the loss alone, on synthetic images, and
with --data-path the run's loaders on its own.

    python bench.py                                   # street on whatever is there
    python bench.py --dataset cityscapes --steps 20   # ResNet-101, 2 + 2 crops of 512x512
    python bench.py --script train_supervised.py --dataset pascal --backbone resnet50
    accelerate launch --mixed_precision bf16 bench.py --dataset cityscapes --compile
    python bench.py --dataset cityscapes --data-path dataset/cityscapes --num-workers 8
    python bench.py --loss-only                       # the loss alone, and how its cost grows

Options it does not know itself are those of the training script. Random weights; every other number
is that of the run.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from tqdm import tqdm

import train_semi
import train_supervised
from data import DATASETS, load_source
from engine import setup
from engine.options import new_parser, positive
from engine.processes import launch
from inputs.files import write, write_json
from inputs.source import Source
from models import MeanTeacher
from reco import reco_loss

try:
    import resource
except ImportError:  # Windows
    resource = None

PARTS = [
    "data",
    "augmentation",
    "teacher",
    "student forward",
    "ReCo",
    "backward",
    "optimiser + EMA",
]
SCRIPTS = {"train_semi.py": train_semi, "train_supervised.py": train_supervised}

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


class Clock:
    """Time since the last mark, once the device has done its work."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, defaultdict(float)
        self.restart()

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def restart(self) -> None:
        self.parts.clear()
        self.last = self.now()

    def mark(self, part: str) -> None:
        now = self.now()
        self.parts[part] += now - self.last
        self.last = now


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


def peak_memory(device: torch.device) -> float:
    """MB: what tensors took on the GPU since the last reset, or, on a CPU, the most the process
    has taken so far (not a number on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not resource:
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)  # a Mac counts bytes, Linux kB


def matrix_rate(accelerator) -> float:
    """FLOP/s of a large matrix product on the device in the precision of the run, the best of 50:
    what a network can hope for at most."""
    precisions = {"bf16": torch.bfloat16, "fp16": torch.float16}
    size = 8192 if accelerator.device.type == "cuda" else 1024
    dtype = precisions.get(accelerator.mixed_precision, torch.float32)
    matrix = torch.randn(size, size, device=accelerator.device).to(dtype)
    clock, times = Clock(accelerator.device), []
    for _ in range(50):
        clock.restart()
        matrix @ matrix
        clock.mark("product")
        times.append(clock.parts["product"])
    return 2 * size**3 / min(times)


def convolution_backward(
    grad_out, image, weight, bias, stride, padding, dilation, *rest, **_
) -> int:
    """Operations of a convolution's gradient, from the shapes: those of the forward pass for the
    image and for the weight, each where it is asked for. The formula of PyTorch 2.14 counts a
    depthwise weight gradient as if every channel met every other (pytorch/pytorch#183405)."""
    transposed, _padding, _groups, (of_image, of_weight, _bias) = rest
    return (of_image + of_weight) * conv_flop_count(image, weight, grad_out, transposed)


def count_operations() -> FlopCounterMode:
    """Counts, while it is entered, the operations of convolutions and matrix products."""
    formulas = {torch.ops.aten.convolution_backward: convolution_backward}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def batch_sizes(args) -> list[int]:
    """Images of a step of the training script: labelled and, in train_semi.py, unlabelled."""
    if args.script == "train_semi.py":
        return [train_semi.labelled_batch(args), args.batch_size]
    return [args.batch_size]


# ------------------------------------------------------------------------------------- the step
def time_steps(args, accelerator, steps: int, trace: str | None) -> dict:
    """Median seconds of each part of the step over `steps` steps, after three to warm up, and of
    the whole step: on a GPU measured again, without the waits between the parts.

    Then one step more to count the operations of convolutions and matrix products, forward and
    backward: their share of `matrix_rate` is how well the device is used. And one for a timeline
    of every operation in the file `trace`."""
    classes, device = len(DATASETS[args.dataset].source.classes) or 3, accelerator.device
    names = [str(i) for i in range(classes)]
    source = Source(args.dataset, names, [(i, i, i) for i in range(classes)], [], [])
    model, _ = setup.new_model(args, source, accelerator)
    optimizer = setup.new_optimizer(args, model)
    teacher = MeanTeacher(model, compiled=args.compile)
    student, optimizer = accelerator.prepare(model, optimizer)
    student.train()
    clock, times = Clock(device), []

    def one_step(step: int, batches: list, mark=clock.mark) -> None:
        common = dict(rng=setup.seed_step(args.seed, step, 0), mark=mark)
        if args.script == "train_semi.py":
            parts = student, teacher, optimizer, accelerator, args
            train_semi.train_step(*batches, *parts, **common)
        else:
            train_supervised.train_step(*batches, student, optimizer, accelerator, args, **common)

    progress = tqdm(range(steps + 3), f"{args.method}, {args.dataset}", unit="step", leave=False)
    for step in progress:
        if step == 3 and device.type == "cuda":  # before, cuDNN tries its algorithms
            torch.cuda.reset_peak_memory_stats(device)
        batches = [random_batch(n, args.crop_size, classes, device) for n in batch_sizes(args)]
        clock.restart()
        one_step(step, batches)
        times.append(dict(clock.parts))
    timed, memory = times[3:], peak_memory(device)
    total = statistics.median(sum(t.values()) for t in timed)
    if device.type == "cuda":  # where nobody waits for the parts, the host works ahead
        begun = clock.now()
        for step in range(steps):
            one_step(step, batches, mark=lambda part: None)
        total = (clock.now() - begun) / steps
    # not compiled: the formulas know PyTorch's own operations; the counter's hooks would warn
    eager = torch.compiler.set_stance("force_eager")
    with warnings.catch_warnings(action="ignore"), eager, count_operations() as counter:
        one_step(steps + 3, batches)
    if trace:
        with torch.profiler.profile() as profile:
            one_step(steps + 4, batches)
        if accelerator.is_main_process:
            write_trace(profile, Path(trace))
    operations, rate = counter.get_total_flops(), matrix_rate(accelerator)
    parts = {part: statistics.median(t.get(part, 0.0) for t in timed) for part in PARTS}
    images = sum(batch_sizes(args)) * accelerator.num_processes
    accelerator.free_memory()
    return {
        "method": args.method,
        "dataset": args.dataset,
        "backbone": args.backbone,
        "images": images,
        "crop": args.crop_size,
        "seconds": parts,
        "step": total,
        "images per second": images / total,
        "peak memory MB": memory,
        "GFLOP": operations / 1e9,
        "matrix GFLOP/s": rate / 1e9,
        "share of matrix rate": operations / total / rate,
        "ReCo share": parts["ReCo"] / sum(parts.values()),
    }


def write_trace(profile: torch.profiler.profile, path: Path) -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:  # the profiler writes to a name alone
        profile.export_chrome_trace(file.name)
        content = Path(file.name).read_bytes()
    write(path, lambda file: file.write(content))


# ------------------------------------------------------------------------------------ the images
def time_loaders(args, accelerator, steps: int) -> dict:
    """Images per second that the loaders of the training script deliver while nothing else runs,
    over `steps` steps or more, after those that the processes read ahead."""
    source = load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    labels = args.num_labeled, args.label_ratio, args.labeled_list
    division = divide(source, *labels, args.seed, quiet=True)
    ahead = 3 + 2 * args.num_workers
    steps = max(steps, 8 * args.num_workers)
    args = argparse.Namespace(**vars(args))
    args.iterations, args.partial = ahead + steps, division.partial
    loaders = SCRIPTS[args.script].training_loaders(args, source, division, accelerator, 0)
    batches = zip(*loaders, strict=True)
    for _ in tqdm(range(ahead), "loaders, reading ahead", unit="step", leave=False):
        next(batches)
    begun = time.perf_counter()
    for _ in tqdm(batches, "loaders", total=steps, unit="step", leave=False):
        pass
    images = sum(batch_sizes(args)) * accelerator.num_processes * steps
    return {
        "num workers": args.num_workers,
        "cache": bool(args.cache_dir),
        "images per second": images / (time.perf_counter() - begun),
    }


# ------------------------------------------------------------------------------- the loss alone
def loss_inputs(shape, classes: int, device) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    batch, _, h, w = shape
    rep = torch.randn(shape, device=device, requires_grad=True)
    label = random_rectangles(batch, (h, w), classes).to(device)
    prob = torch.randn(batch, classes, h, w, device=device).softmax(dim=1)
    return rep, label, prob, torch.rand(batch, h, w, device=device) < 0.9


def time_loss(name: str, shape, classes: int, device, steps: int) -> dict:
    """Median seconds of the ReCo loss, forward and backward, with 256 queries and 512 negatives,
    and the memory that it takes beside its inputs and their gradient."""
    rep, label, prob, valid = loss_inputs(shape, classes, device)
    clock, times = Clock(device), []
    for _ in range(steps + 2):
        rep.grad = None
        clock.restart()
        reco_loss(rep, label, prob, valid).backward()
        clock.mark("loss")
        times.append(clock.parts["loss"])
    return {
        "name": name,
        "rep": list(shape),
        "classes": classes,
        "seconds": statistics.median(times[2:]),
        "rep MB": rep.numel() * rep.element_size() / 2**20,
        "extra MB": extra_memory(rep, label, prob, valid),
        "exchanged MB": exchanged_bytes(rep, label, prob, valid) / 2**20,
    }


def extra_memory(rep, label, prob, valid) -> float:
    """MB that loss and gradient take at most at a time, beyond inputs and the gradient of rep.

    The allocations of one call as the profiler saw them, in order; on a GPU and on a CPU alike."""
    rep.grad = None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        reco_loss(rep, label, prob, valid).backward()
    taken = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            taken += event.nbytes()
            most = max(most, taken)
    return (most - rep.numel() * rep.element_size()) / 2**20


def exchanged_bytes(rep, label, prob, valid) -> int:
    """Bytes that a process hands to the collectives of torch.distributed for one loss, counted as
    they are called; in one process as the first of two would call them."""
    sent, several = [], dist.is_initialized() and dist.get_world_size() > 1

    def counted(collective):
        def call(tensor, **options):
            sent.append(tensor.numel() * tensor.element_size())
            if several:
                collective(tensor, **options)

        return call

    names = ("all_reduce", "broadcast")
    changed = {name: counted(getattr(dist, name)) for name in names}
    if not several:
        changed |= dict(is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: 0)
    with mock.patch.multiple(dist, **changed), torch.no_grad():
        reco_loss(rep, label, prob, valid)
    return sum(sent)


# ------------------------------------------------------------------------------------ the script
def print_steps(row: dict) -> None:
    parts = "".join(f"{1000 * row['seconds'][part]:16.1f}" for part in PARTS)
    print(
        f"{row['dataset'] + ' ' + row['method']:24s}{parts}{1000 * row['step']:10.1f}"
        f"{row['images per second']:10.1f}{row['peak memory MB']:9.0f}"
        f"{100 * row['ReCo share']:6.1f}%{row['GFLOP']:9.1f}"
        f"{100 * row['share of matrix rate']:6.1f}%",
        flush=True,
    )


def print_loss(row: dict) -> None:
    shape = "x".join(map(str, row["rep"]))
    print(
        f"{row['name']:24s}{shape:>20s}{row['classes']:9d}{1000 * row['seconds']:9.1f}"
        f"{row['rep MB']:9.1f}{row['extra MB']:10.1f}{row['exchanged MB']:14.1f}",
        flush=True,
    )


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest, which is the training script's."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--script", choices=list(SCRIPTS), default="train_semi.py", help="whose step is timed")
    add("--steps", type=positive, default=10, help="timed steps, after three to warm up")
    add(
        "--loss-only",
        action="store_true",
        help="time the loss alone: at the sizes of the paper's data sets, and with more classes, "
        "pixels and channels",
    )
    add("--json", metavar="FILE", help="write the figures there too")
    add(
        "--trace",
        metavar="FILE",
        help="write a timeline of every operation of one step there, for ui.perfetto.dev",
    )
    return parser.parse_known_args()


def main() -> None:
    own, rest = parse_options()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # without the profiler's own lines
    rest += ["--log-with", "none"]

    def training_options(*extra: str) -> argparse.Namespace:
        args = SCRIPTS[own.script].parse_options([*rest, *extra])
        args.warmup_iterations, args.partial = 0, args.label_ratio is not None
        args.pretrained, args.backbone_weights, args.init_from = False, None, None
        return args

    args = training_options()
    accelerator = setup.start_accelerator(args)
    device, main_process = accelerator.device, accelerator.is_main_process
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    results = {"device": name, "torch": torch.__version__, "steps": [], "loss": [], "loaders": []}
    accelerator.print(
        f"{name}, torch {torch.__version__}, precision {accelerator.mixed_precision}"
        f"{', compiled' if args.compile else ''}"
    )
    if args.data_path and not own.loss_only:
        results["loaders"].append(row := time_loaders(args, accelerator, own.steps))
        accelerator.print(
            f"loaders of {args.num_workers} processes each: {row['images per second']:.1f} images/s"
        )
    if not own.loss_only:
        columns = "".join(f"{part:>16s}" for part in PARTS)
        head = f"{'ms':24s}{columns}{'step':>10s}{'images/s':>10s}{'peak MB':>9s}{'ReCo':>7s}"
        accelerator.print(f"\n{head}{'GFLOP':>9s}{'use':>7s}")
        both = args.model == "reconet" and not args.reco
        for extra in [[], ["--reco"]] if both else [[]]:
            trace = None if both and not extra else own.trace  # of the last one
            row = time_steps(training_options(*extra), accelerator, own.steps, trace)
            results["steps"].append(row)
            if main_process:
                print_steps(row)
    accelerator.print(
        f"\n{'the loss alone':24s}{'rep':>20s}{'classes':>9s}{'ms':>9s}{'rep MB':>9s}"
        f"{'extra MB':>10s}{'exchanged MB':>14s}"
    )
    for size in LOSS_SIZES + (GROWTH_SIZES if own.loss_only else []):
        row = time_loss(*size, device, own.steps)
        results["loss"].append(row)
        if main_process:
            print_loss(row)
    if own.json and main_process:
        write_json(own.json, results)


if __name__ == "__main__":
    launch(main)
