"""How good a segmentation is: mIoU, pixel accuracy and boundary IoU, on every image of a loader."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from devices import cpu_for_mps, to_device
from mixing import IGNORE
from prediction import predict_probabilities
from transforms import to_float


class Metrics:
    """Counts of a segmentation, summed over images: the confusion matrix and, per class, the
    overlap of boundary regions (Cheng et al. 2021: the pixels of a mask within 2 % of the image
    diagonal of its contour). Pixels that are not labelled are no part of either mask."""

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
        """Plain numbers: miou, accuracy, boundary_iou, and lists per class (None for a class that
        occurs neither in the truth nor in the prediction; it is not part of the means)."""
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
    edge. A pixel lies inside when the largest and the smallest label around it agree, so two
    poolings serve all classes at once."""
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
    """Results (see Metrics) and confusion matrix of a model in eval mode on this process's
    loader, summed over the processes. `prediction`: options of predict_probabilities. The model
    must be the bare one, not wrapped for distributed training: processes may hold different
    numbers of batches."""
    training = model.training
    model.eval()
    # bincount takes seconds with mps, or fails (ultralytics/ultralytics 26239)
    device = cpu_for_mps(accelerator.device)
    metrics = Metrics(num_classes, device)
    # None: shown on a terminal alone
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
    """The results as text, one line per class and one of the means."""

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
