"""CutOut, CutMix and ClassMix: three ways to mix a pseudo-labelled batch (paper, section 3.3)."""

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


def class_mask(labels: Tensor) -> Tensor:
    """[B, H, W] bool: True on a random half (rounded down) of the classes in each label."""
    flat = labels.flatten(1).long()
    present = torch.zeros(len(flat), IGNORE + 1, dtype=torch.bool, device=labels.device)
    present.scatter_(1, flat, True)
    present[:, IGNORE] = False  # not a class: always taken from the next image
    # the present classes in random order, then the absent ones
    score = torch.rand(present.shape, device=labels.device).masked_fill(~present, -1.0)
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    chosen = present & (rank < present.sum(dim=1, keepdim=True) // 2)
    return chosen.gather(1, flat).view_as(labels)
