"""Transforms of images, labels and confidences that belong together.

Images are float in 0 .. 1, or uint8 before they reach the device. Random draws are made on the CPU
with a numpy generator, so that the same seed gives the same crop on every device, and nothing
here waits for a GPU.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from devices import cpu_for_mps, to_device
from mixing import IGNORE

COLOUR_CHANGES = (
    tv.adjust_brightness,
    tv.adjust_contrast,
    tv.adjust_saturation,
    tv.adjust_hue,
)


# -------------------------------------------------------------------------------------- sizes
def to_float(images: Tensor, device) -> Tensor:
    """uint8 [B, 3, H, W] on the host -> float in 0 .. 1 on the device."""
    return to_device(images, device).float().div_(255)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, H, W], uint8 or float -> [3, h, w], bilinear with antialiasing."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[H, W] of any dtype -> [h, w]: the value under the centre of each target pixel."""
    if tuple(values.shape) == tuple(size):
        return values
    resized = F.interpolate(values[None, None].float(), size=size, mode="nearest-exact")
    return resized[0, 0].to(values.dtype)


def resize_label(
    label: Tensor, confidence: Tensor | None, size: tuple[int, int], sparse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A label [H, W] and its confidence [H, W] (or None) at the size (h, w), by `resize_nearest`.

    sparse  known pixels, single ones or strokes, are not lost where the size is smaller (not in the
            paper): those that are not 255 or, with a confidence, those of confidence 1
    """
    small = resize_nearest(label, size)
    sure = None if confidence is None else resize_nearest(confidence, size)
    if not sparse or size[0] >= label.shape[0]:
        return small, sure
    known = label if confidence is None else torch.where(confidence == 1, label, IGNORE)
    known = keep_known(resize_nearest(known, size)[None], known[None])[0]
    kept = known != IGNORE
    return torch.where(kept, known, small), None if sure is None else torch.where(kept, 1.0, sure)


def shrink_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels, masks or confidences [B, H, W] at the size (h, w) of the representation.

    Nearest sampling of the map itself, never through a one-hot tensor.
    """
    small = F.interpolate(label[:, None].float(), size=tuple(size), mode="nearest")
    return small[:, 0].to(label.dtype)


def shrink_known(known: Tensor, size: tuple[int, int]) -> Tensor:
    """Sparse labels int64 [B, H, W], 255 = unknown, at the size (h, w) of the representation:
    `shrink_label`, but a known pixel is not lost."""
    return keep_known(shrink_label(known, size), known)


def keep_known(small: Tensor, known: Tensor) -> Tensor:
    """Labels [B, h, w] made smaller by nearest sampling, in which an unknown cell (255) takes a
    known pixel of its own, if `known` [B, H, W] has one there (of several classes the last).

    Of single pixels, nearest sampling alone would lose 15 of 16 at a quarter of the size.
    """
    numbers = torch.where(known == IGNORE, -1.0, known.float())[:, None]
    # this pooling is wrong with mps where h does not divide H (pytorch/pytorch 190064)
    pooled = F.adaptive_max_pool2d(numbers.to(cpu_for_mps(known.device)), tuple(small.shape[-2:]))
    last = pooled[:, 0].to(known.device)
    return torch.where((small == IGNORE) & (last >= 0), last.to(small.dtype), small)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W], bilinear, corners aligned, as everywhere in the network."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def reflect_pad(x: Tensor, height: int, width: int) -> Tensor:
    """[..., H, W] continued on the right and below to at least this size.

    Reflected as often as needed, of any dtype (torch's own padding reflects once).
    """
    for dim, wanted in ((-2, height), (-1, width)):
        size = x.shape[dim]
        if size < wanted:
            period = max(2 * (size - 1), 1)  # there and back again
            position = torch.arange(wanted, device=x.device) % period
            x = x.index_select(dim, torch.minimum(position, period - position))
    return x


# ---------------------------------------------------------------------------- scale and crop
def random_scale_crop(
    image: Tensor,
    label: Tensor,
    confidence: Tensor | None,
    crop: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
    sparse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale by a uniform factor, pad to the crop's size, crop at random; all three together.

    image       [3, H, W] uint8 or float: bilinear with antialiasing, padded by reflection
    label       [H, W] integer: nearest, padded with 255
    confidence  [H, W] float or None: nearest, padded with 0
    sparse      whether known pixels are kept where the image gets smaller, see `resize_label`
    Padding lies on the right and below. Returns the three at the size of the crop.
    """
    factor = rng.uniform(*scale)
    height, width = image.shape[-2:]
    scaled = (max(1, int(height * factor)), max(1, int(width * factor)))
    top = int(rng.integers(max(scaled[0] - crop[0], 0) + 1))
    left = int(rng.integers(max(scaled[1] - crop[1], 0) + 1))
    window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
    missing = (0, max(crop[1] - scaled[1], 0), 0, max(crop[0] - scaled[0], 0))

    image = reflect_pad(resize_image(image, scaled), *crop)[window]
    label, confidence = resize_label(label, confidence, scaled, sparse)
    label = F.pad(label, missing, value=IGNORE)[window]
    if confidence is not None:
        confidence = F.pad(confidence, missing, value=0)[window]
    return image, label, confidence


def batch_scale_crop(
    images: Tensor,
    labels: Tensor,
    confidence: Tensor,
    crop: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
    sparse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`random_scale_crop` of each image of a batch, on its device.

    images [B, 3, H, W], labels [B, H, W], confidence [B, H, W] -> the same at the crop's size.
    """
    if scale == (1.0, 1.0) and tuple(images.shape[-2:]) == tuple(crop):
        return images, labels, confidence
    cropped = [
        random_scale_crop(*sample, crop, scale, rng, sparse)
        for sample in zip(images, labels, confidence, strict=True)
    ]
    images, labels, confidence = zip(*cropped, strict=True)
    return torch.stack(images), torch.stack(labels), torch.stack(confidence)


# ---------------------------------------------------------------------- colour, blur and flip
def augment(
    images: Tensor, labels: Tensor, confidence: Tensor | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Colour jitter, Gaussian blur and horizontal flip, each image with draws of its own.

    images      [B, 3, H, W] float in 0 .. 1, at least 5x5 pixels (the blur reflects four)
    labels      [B, H, W]
    confidence  [B, H, W] or None
    Jitter with probability 0.8: brightness, contrast and saturation by 0.75 to 1.25 and hue by
    -0.25 to 0.25 of a circle, in random order; blur with 0.5: sigma 0.15 to 1.15, nine taps; flip
    with 0.5. Returns new images, labels and confidence on the same device.
    """
    batch = len(images)
    jitter, blur, flip = rng.random((3, batch)) < [[0.8], [0.5], [0.5]]
    order = rng.random((batch, 4)).argsort(axis=1)  # of COLOUR_CHANGES
    factors, shifts = rng.uniform(0.75, 1.25, (3, batch)), rng.uniform(-0.25, 0.25, batch)
    amounts = np.vstack([factors, shifts]).T  # [B, 4]
    sigmas = rng.uniform(0.15, 1.15, batch)

    changed = []
    for b, image in enumerate(images):
        if jitter[b]:
            for change in order[b]:
                image = COLOUR_CHANGES[change](image, float(amounts[b, change]))
        if blur[b]:
            image = tv.gaussian_blur(image, 9, float(sigmas[b]))
        changed.append(image)

    def flipped(maps: list[Tensor] | Tensor) -> Tensor:
        pairs = zip(maps, flip, strict=True)
        return torch.stack([tv.horizontal_flip(x) if chosen else x for x, chosen in pairs])

    return flipped(changed), flipped(labels), None if confidence is None else flipped(confidence)
