"""Time a real training step by part, with and without ReCo, and the loss alone, on synthetic images.

    python bench.py                                             # street on whatever is there
    python bench.py --dataset cityscapes --steps 20             # the paper's size: ResNet-101, 2 + 2 crops of 512x512
    python bench.py --script train_supervised.py --dataset pascal --backbone resnet50
    accelerate launch --mixed_precision bf16 bench.py --dataset cityscapes --compile --json bench.json
    python bench.py --loss-only                                 # the ReCo loss at the sizes of the three data sets

Options it does not know itself are those of the training script. Random weights; every other number is that of the run.
"""

import json
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

import data
import processes
import run
import train_semi
import train_supervised
from models import MeanTeacher
from reco import reco_loss

PARTS = [
    "data",
    "augmentation",
    "teacher",
    "student forward",
    "ReCo",
    "backward",
    "optimiser + EMA",
]
CLASSES = {"street": 11, "cityscapes": 19, "pascal": 21, "sun": 37, "folder": 3}
LOSS_SIZES = {
    "cityscapes": (4, 128, 128),
    "pascal": (20, 81, 81),
    "sun": (10, 81, 81),
}  # images, h, w


class Clock:
    """Time since the last mark, once the device has done its work."""

    def __init__(self, device):
        self.device, self.parts = device, defaultdict(float)
        self.restart()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def restart(self) -> None:
        self.parts.clear()
        self.last = self.now()

    def mark(self, part: str) -> None:
        now = self.now()
        self.parts[part] += now - self.last
        self.last = now


def blocks(batch: int, size, classes: int) -> torch.Tensor:
    """Label maps of rectangles of random classes, int64 [B, H, W]."""
    coarse = torch.randint(classes, (batch, 1, 8, 8)).float()
    return torch.nn.functional.interpolate(coarse, size=tuple(size), mode="nearest")[:, 0].long()


def peak_memory(device) -> float:
    """MB: what tensors took on the GPU since the last reset, or, on a CPU, the most the process has taken so far."""
    return (
        torch.cuda.max_memory_allocated(device) / 2**20
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )


def time_steps(args, accelerator, semi: bool, steps: int) -> dict:
    """Median seconds of each part of the step over `steps` steps, after three to warm up."""
    classes, device = CLASSES[args.dataset], accelerator.device
    source = data.Source(args.dataset, [str(i) for i in range(classes)], [], [], [])
    model, _ = run.new_model(args, source)
    model = run.to_device(model, accelerator)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    teacher = MeanTeacher(model, compiled=args.compile)
    student, optimizer = accelerator.prepare(model, optimizer)
    student.train()
    clock, times = Clock(device), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def batch():
        labels = blocks(args.batch_size, args.crop_size, classes)
        images = (
            labels[:, None] * 200 // classes
            + torch.randint(0, 50, (args.batch_size, 3, *args.crop_size))
        ).byte()
        return (
            (images.pin_memory(), labels.byte().pin_memory())
            if device.type == "cuda"
            else (images, labels.byte())
        )

    for step in tqdm(
        range(steps + 3), desc=f"{args.method}, {args.dataset}", unit="step", leave=False
    ):
        batches, rng = [batch(), batch()], run.seed_step(args.seed, step, 0)
        clock.restart()
        if semi:
            train_semi.train_step(
                step,
                *batches,
                student,
                model,
                teacher,
                optimizer,
                accelerator,
                args,
                False,
                rng,
                clock.mark,
            )
        else:
            train_supervised.train_step(
                batches[0], student, optimizer, accelerator, args, rng, clock.mark
            )
        times.append(dict(clock.parts))
    parts = {part: statistics.median(t.get(part, 0.0) for t in times[3:]) for part in PARTS}
    total = statistics.median(sum(t.values()) for t in times[3:])
    images = args.batch_size * (2 if semi else 1) * accelerator.num_processes
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
        "peak memory MB": peak_memory(device),
        "ReCo share": parts["ReCo"] / total,
    }


def time_loss(dataset: str, device, steps: int) -> dict:
    """Median seconds of the ReCo loss, forward and backward, 256 queries and 512 negatives, representation of 256 channels."""
    torch.manual_seed(0)
    (batch, h, w), classes = LOSS_SIZES[dataset], CLASSES[dataset]
    rep = torch.randn(batch, 256, h, w, device=device, requires_grad=True)
    label = blocks(batch, (h, w), classes).to(device)
    prob = torch.randn(batch, classes, h, w, device=device).softmax(dim=1)
    valid, clock, times = torch.rand(batch, h, w, device=device) < 0.9, Clock(device), []
    for _ in range(steps + 2):
        rep.grad = None
        clock.restart()
        reco_loss(rep, label, prob, valid).backward()
        clock.mark("loss")
        times.append(clock.parts["loss"])
    return {
        "dataset": dataset,
        "rep": [batch, 256, h, w],
        "classes": classes,
        "seconds": statistics.median(times[2:]),
    }


def main() -> None:
    parser = run.Parser(description=__doc__, formatter_class=run.Formatter)
    parser.add_argument(
        "--script",
        choices=["train_semi.py", "train_supervised.py"],
        default="train_semi.py",
        help="whose step is timed",
    )
    parser.add_argument(
        "--steps", type=run.positive, default=10, help="timed steps, after three to warm up"
    )
    parser.add_argument(
        "--loss-only",
        action="store_true",
        help="time the loss alone, at the sizes of Cityscapes, Pascal and SUN",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    bench, rest = parser.parse_known_args()
    semi = bench.script == "train_semi.py"
    results = {
        "device": None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": [],
        "loss": [],
    }

    def options(extra: list[str]):
        training = run.training_parser(None, semi)
        training.prog = bench.script
        args = run.parse(training, semi, [*rest, "--no-pretrained", "--log-with", "none", *extra])
        args.warmup_iterations = 0
        return args

    args = options([])
    accelerator = run.start_accelerator(args)
    device, print = accelerator.device, accelerator.print  # the main process speaks
    results["device"] = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{results['device']}, torch {torch.__version__}, precision {accelerator.mixed_precision}{', compiled' if args.compile else ''}"
    )
    if not bench.loss_only:
        print(
            f"\n{'ms':24s}"
            + "".join(f"{part:>16s}" for part in PARTS)
            + f"{'step':>10s}{'images/s':>10s}{'peak MB':>9s}{'ReCo':>7s}"
        )
        for extra in ([], ["--reco"] if args.model == "reconet" and not args.reco else []):
            if extra or not results["steps"]:
                row = time_steps(options(extra), accelerator, semi, bench.steps)
                results["steps"].append(row)
                print(
                    f"{row['dataset'] + ' ' + row['method']:24s}"
                    + "".join(f"{1000 * row['seconds'][part]:16.1f}" for part in PARTS)
                    + f"{1000 * row['step']:10.1f}{row['images per second']:10.1f}{row['peak memory MB']:9.0f}{100 * row['ReCo share']:6.1f}%"
                )
    print(f"\n{'the loss alone':16s}{'rep':>20s}{'classes':>9s}{'ms':>9s}")
    for dataset in LOSS_SIZES:
        row = time_loss(dataset, device, bench.steps)
        results["loss"].append(row)
        print(
            f"{dataset:16s}{'x'.join(map(str, row['rep'])):>20s}{row['classes']:9d}{1000 * row['seconds']:9.1f}"
        )
    if bench.json and accelerator.is_main_process:
        run.write(Path(bench.json), lambda file: file.write(json.dumps(results, indent=1).encode()))


if __name__ == "__main__":
    processes.launch(main)
