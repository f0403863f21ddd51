"""Transforms of images and of their maps: labels, confidences.

Images are uint8 on the CPU and float in 0 .. 1 on the device. Random draws use a numpy generator on
the CPU, so that a seed gives the same crop on every device. No GPU synchronisation.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from inputs.files import IGNORE


# ------------------------------------------------- workarounds for PyTorch bugs on MPS (untested)
def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to the device without waiting, except on MPS, where the copy may then read
    freed memory (pytorch/pytorch 189690)."""
    return x.to(device, non_blocking=torch.device(device).type != "mps")


def memory_format(device: torch.device) -> torch.memory_format:
    """The memory format of a network: channels last, which is faster, except on MPS, where it makes
    the gradient of batch norm wrong or fail (pytorch/pytorch 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def cpu_for_mps(device: torch.device) -> torch.device:
    """Where to run an operation that is wrong or fails on MPS: the CPU, else the device itself."""
    return torch.device("cpu") if device.type == "mps" else device


# -------------------------------------------------------------------------------------- sizes
def to_float(images: Tensor, device: torch.device | str) -> Tensor:
    """uint8 [B, 3, H, W] on the CPU -> float in 0 .. 1 on the device."""
    return to_device(images, device).float().div_(255)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, H, W], uint8 or float -> [3, h, w], bilinear with antialiasing."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    # at a width of 1, antialiasing of uint8 is wrong or fails (torch 2.14), that of float is right
    values = image.float() if size[1] == 1 else image
    resized = F.interpolate(values[None], size=size, mode="bilinear", antialias=True)[0]
    return resized if image.is_floating_point() else resized.round().to(image.dtype)


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[H, W] of any dtype -> [h, w]: the value under the centre of each target pixel."""
    if tuple(values.shape) == tuple(size):
        return values
    resized = F.interpolate(values[None, None].float(), size=size, mode="nearest-exact")
    return resized[0, 0].to(values.dtype)


def resize_label(label: Tensor, size: tuple[int, int], sparse: bool = False) -> Tensor:
    """Labels or another map [H, W] -> [h, w] by `resize_nearest`.

    sparse  keep all known pixels (not 255) when the map shrinks (not in the paper)
    """
    small = resize_nearest(label, size)
    shrinks = size[0] < label.shape[0] or size[1] < label.shape[1]
    return keep_known(small[None], label[None])[0] if sparse and shrinks else small


def shrink_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels, masks or confidences [B, H, W] at the size (h, w) of the representation.

    Nearest sampling of the map itself, never through a one-hot tensor.
    """
    small = F.interpolate(label[:, None].float(), size=tuple(size), mode="nearest")
    return small[:, 0].to(label.dtype)


def shrink_known(known: Tensor, size: tuple[int, int]) -> Tensor:
    """`shrink_label` of sparse labels int64 [B, H, W], 255 = unknown; keeps known pixels."""
    return keep_known(shrink_label(known, size), known)


def keep_known(small: Tensor, known: Tensor) -> Tensor:
    """Fill the unknown cells (255) of `small` from the known pixels that they cover.

    small  [B, h, w]: `known` after nearest sampling, which at a quarter of the size loses 15 of 16
           single pixels
    known  [B, H, W]; of several classes in a cell, the largest number wins
    """
    values = torch.where(known == IGNORE, -1.0, known.float())[:, None]
    # on MPS this pooling is wrong where h does not divide H (pytorch/pytorch 190064)
    pooled = F.adaptive_max_pool2d(values.to(cpu_for_mps(known.device)), tuple(small.shape[-2:]))
    largest = pooled[:, 0].to(known.device)  # -1: no known pixel
    return torch.where((small == IGNORE) & (largest >= 0), largest.to(small.dtype), small)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W], bilinear with aligned corners, as in the whole network."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def reflect_pad(x: Tensor, height: int, width: int) -> Tensor:
    """Pad [..., H, W] of any dtype on the right and below to at least height x width, by repeated
    reflection (F.pad reflects only once)."""
    for dim, wanted in ((-2, height), (-1, width)):
        size = x.shape[dim]
        if size < wanted:
            period = max(2 * (size - 1), 1)  # forth and back; 1 for a single row or column
            position = torch.arange(wanted, device=x.device) % period
            x = x.index_select(dim, torch.minimum(position, period - position))
    return x


# ---------------------------------------------------------------------------- scale and crop
# a map [H, W], the value that pads it, and whether it is sparse (see resize_label)
Map = tuple[Tensor, float, bool]


def random_scale_crop(
    image: Tensor,
    maps: Sequence[Map],
    crop: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
    around: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Scale an image and its maps by one uniform factor, then crop them at one uniform position.

    image   [3, H, W] uint8 or float: bilinear with antialiasing
    maps    [H, W] each: nearest
    around  (row, column) of a pixel that the crop must hold
    If the scaled image is smaller than the crop, it is padded on the right and below by reflection,
    a map by its value. Returns the image and the maps at the size of the crop.
    """
    factor = rng.uniform(*scale)
    height, width = (max(1, int(side * factor)) for side in image.shape[-2:])
    corner = []
    for axis, side in enumerate((height, width)):
        first, last = 0, max(side - crop[axis], 0)
        if around:
            pixel = min(int((around[axis] + 0.5) * factor), side - 1)
            first, last = max(pixel - crop[axis] + 1, 0), min(pixel, last)
        corner.append(int(rng.integers(first, last + 1)))
    top, left = corner
    window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
    missing = (0, max(crop[1] - width, 0), 0, max(crop[0] - height, 0))
    cropped = [reflect_pad(resize_image(image, (height, width)), *crop)[window]]
    for values, padding, sparse in maps:
        values = resize_label(values, (height, width), sparse)
        cropped.append(F.pad(values, missing, value=padding)[window])
    return tuple(cropped)


def batch_scale_crop(
    images: Tensor,
    maps: Sequence[Map],
    crop: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Tensor, ...]:
    """`random_scale_crop` of each image of a batch: images [B, 3, H, W], maps [B, H, W] each."""
    if scale == (1.0, 1.0) and images.shape[-2:] == crop:
        return images, *(values for values, _, _ in maps)
    cropped = []
    for b, image in enumerate(images):
        own = [(values[b], padding, sparse) for values, padding, sparse in maps]
        cropped.append(random_scale_crop(image, own, crop, scale, rng))
    return tuple(map(torch.stack, zip(*cropped, strict=True)))


# ---------------------------------------------------------------------- colour, blur and flip
# As torchvision's, up to rounding, with an amount [B, 1, 1, 1] per image. They may overwrite the
# images: on a CPU, memory access takes most of the time.
def grey(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> luminance [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the values."""
    return images.mul_(factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the image's mean grey."""
    mean = grey(images.mean((2, 3), keepdim=True))
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the pixel's grey."""
    base = grey(images).mul_(1 - factor)
    return images.mul_(factor).add_(base).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by `shift` of the colour circle and keep HSV's saturation and value.

    A pixel of hue h has, in the channel whose own hue is c (red 0, green 1/3, blue 2/3), the value
    low + 6 (high - low) * clamp(1/3 - |h - c|, 0, 1/6), where |.| is the distance on the circle.
    """
    red, green, blue = images.split(1, dim=1)
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    span = 6 * (high - low)
    divisor = span.clamp(min=1e-12)  # not 0 where the pixel is grey
    hue = torch.where(
        high == green, (blue - red) / divisor + 1 / 3, (red - green) / divisor + 2 / 3
    )
    hue = torch.where(high == red, (green - blue) / divisor, hue)  # [B, 1, H, W]
    channels = torch.arange(3, device=images.device).view(3, 1, 1) / 3
    distance = hue - (channels - shift)  # [B, 3, H, W]
    distance = distance.sub_(distance.round()).abs_()
    return (1 / 3 - distance).clamp_(0, 1 / 6).mul_(span).add_(low)


COLOUR_CHANGES = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def gaussian_kernels(sigma: np.ndarray) -> np.ndarray:
    """[B] in pixels -> float32 [B, 9] of sum 1; sigma 0: a kernel that changes nothing."""
    weights = np.exp(-0.5 * (np.arange(-4, 5) / sigma.clip(0.01)[:, None]) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve the rows and columns of images [B, 3, H, W] with kernels [B, 9]; edges reflect."""
    weight = kernels.repeat_interleave(3, dim=0)[:, None, None]  # [3B, 1, 1, 9]
    padded = F.pad(images, [4] * 4, mode="reflect").flatten(0, 1)[None]  # [1, 3B, H + 8, W + 8]
    rows = F.conv2d(padded, weight, groups=len(weight))
    return F.conv2d(rows, weight.mT, groups=len(weight)).view(images.shape)


def draw_augmentation(
    batch: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The draws of `augment`: the order [4] of COLOUR_CHANGES, their amounts [4, B] (without jitter
    factors 1, shift 0), the sigma [B] of the blur (without: 0), and whether to flip [B]."""
    jitter, blurred, flip = rng.random((3, batch)) < [[0.8], [0.5], [0.5]]
    amounts = np.vstack([rng.uniform(0.75, 1.25, (3, batch)), rng.uniform(-0.25, 0.25, batch)])
    amounts = np.where(jitter, amounts, [[1], [1], [1], [0]])
    sigma = np.where(blurred, rng.uniform(0.15, 1.15, batch), 0)
    return rng.permutation(4), amounts.astype(np.float32), sigma, flip


def augment(images: Tensor, maps: Sequence[Tensor], rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Colour jitter, Gaussian blur and horizontal flip, with separate draws for each image.

    images  [B, 3, H, W] float32 in 0 .. 1, at least 5x5 pixels (the blur reflects four)
    maps    [B, H, W] each: labels, confidences; only flipped
    Jitter with probability 0.8: brightness, contrast and saturation by 0.75 to 1.25 and hue by
    -0.25 to 0.25 of a circle, in random order (one for the batch); blur with 0.5: sigma 0.15 to
    1.15, nine taps; flip with 0.5. Returns new images and maps.
    """
    order, *draws = draw_augmentation(len(images), rng)
    draws[1] = gaussian_kernels(draws[1])
    amounts, kernels, flip = (to_device(torch.from_numpy(x), images.device) for x in draws)
    flip = flip[:, None, None]
    maps = [torch.where(flip, x.flip(-1), x) for x in maps]
    images = torch.where(flip[:, None], images.flip(-1), images)  # a copy, to overwrite
    for change in order:
        images = COLOUR_CHANGES[change](images, amounts[change, :, None, None, None])
    return blur(images, kernels), *maps
