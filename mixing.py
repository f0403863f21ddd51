"""CutOut, CutMix and ClassMix: three ways to mix a pseudo-labelled batch (paper, section 3.3), and
labelled pixels pasted into it."""

import torch
from torch import Tensor

from inputs.files import IGNORE
from inputs.transforms import to_device

STRATEGIES = ("cutout", "cutmix", "classmix", "none")


@torch.no_grad()
def mix(
    images: Tensor,
    labels: Tensor,
    confidence: Tensor,
    strategy: str,
    fill: Tensor | float = 0.0,
    *others: Tensor,
) -> tuple[Tensor, ...]:
    """Mix each image with the next one of the batch (the last with the first); one mask for all
    arguments.

    images      [B, 3, H, W] float
    labels      [B, H, W] of an integer type, 255 = ignored
    confidence  [B, H, W] float in [0, 1]
    others      [B, H, W] each: more label maps
    fill        a number or [3, 1, 1]: the colour that CutOut paints

    cutout    removes a random rectangle of half the area: label ignored, confidence 0
    cutmix    takes that rectangle from the next image
    classmix  keeps a random half (rounded down) of the classes in the label and takes the rest from
              the next image
    none      changes nothing
    Returns the mixed images, labels, confidence and others, without GPU synchronisation. Raises
    ValueError for another strategy.
    """
    keep = mixing_mask(labels, strategy)
    fills = (fill, IGNORE, 0.0, *(IGNORE for _ in others))
    mixed = []
    for x, removed in zip((images, labels, confidence, *others), fills, strict=True):
        rest = removed if strategy == "cutout" else x.roll(-1, 0)
        mixed.append(torch.where(keep if x.dim() == 3 else keep[:, None], x, rest))
    return tuple(mixed)


@torch.no_grad()
def paste(
    images: Tensor, labels: Tensor, confidence: Tensor, images_l: Tensor, labels_l: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste the rare classes of labelled images: each image takes, from one of the labelled images,
    the pixels of half of the classes (rounded down), those with the fewest pixels (not in the
    paper; after DACS, Tranheden et al. 2021).

    images [B, 3, H, W]; labels and confidence [B, H, W]; images_l [A, 3, H, W]; labels_l
    [A, H, W]. What is pasted has its true label and confidence 1. Returns new images, labels and
    confidence, without GPU synchronisation."""
    order = torch.arange(len(images), device=images.device) % len(images_l)
    images_l, labels_l = images_l[order], labels_l[order]
    pasted = class_mask(labels_l, rare=True)
    images = torch.where(pasted[:, None], images_l, images)
    return images, torch.where(pasted, labels_l, labels), torch.where(pasted, 1.0, confidence)


def mixing_mask(labels: Tensor, strategy: str) -> Tensor:
    """[B, H, W] bool: True on the pixels that an image keeps."""
    if strategy == "classmix":
        return class_mask(labels)
    if strategy in ("cutout", "cutmix"):
        return ~rectangle_mask(*labels.shape, labels.device)
    if strategy == "none":
        return torch.ones_like(labels, dtype=torch.bool)
    raise ValueError(f"unknown mixing strategy {strategy!r}; choose from {', '.join(STRATEGIES)}")


def rectangle_mask(
    batch: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """[B, H, W] bool: True inside one random rectangle per image, of half its area.

    Drawn on the CPU, so that no size requires GPU synchronisation."""
    if width < 2 or height < 2:
        return torch.zeros(batch, height, width, dtype=torch.bool, device=device)
    u = torch.rand(batch, 3)
    w = width / 2 + 1 + u[:, 0] * (width / 2 - 1)  # more than half of the width ...
    w = w.long().clamp(max=width)
    h = (height * width / 2 / w).round().long()  # ... so less than the height
    x, y = (u[:, 1] * (width - w + 1)).long(), (u[:, 2] * (height - h + 1)).long()
    edges = to_device(torch.stack([x, x + w, y, y + h]), device)
    left, right, top, bottom = edges[..., None]  # [B, 1] each
    columns, rows = torch.arange(width, device=device), torch.arange(height, device=device)
    inside_rows = (rows >= top) & (rows < bottom)
    inside_columns = (columns >= left) & (columns < right)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def class_mask(labels: Tensor, rare: bool = False) -> Tensor:
    """[B, H, W] bool: True on half (rounded down) of the classes in each label: a random half, or
    with `rare` the classes with the fewest pixels."""
    flat = labels.flatten(1).long()
    count = torch.zeros(len(flat), IGNORE + 1, device=labels.device)
    count.scatter_add_(1, flat, torch.ones_like(flat, dtype=count.dtype))
    count[:, IGNORE] = 0  # not a class: never chosen
    present = count > 0
    # the present classes in this order, then the absent ones
    score = -count if rare else torch.rand(count.shape, device=labels.device)
    score = score.masked_fill(~present, -torch.inf)
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    chosen = present & (rank < present.sum(dim=1, keepdim=True) // 2)
    return chosen.gather(1, flat).view_as(labels)
