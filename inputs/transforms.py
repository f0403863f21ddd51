"""Transforms of images, labels and confidences that belong together.

Images are float in 0 .. 1, or uint8 before they reach the device. Random draws are made on the CPU
with a numpy generator, so that the same seed gives the same crop on every device, and nothing
here waits for a GPU.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from inputs.files import IGNORE

COLOUR_CHANGES = (
    tv.adjust_brightness,
    tv.adjust_contrast,
    tv.adjust_saturation,
    tv.adjust_hue,
)


# ------------------------------------------------- workarounds for PyTorch bugs on MPS (untested)
def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device. The host does not wait for the copy, except with mps: a
    copy that is not waited for may read memory that is free again (pytorch/pytorch 189690)."""
    return x.to(device, non_blocking=torch.device(device).type != "mps")


def memory_format(device: torch.device) -> torch.memory_format:
    """How a network's tensors lie in memory: channels last, which is faster, but not with mps,
    where the gradient of batch norm then is wrong or fails (pytorch/pytorch 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def cpu_for_mps(device: torch.device) -> torch.device:
    """The device, or the CPU in place of mps: for operations that are wrong there, or fail."""
    return torch.device("cpu") if device.type == "mps" else device


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


def resize_label(label: Tensor, size: tuple[int, int], sparse: bool = False) -> Tensor:
    """A label map [H, W] at the size (h, w), by `resize_nearest`.

    sparse  keep known pixels (not 255), single ones or strokes, where the size is smaller (not in
            the paper)
    """
    small = resize_nearest(label, size)
    return keep_known(small[None], label[None])[0] if sparse and size[0] < len(label) else small


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
# Maps [H, W] that belong to an image: (map, value of its padding, whether it is a sparse label whose
# known pixels are kept where the image shrinks, see `resize_label`)
Map = tuple[Tensor, float, bool]


def random_scale_crop(
    image: Tensor,
    maps: Sequence[Map],
    crop: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Tensor, ...]:
    """Scale an image and its maps by one uniform factor, pad them on the right and below to the
    crop's size, and crop at random.

    image [3, H, W] uint8 or float: bilinear with antialiasing, padded by reflection; maps [H, W]:
    nearest. Returns the image and the maps at the crop's size."""
    factor = rng.uniform(*scale)
    height, width = image.shape[-2:]
    scaled = (max(1, int(height * factor)), max(1, int(width * factor)))
    top = int(rng.integers(max(scaled[0] - crop[0], 0) + 1))
    left = int(rng.integers(max(scaled[1] - crop[1], 0) + 1))
    window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
    missing = (0, max(crop[1] - scaled[1], 0), 0, max(crop[0] - scaled[0], 0))
    cropped = [reflect_pad(resize_image(image, scaled), *crop)[window]]
    for values, padding, sparse in maps:
        cropped.append(F.pad(resize_label(values, scaled, sparse), missing, value=padding)[window])
    return tuple(cropped)


def batch_scale_crop(
    images: Tensor,
    maps: Sequence[Map],
    crop: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Tensor, ...]:
    """`random_scale_crop` of each image of a batch, on its device: images [B, 3, H, W] and maps
    [B, H, W]."""
    if scale == (1.0, 1.0) and tuple(images.shape[-2:]) == tuple(crop):
        return images, *(values for values, _, _ in maps)
    cropped = [
        random_scale_crop(image, [(m[0][b], *m[1:]) for m in maps], crop, scale, rng)
        for b, image in enumerate(images)
    ]
    return tuple(map(torch.stack, zip(*cropped, strict=True)))


# ---------------------------------------------------------------------- colour, blur and flip
def augment(images: Tensor, maps: Sequence[Tensor], rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Colour jitter, Gaussian blur and horizontal flip, with separate draws for each image.

    images  [B, 3, H, W] float in 0 .. 1, at least 5x5 pixels (the blur reflects four)
    maps    [B, H, W] each: labels, confidences; only flipped
    Jitter with probability 0.8: brightness, contrast and saturation by 0.75 to 1.25 and hue by
    -0.25 to 0.25 of a circle, in random order; blur with 0.5: sigma 0.15 to 1.15, nine taps; flip
    with 0.5. Returns the images and the maps.
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

    def flipped(values: list[Tensor] | Tensor) -> Tensor:
        pairs = zip(values, flip, strict=True)
        return torch.stack([tv.horizontal_flip(x) if chosen else x for x, chosen in pairs])

    return flipped(changed), *map(flipped, maps)
