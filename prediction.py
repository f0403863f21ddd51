"""Class probabilities of images of any size: scales, mirrored images, windows, and tiles of large
pictures. A model here is whatever maps images [B, 3, H, W] in 0 .. 1 to (logits, ...) at some
stride."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transforms import resize_image, to_float, upsample


@torch.no_grad()
def predict_probabilities(
    model: nn.Module,
    images: Tensor,
    scales=(1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Class probabilities [B, C, H, W] (float32) of images [B, 3, H, W] in 0 .. 1: the mean over
    the scales and, with `flip`, the mirrored images; with `window`, over tiles of that size that
    overlap by a third."""
    height, width = images.shape[-2:]
    total = 0.0
    for scale in scales:
        scaled = images
        if scale != 1:
            # not so small that the backbone has nothing left, see Segmenter.network_size
            size = [max(min(32, side), round(side * scale)) for side in (height, width)]
            scaled = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        total = total + windowed(model, scaled, window, (height, width))
        if flip:
            total = total + windowed(model, scaled.flip(-1), window, (height, width)).flip(-1)
    return total / (len(scales) * (2 if flip else 1))


def windowed(model: nn.Module, x: Tensor, window: tuple[int, int] | None, size) -> Tensor:
    """Probabilities of images in one piece or, with `window`, from overlapping tiles, averaged
    where they overlap; brought to `size`."""
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
    """Where tiles begin so that they cover the length and overlap by at least a third."""
    if length <= tile:
        return [0]
    number = 1 + math.ceil((length - tile) / max(1, tile - math.ceil(tile / 3)))
    return [round(i * (length - tile) / (number - 1)) for i in range(number)]


@torch.no_grad()
def predict_picture(
    model: nn.Module,
    image: Tensor,
    size: tuple[int, int],
    tile: int = 1024,
    device="cpu",
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Class uint8 [H, W] and its probability float32 [H, W] of every pixel of a picture uint8
    [3, H, W].

    The network sees it at `size`, in overlapping tiles where that is larger than a tile, and the
    probabilities are brought back to the picture's size a strip at a time: the memory needed
    depends on the tile and hardly on the picture. `options` are those of predict_probabilities."""
    height, width = image.shape[-2:]
    label = np.empty((height, width), np.uint8)
    confidence = np.empty((height, width), np.float32)
    for rows, columns, prob in predict_strips(model, image, size, tile, device, **options):
        best, index = prob.max(dim=0)
        label[rows, columns] = index.byte().cpu().numpy()
        confidence[rows, columns] = best.cpu().numpy()
    return label, confidence


@torch.no_grad()
def predict_strips(model, image: Tensor, size: tuple[int, int], tile: int, device, **options):
    """Yield (rows, columns, probabilities [C, rows, columns]) that together cover the picture."""
    small, (height, width) = resize_image(image, size), image.shape[-2:]
    tiles = itertools.product(split(size[0], height, tile), split(size[1], width, tile))
    for (top, bottom, y), (left, right, x) in tiles:
        if not y or not x:  # the picture is so much smaller than `size` that no pixel falls here
            continue
        crop = to_float(small[None, :, top:bottom, left:right], device)
        prob = predict_probabilities(model, crop, **options)[0]  # [C, h, w]
        step = max(1, 2**23 // (len(prob) * len(x)))
        for strip in (y[i : i + step] for i in range(0, len(y), step)):
            part = resample(prob, 1, strip, size[0] / height, top)
            part = resample(part, 2, x, size[1] / width, left)
            yield slice(strip.start, strip.stop), slice(x.start, x.stop), part


def split(length: int, original: int, tile: int) -> list[tuple[int, int, range]]:
    """Tiles that cover a length: where each starts and stops, and which pixels of the original
    length are taken from it. Neighbours meet in the middle of their overlap, so a pixel is seen
    with a sixth of a tile around it."""
    tile = min(tile, length)
    starts = tile_starts(length, tile)
    middles = [(left + tile + right) / 2 for left, right in itertools.pairwise(starts)]
    # the first pixel whose centre lies behind each border
    edges = [math.ceil(at * original / length - 0.5) for at in (0, *middles, length)]
    pixels = [range(*pair) for pair in itertools.pairwise(edges)]
    return [(start, start + tile, taken) for start, taken in zip(starts, pixels, strict=True)]


def resample(prob: Tensor, dim: int, pixels: range, scale: float, start: int) -> Tensor:
    """Bilinear values along a dimension at the centres of pixels of another scale; `start` is
    where prob begins."""
    centres = torch.arange(pixels.start, pixels.stop, dtype=torch.float64) + 0.5
    at = (centres * scale - 0.5 - start).clamp(0, prob.shape[dim] - 1)
    low = at.long()
    weight = (at - low).float().to(prob.device)[(...,) + (None,) * (2 - dim)]
    low = low.to(prob.device)
    high = (low + 1).clamp_max(prob.shape[dim] - 1)
    return torch.lerp(prob.index_select(dim, low), prob.index_select(dim, high), weight)
