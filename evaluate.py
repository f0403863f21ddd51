"""Evaluate a trained run: mIoU, IoU per class, pixel accuracy, boundary IoU, as a table and as JSON.

python evaluate.py runs/street-classmix-reco-20-seed0                        # the run's own validation images
python evaluate.py RUN --split test                                          # street: its 500 test scenes
python evaluate.py RUN --dataset cityscapes --data-path DIR --full-resolution --sliding-window --flip
python evaluate.py --checkpoint published_reco.pth --dataset cityscapes --data-path DIR
accelerate launch --multi_gpu evaluate.py RUN                                # several processes
"""

import math
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import data
import loaders
import processes
import run
from data import IGNORE, UserError, need
from models import upsample


# ------------------------------------------------------------------------------------------------------------- metrics
class Metrics:
    """Counts of a segmentation, summed over images: the confusion matrix and, per class, the overlap of boundary regions (Cheng et
    al. 2021: the pixels of a mask within 2 % of the image diagonal of its contour). Pixels that are not labelled are no part
    of either mask."""

    def __init__(self, num_classes: int, device="cpu"):
        self.num_classes = num_classes
        self.confusion = torch.zeros(
            num_classes, num_classes, dtype=torch.int64, device=device
        )  # [truth, prediction]
        self.boundary = torch.zeros(
            3, num_classes, dtype=torch.int64, device=device
        )  # both, truth's, prediction's

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """prediction, label: [B, H, W] integer maps of class ids; label 255 is not counted."""
        label, prediction, n = label.long(), prediction.long(), self.num_classes
        valid = label != IGNORE
        pair = torch.where(valid, label * n + prediction, n * n)
        self.confusion += count(pair, n * n + 1)[:-1].view(n, n)
        distance = max(1, round(0.02 * math.hypot(*label.shape[-2:])))
        prediction = torch.where(valid, prediction, IGNORE)
        truth_edge, prediction_edge = (
            boundary_region(label, distance) & valid,
            boundary_region(prediction, distance) & valid,
        )
        for row, (classes, where) in enumerate(
            [
                (label, truth_edge & prediction_edge & (label == prediction)),
                (label, truth_edge),
                (prediction, prediction_edge),
            ]
        ):
            self.boundary[row] += count(torch.where(where, classes, n), n + 1)[:-1]

    def results(self) -> dict:
        """Plain numbers: miou, accuracy, boundary_iou, and lists per class (None for a class that occurs neither in the truth nor in
        the prediction; such a class is not part of the means)."""
        both = self.confusion.diag()
        union = self.confusion.sum(0) + self.confusion.sum(1) - both
        edge_union = self.boundary[1] + self.boundary[2] - self.boundary[0]

        def ratios(top: Tensor, bottom: Tensor) -> list:
            return [a / b if b else None for a, b in zip(top.tolist(), bottom.tolist())]

        def mean(values: list) -> float:
            values = [v for v in values if v is not None]
            return sum(values) / len(values) if values else 0.0

        iou, edges = ratios(both, union), ratios(self.boundary[0], edge_union)
        return {
            "miou": mean(iou),
            "accuracy": both.sum().item() / max(1, self.confusion.sum().item()),
            "boundary_iou": mean(edges),
            "iou": iou,
            "boundary_iou_per_class": edges,
        }


def count(index: Tensor, length: int) -> Tensor:
    return torch.bincount(index.flatten(), minlength=length)


def boundary_region(label: Tensor, distance: int) -> Tensor:
    """[B, H, W] bool: the pixels within `distance` (Chebyshev) of another class or of the image's edge. A pixel lies inside
    when the largest and the smallest label around it agree, so two poolings serve all classes at once."""
    x = F.pad(label[:, None].float(), [distance] * 4, value=-1.0)
    size = 2 * distance + 1

    def pool(x: Tensor) -> Tensor:  # separable
        return F.max_pool2d(F.max_pool2d(x, (size, 1), stride=1), (1, size), stride=1)

    return (pool(x) != -pool(-x))[:, 0]


# ---------------------------------------------------------------------------------------------------------- prediction
@torch.no_grad()
def predict_probabilities(
    model: nn.Module,
    images: Tensor,
    scales=(1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Class probabilities [B, C, H, W] (float32) of images [B, 3, H, W] in [0, 1]: the mean over the scales and, with `flip`, the mirrored
    images; with `window`, over tiles of that size that overlap by a third."""
    size, total = images.shape[-2:], 0.0
    for scale in scales:
        x = (
            images
            if scale == 1
            else F.interpolate(
                images,
                size=[max(1, round(n * scale)) for n in size],
                mode="bilinear",
                antialias=True,
            )
        )
        for mirrored in (False, True) if flip else (False,):
            x_in = data.normalise(x.flip(-1) if mirrored else x)
            prob = (
                tiled(model, x_in, window, size)
                if window
                else upsample(model(x_in)[0].float(), size).softmax(dim=1)
            )
            total = total + (prob.flip(-1) if mirrored else prob)
    return total / (len(scales) * (2 if flip else 1))


def tiled(model: nn.Module, x: Tensor, window: tuple[int, int], size) -> Tensor:
    """Probabilities of a large image from overlapping tiles, averaged where they overlap, brought to `size`."""
    height, width = x.shape[-2:]
    h, w = min(window[0], height), min(window[1], width)
    total, times = None, x.new_zeros(1, 1, height, width)
    for top in tile_starts(height, h):
        for left in tile_starts(width, w):
            part = (..., slice(top, top + h), slice(left, left + w))
            prob = upsample(model(x[part])[0].float(), (h, w)).softmax(dim=1)
            total = (
                x.new_zeros(len(x), prob.shape[1], height, width, dtype=torch.float32)
                if total is None
                else total
            )
            total[part] += prob
            times[part] += 1
    total /= times
    return total if (height, width) == tuple(size) else upsample(total, size)


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin so that they cover the length and overlap by at least a third."""
    number = 1 + math.ceil((length - tile) / max(1, tile - math.ceil(tile / 3)))
    return [round(i * (length - tile) / (number - 1)) for i in range(number)] if number > 1 else [0]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: loaders.Loader,
    num_classes: int,
    accelerator: Accelerator,
    progress: str = "",
    **prediction,
) -> tuple[dict, Tensor]:
    """Results (see Metrics) and confusion matrix of a model in eval mode on this process's loader, summed over the processes. The
    model must be the bare one, not wrapped for distributed training: processes may hold different numbers of batches."""
    training = model.training
    model.eval()
    metrics = Metrics(num_classes, accelerator.device)
    silent = (
        None if progress and accelerator.is_main_process else True
    )  # None: shown on a terminal alone
    for images, label, _ in tqdm(loader, desc=progress, unit="batch", leave=False, disable=silent):
        with accelerator.autocast():
            prob = predict_probabilities(
                model, data.to_float(images, accelerator.device), **prediction
            )
        metrics.update(prob.argmax(dim=1), label.to(accelerator.device, non_blocking=True))
    model.train(training)
    metrics.confusion, metrics.boundary = (
        accelerator.reduce(metrics.confusion),
        accelerator.reduce(metrics.boundary),
    )
    return metrics.results(), metrics.confusion


def table(results: dict, classes: list[str]) -> str:
    """The results as text, one line per class."""
    width = max(map(len, classes + ["boundary IoU"]))
    lines = [f"{'class':<{width}}    IoU   boundary IoU"]
    for name, iou, edge in zip(classes, results["iou"], results["boundary_iou_per_class"]):
        lines.append(
            f"{name:<{width}}  "
            + "   ".join("     -" if v is None else f"{100 * v:6.2f}" for v in (iou, edge))
        )
    lines.append(
        f"{'mean':<{width}}  {100 * results['miou']:6.2f}   {100 * results['boundary_iou']:6.2f}   pixel accuracy {100 * results['accuracy']:.2f}"
    )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- script
def main() -> None:
    parser = run.Parser(description=__doc__, formatter_class=run.Formatter)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="a published ReCo checkpoint (.pth) instead of a run"
    )
    parser.add_argument(
        "--dataset",
        choices=list(data.SOURCES),
        help="another data set of the same classes (default: the run's); what a checkpoint was trained on",
    )
    parser.add_argument("--data-path", metavar="DIR", help="where it lies (default: the run's)")
    parser.add_argument(
        "--split",
        choices=["val", "test", "train"],
        default="val",
        help="which images (test: street has one, a folder may)",
    )
    parser.add_argument(
        "--batch-size", type=run.positive, default=4, help="images at once where all have one size"
    )
    parser.add_argument(
        "--num-workers",
        type=run.natural,
        default=min(2, os.cpu_count() or 1),
        help="processes that read images",
    )
    parser.add_argument(
        "--full-resolution",
        action="store_true",
        help="the network sees the images at the size of their files and is scored there (Cityscapes: 2048x1024)",
    )
    parser.add_argument(
        "--sliding-window",
        action="store_true",
        help="predict on tiles of the training crop's size that overlap by a third",
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    parser.add_argument(
        "--scales",
        type=run.positive_float,
        nargs="+",
        default=[1.0],
        metavar="S",
        help="average over these scales",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="where the results go (default: evaluation-SPLIT.json in the run's folder, or here for a checkpoint)",
    )
    args = parser.parse_args()
    path = Path(args.json or Path(args.run or ".") / f"evaluation-{args.split}.json")
    need(
        not args.json or (path.parent.is_dir() and os.access(path.parent, os.W_OK)),
        f"--json {path}: {path.parent} is no folder that can be written to",
    )

    if args.num_workers:
        processes.start_server()
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(timeout=processes.COLLECTIVE_LIMIT)]
    )
    model, config = run.load_trained(args, accelerator.device)
    saved = config["arguments"]
    dataset = args.dataset or saved["dataset"]
    source = data.load_source(
        dataset,
        args.data_path or (saved.get("data_path") if dataset == saved["dataset"] else None),
        saved.get("max_size"),
    )
    theirs, ours = [c.lower() for c in source.classes], [c.lower() for c in config["classes"]]
    if theirs != ours:
        where = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours))
        )
        raise UserError(
            f"--dataset {dataset}: has {len(theirs)} classes, the model {len(ours)}; they differ from class {where} on "
            f"({' / '.join(c[where] if where < len(c) else 'none' for c in (source.classes, config['classes']))}) and must be the same"
        )
    samples = [s for s in getattr(source, args.split) if s.label]
    need(samples, f"--split {args.split}: {dataset} has no labelled images there")
    loader = loaders.evaluation_loader(
        loaders.EvaluationImages(source, samples, args.full_resolution),
        args.batch_size,
        args.num_workers,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device.type == "cuda",
    )
    window = tuple(config["crop_size"]) if args.sliding_window else None
    processes.speak_for_itself()
    results, confusion = evaluate(
        model,
        loader,
        len(source.classes),
        accelerator,
        progress="evaluating",
        scales=args.scales,
        flip=args.flip,
        window=window,
    )
    if accelerator.is_main_process:
        print(f"{len(samples)} {args.split} images of {dataset}")
        print(table(results, source.classes))
        run.write_json(
            path,
            {
                **results,
                "classes": source.classes,
                "confusion": confusion.tolist(),
                "images": len(samples),
                "processes": accelerator.num_processes,
                "options": vars(args),
            },
        )
        print(f"written to {path}")
    accelerator.end_training()


if __name__ == "__main__":
    processes.launch(main)
