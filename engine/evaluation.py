"""Predict images of any size, and measure how good the predictions are.

Prediction averages over scales, mirrored images and windows, and cuts large images into tiles. A
model is anything that maps images [B, 3, H, W] in 0 .. 1 to (logits, ...) at some stride.
Metrics: mIoU, pixel accuracy and boundary IoU over all images of a loader.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from inputs.files import IGNORE
from inputs.transforms import cpu_for_mps, resize_image, to_device, to_float, upsample


# ------------------------------------------------------------------------------------ prediction
@torch.no_grad()
def predict_probabilities(
    model: nn.Module,
    images: Tensor,
    scales=(1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Class probabilities [B, C, H, W] (float32) of images [B, 3, H, W] in 0 .. 1, averaged over
    the scales and, with `flip`, the mirrored images; with `window` also over tiles of that size
    (height, width) that overlap by a third."""
    height, width = images.shape[-2:]
    total = 0.0
    for scale in scales:
        scaled = images
        if scale != 1:
            # a backbone halves the sides five times, see Segmenter.network_size
            size = [max(min(32, side), round(side * scale)) for side in (height, width)]
            scaled = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        total = total + windowed(model, scaled, window, (height, width))
        if flip:
            total = total + windowed(model, scaled.flip(-1), window, (height, width)).flip(-1)
    return total / (len(scales) * (2 if flip else 1))


def windowed(model: nn.Module, x: Tensor, window: tuple[int, int] | None, size) -> Tensor:
    """Probabilities of images at `size`; with `window`, the average of overlapping tiles."""
    if not window:
        return upsample(model(x)[0].float(), size).softmax(dim=1)
    height, width = x.shape[-2:]
    h, w = min(window[0], height), min(window[1], width)
    total, times = None, x.new_zeros(1, 1, height, width)
    for top, left in itertools.product(tile_starts(height, h), tile_starts(width, w)):
        tile = (..., slice(top, top + h), slice(left, left + w))
        prob = upsample(model(x[tile])[0].float(), (h, w)).softmax(dim=1)
        if total is None:
            total = x.new_zeros(len(x), prob.shape[1], height, width, dtype=torch.float32)
        total[tile] += prob
        times[tile] += 1
    total /= times
    return total if (height, width) == tuple(size) else upsample(total, size)


def tile_starts(length: int, tile: int) -> list[int]:
    """The starts of tiles that cover the length and overlap by at least a third."""
    if length <= tile:
        return [0]
    number = 1 + math.ceil((length - tile) / max(1, tile - math.ceil(tile / 3)))
    return [round(i * (length - tile) / (number - 1)) for i in range(number)]


@torch.no_grad()
def predict_images(
    model: nn.Module,
    images: Tensor,
    size: tuple[int, int],
    tile: int = 1024,
    device: torch.device | str = "cpu",
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Class uint8 [B, H, W] and its probability float32 [B, H, W] of every pixel of images uint8
    [B, 3, H, W].

    The network sees them at `size`, in overlapping tiles if that is larger than a tile. The
    probabilities are resized to H and W in strips, so the memory depends on the tile, hardly on the
    image. `options`: those of predict_probabilities."""
    shape = (len(images), *images.shape[-2:])
    label, confidence = np.empty(shape, np.uint8), np.empty(shape, np.float32)
    for rows, columns, prob in predict_strips(model, images, size, tile, device, **options):
        best, index = prob.max(dim=1)
        label[:, rows, columns] = index.byte().cpu().numpy()
        confidence[:, rows, columns] = best.cpu().numpy()
    return label, confidence


@torch.no_grad()
def predict_strips(
    model: nn.Module,
    images: Tensor,
    size: tuple[int, int],
    tile: int,
    device: torch.device | str,
    **options,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, columns, probabilities [B, C, rows, columns]) that together cover images uint8
    [B, 3, H, W]."""
    height, width = images.shape[-2:]
    scale = size[0] / height, size[1] / width
    small = torch.stack([resize_image(image, size) for image in images])
    tiles = itertools.product(split(size[0], height, tile), split(size[1], width, tile))
    for (top, bottom, y), (left, right, x) in tiles:
        if not y or not x:  # an image much smaller than `size` may have no pixel here
            continue
        crop = to_float(small[..., top:bottom, left:right], device)
        prob = predict_probabilities(model, crop, **options)  # [B, C, h, w]
        prob = prob.to(cpu_for_mps(prob.device))
        # on a CPU a strip fits into the cache; on a GPU few large operations are faster
        values = 2**20 if prob.device.type == "cpu" else 2**26
        step = max(1, values // (prob.shape[0] * prob.shape[1] * len(x)))
        for strip in (y[i : i + step] for i in range(0, len(y), step)):
            part = resample(prob, (strip, x), scale, (top, left))
            yield slice(strip.start, strip.stop), slice(x.start, x.stop), part


def split(length: int, original: int, tile: int) -> list[tuple[int, int, range]]:
    """Tiles that cover a length: (start, stop, pixels of the original length that it provides).
    Neighbours meet in the middle of their overlap, so a pixel has at least a sixth of a tile around
    it."""
    tile = min(tile, length)
    starts = tile_starts(length, tile)
    middles = [(left + tile + right) / 2 for left, right in itertools.pairwise(starts)]
    # the first pixel whose centre is beyond each border
    edges = [math.ceil(at * original / length - 0.5) for at in (0, *middles, length)]
    pixels = [range(*pair) for pair in itertools.pairwise(edges)]
    return [(start, start + tile, taken) for start, taken in zip(starts, pixels, strict=True)]


def resample(
    prob: Tensor,
    pixels: tuple[range, range],
    scale: tuple[float, float],
    start: tuple[int, int],
) -> Tensor:
    """Bilinear values of prob [B, C, h, w] at the centres of `pixels` (rows, columns) of an image
    of another size. `scale`: size (y, x) of such a pixel in pixels of prob; `start`: (top, left) of
    prob, in its own pixels."""
    if scale == (1, 1):
        y, x = (slice(p.start - s, p.stop - s) for p, s in zip(pixels, start, strict=True))
        return prob[..., y, x]
    axes = []
    for taken, factor, first, length in zip(pixels, scale, start, prob.shape[-2:], strict=True):
        centres = torch.arange(taken.start, taken.stop, dtype=torch.float64) + 0.5
        axes.append((2 * (centres * factor - first) / length - 1).float())  # -1 .. 1 over prob
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([columns, rows], dim=-1).to(prob.device)  # [rows, columns, (x, y)]
    grid = grid.expand(len(prob), -1, -1, -1)
    return F.grid_sample(prob, grid, padding_mode="border", align_corners=False)


# ------------------------------------------------------------------------------------- metrics
class Metrics:
    """Counts of a segmentation, summed over images: the confusion matrix and, per class, the
    overlap of boundary regions (Cheng et al. 2021: the pixels of a mask within 2 % of the image
    diagonal of its contour). Unlabelled pixels are left out of both masks."""

    def __init__(self, num_classes: int, device="cpu"):
        self.num_classes = num_classes
        # [truth, prediction]
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        # pixels in both boundary regions, in that of the truth, in that of the prediction
        self.boundary = torch.zeros(3, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """prediction, label: [B, H, W] integer maps of class ids; label 255 is not counted."""
        label, prediction, n = label.long(), prediction.long(), self.num_classes
        valid = label != IGNORE
        pair = torch.where(valid, label * n + prediction, n * n)
        self.confusion += count(pair, n * n + 1)[:-1].view(n, n)

        distance = max(1, round(0.02 * math.hypot(*label.shape[-2:])))
        prediction = torch.where(valid, prediction, IGNORE)
        truth_edge = boundary_region(label, distance) & valid
        prediction_edge = boundary_region(prediction, distance) & valid
        both = truth_edge & prediction_edge & (label == prediction)
        self.boundary[0] += count(torch.where(both, label, n), n + 1)[:-1]
        self.boundary[1] += count(torch.where(truth_edge, label, n), n + 1)[:-1]
        self.boundary[2] += count(torch.where(prediction_edge, prediction, n), n + 1)[:-1]

    def results(self) -> dict:
        """miou, accuracy, boundary_iou, and lists per class. A class that is neither in the truth
        nor in the prediction is None; the means leave it out."""
        both = self.confusion.diag()
        union = self.confusion.sum(0) + self.confusion.sum(1) - both
        iou = ratios(both, union)
        edge_union = self.boundary[1] + self.boundary[2] - self.boundary[0]
        boundary_iou = ratios(self.boundary[0], edge_union)
        return {
            "miou": mean(iou),
            "accuracy": both.sum().item() / max(1, self.confusion.sum().item()),
            "boundary_iou": mean(boundary_iou),
            "iou": iou,
            "boundary_iou_per_class": boundary_iou,
        }


def ratios(top: Tensor, bottom: Tensor) -> list[float | None]:
    return [a / b if b else None for a, b in zip(top.tolist(), bottom.tolist(), strict=True)]


def mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def count(index: Tensor, length: int) -> Tensor:
    return torch.bincount(index.flatten(), minlength=length)


def boundary_region(label: Tensor, distance: int) -> Tensor:
    """[B, H, W] bool: the pixels within `distance` (Chebyshev) of another class or of the image's
    edge: those for which the largest and the smallest label around them differ."""
    x = F.pad(label[:, None].float(), [distance] * 4, value=-1.0)
    size = 2 * distance + 1

    def pool(x: Tensor) -> Tensor:  # separable
        return F.max_pool2d(F.max_pool2d(x, (size, 1), stride=1), (1, size), stride=1)

    return (pool(x) != -pool(-x))[:, 0]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader,
    num_classes: int,
    accelerator: Accelerator,
    progress: str = "",
    **prediction,
) -> tuple[dict, Tensor]:
    """Results (see Metrics) and confusion matrix of a model in eval mode, summed over the ranks,
    each with its own loader. `prediction`: options of predict_probabilities. The model must not be
    wrapped for distributed training, since ranks may have different numbers of batches."""
    training = model.training
    model.eval()
    # bincount takes seconds with mps, or fails (ultralytics/ultralytics 26239)
    device = cpu_for_mps(accelerator.device)
    metrics = Metrics(num_classes, device)
    # None: only on a terminal
    silent = None if progress and accelerator.is_main_process else True
    bar = tqdm(loader, desc=progress, unit="batch", leave=False, disable=silent)
    for images, label, sizes in bar:
        with accelerator.autocast():
            images = to_float(images, accelerator.device)
            prob = predict_probabilities(model, images, **prediction)
        predicted, label = prob.argmax(dim=1).to(device), to_device(label, device)
        for height, width in sizes.unique(dim=0).tolist():  # a boundary's width is the image's own
            same = (sizes == torch.tensor([height, width])).all(dim=1).nonzero()[:, 0].tolist()
            metrics.update(predicted[same, :height, :width], label[same, :height, :width])
    model.train(training)
    metrics.confusion = accelerator.reduce(metrics.confusion)
    metrics.boundary = accelerator.reduce(metrics.boundary)
    return metrics.results(), metrics.confusion


def table(results: dict, classes: list[str]) -> str:
    """The results as text: a line per class and one with the means."""

    def percent(value: float | None) -> str:
        return "     -" if value is None else f"{100 * value:6.2f}"

    width = max(map(len, [*classes, "boundary IoU"]))
    lines = [f"{'class':<{width}}    IoU   boundary IoU"]
    columns = zip(classes, results["iou"], results["boundary_iou_per_class"], strict=True)
    lines += [f"{name:<{width}}  {percent(iou)}   {percent(edge)}" for name, iou, edge in columns]
    lines.append(
        f"{'mIoU':<{width}}  {percent(results['miou'])}   {percent(results['boundary_iou'])}"
        f"   pixel accuracy {100 * results['accuracy']:.2f}"
    )
    return "\n".join(lines)
