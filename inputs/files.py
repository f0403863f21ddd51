"""Reading images and label PNGs, writing files whole or not at all.

Everything is decoded by Pillow. torchvision's decoders are a tenth (PNG) to a sixth (JPEG) faster,
but a damaged PNG ends the process there.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from inputs.errors import UserError, first_line, need

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".jfif")
IGNORE = 255  # in a label: not labelled
OUTSIDE = 254  # in a value table: a value on disk that is no class
LABEL_MODES = ("L", "P", "1", "I", "I;16", "I;16B")  # Pillow's modes of one number per pixel
EXIF_ORIENTATION = 0x0112


# ------------------------------------------------------------------------------------- reading
def open_image(
    path: str | Path, size_needed: Callable[[int, int], tuple[int, int]] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """A decoded picture, upright as its EXIF data say, and its height and width on disk.

    `size_needed` gives for (height, width) the size that is asked for: a JPEG of twice that size
    or more is decoded at a half, a quarter or an eighth, which is faster.
    Raises UserError that names the file: missing, no image, truncated.
    """
    try:
        image = Image.open(path)
        width, height = image.size
        if size_needed:
            image.draft(None, size_needed(height, width)[::-1])
        image.load()
        quarter_turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
        ImageOps.exif_transpose(image, in_place=True)
        return image, (width, height) if quarter_turned else (height, width)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise UserError(
            f"{path}: is larger than {most:.0f} megapixels; cut it into smaller pictures"
        ) from None
    except UnidentifiedImageError:
        reason = "not an image that can be read" if os.path.getsize(path) else "is empty"
        raise UserError(f"{path}: {reason}") from None
    except Exception as error:  # decoders raise many kinds
        reason = first_line(error)
        raise UserError(f"{path}: cannot be decoded, truncated or damaged ({reason})") from None


def need_utf8(path: Path) -> None:
    """UserError for a name that a text file, a log or a label's name could not hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: a file name that is not UTF-8; rename it") from None


def to_rgb(image: Image.Image) -> Tensor:
    """uint8 RGB [3, H, W]; grey, palette and alpha images are brought to RGB, 16 bits to 8."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
        values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
        image = Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # a palette may carry transparency
    if image.mode != "RGB":
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(path: str | Path) -> Tensor:
    """uint8 RGB [3, H, W] of any picture, upright. Raises UserError that names the file."""
    return to_rgb(open_image(path)[0])


def read_label(
    path: str | Path,
    table: np.ndarray,
    size: tuple[int, int] | None = None,
    origin: str = "",
    colours: dict[int, int] | None = None,
) -> np.ndarray:
    """Class ids uint8 [H, W] of an index, palette or, with `colours`, RGB PNG, 255 = not labelled.

    table   uint8 [256]: value on disk -> class id, IGNORE, or OUTSIDE for a value that is no class
    size    (H, W) on disk of the image that it belongs to, which the label must share
    origin  what the message on a wrong value says of the allowed ones, e.g. where they are named
    colours pack_colour(R, G, B) -> class id or IGNORE; RGB and palette PNGs are read by these
    Raises UserError that names the file, the value and the allowed range.
    """
    image, stored = open_image(path)
    coloured = colours is not None and image.mode in ("RGB", "RGBA", "P")
    need(
        coloured or image.mode in LABEL_MODES,
        f"{path}: is a {image.mode} picture; a label is an index or palette PNG that holds one "
        "class number per pixel, or classes.txt gives every class its colour (road 128 64 128)",
    )
    if size and stored != size:
        turned = "; the image as its EXIF data turn it" if stored == size[::-1] else ""
        raise UserError(
            f"{path}: is {stored[1]}x{stored[0]} but its image is {size[1]}x{size[0]}; "
            f"they must have one size{turned}"
        )
    if coloured:
        return label_by_colour(path, image, colours, origin)
    values = np.asarray(image)
    if values.dtype not in (bool, np.uint8):  # 16 bits: nothing beyond a byte is a class
        values = np.where((values < 0) | (values > IGNORE), OUTSIDE, values)
    label = table.take(values.astype(np.uint8))
    wrong = label == OUTSIDE
    if wrong.any():
        allowed = np.flatnonzero(table[:IGNORE] != OUTSIDE)
        raise UserError(
            f"{path}: holds the value {np.asarray(image)[wrong].min()}, which is no class; "
            f"allowed are {allowed[0]} to {allowed[-1]}{origin}, and 255 = not labelled"
        )
    return label


def pack_colour(red, green, blue):
    """A colour, or arrays of them (int32), as one number."""
    return 65536 * red + 256 * green + blue


def label_by_colour(
    path: str | Path, image: Image.Image, colours: dict[int, int], origin: str
) -> np.ndarray:
    """`read_label` of a picture in the colours of the classes. What is transparent is not labelled.
    Nor is the palette index 255, as predict.py and a painter's eraser leave it: where it has no
    colour of a class, and where all other indices are the numbers of their classes."""
    red, green, blue, alpha = np.asarray(image.convert("RGBA")).astype(np.int32).transpose(2, 0, 1)
    packed = pack_colour(red, green, blue)
    known = np.array(sorted(colours))
    ids = np.array([colours[colour] for colour in known.tolist()], np.uint8)
    place = np.searchsorted(known, packed).clip(max=len(known) - 1)
    wrong = known[place] != packed
    label = np.where(wrong, np.uint8(IGNORE), ids[place])
    if image.mode == "P":
        index = np.asarray(image)
        erased = index == IGNORE
        if ((label == index) | erased).all():
            label[erased] = IGNORE
        wrong &= ~erased
    unpainted = alpha == 0  # whatever colour the painting program left there
    label[unpainted] = IGNORE
    wrong &= ~unpainted
    if wrong.any():
        y, x = np.argwhere(wrong)[0].tolist()
        raise UserError(
            f"{path}: holds the colour {red[y, x]} {green[y, x]} {blue[y, x]} at x {x}, y {y}, "
            f"which is no class{origin}; add it there, or as `void` where it means nothing"
        )
    return label


def read_bytes(path: str | Path) -> bytes:
    """What a file holds. Raises UserError that names it."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def stamp(*paths: str | None) -> list[list[int]]:
    """What changes when one of the files changes: size and time of modification of each."""
    try:
        stats = [os.stat(path) for path in paths if path]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return [[s.st_size, s.st_mtime_ns] for s in stats]


# ------------------------------------------------------------------------------------- writing
def atomic_write(path: str | Path, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the whole new one.

    `writer` gets the open binary file. A write that fails leaves nothing under the final name.
    """
    path, partial = Path(path), partial_of(Path(path))
    try:
        with open(partial, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where `atomic_write` writes until the file is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write(path: str | Path, writer: Callable[[BinaryIO], object]) -> None:
    """`atomic_write`, the folder made where needed. A full disk or a missing right: UserError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, writer)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "what stood there before is whole"
        ) from None


def write_json(path: str | Path, content) -> None:
    """`write` of JSON; what JSON does not know is written as text."""
    text = json.dumps(content, indent=1, default=str) + "\n"
    write(path, lambda file: file.write(text.encode()))


def write_cache(path: Path, writer: Callable[[BinaryIO], object]) -> None:
    """`write` of what only saves time: where it cannot be written the work is done once more."""
    with contextlib.suppress(UserError):
        write(path, writer)
