"""Read images, masks and text; write files whole or not at all.

Pillow decodes all images. torchvision's decoders are a tenth (PNG) to a sixth (JPEG) faster, but a
damaged PNG crashes their process.
"""

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from inputs.errors import UserError, first_line, need

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".jfif")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # no PostScript: Pillow would run Ghostscript
IGNORE = 255  # in a label: not labelled
OUTSIDE = 254  # in a value table: a value on disk that is not a class
LABEL_MODES = ("L", "P", "1", "I", "I;16", "I;16B")  # Pillow's modes with one number per pixel
EXIF_ORIENTATION = 0x0112


# ------------------------------------------------------------------------------------- reading
def need_regular(path: str | Path) -> None:
    """Raise UserError unless the path is a regular file or a link to one: a pipe would block."""
    need(os.path.exists(path), f"{path}: no such file")
    need(os.path.isfile(path), f"{path}: is not a regular file")


def open_image(
    path: str | Path, size_needed: Callable[[int, int], tuple[int, int]] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """A decoded image, rotated by its EXIF data, and its full size (H, W) after the rotation.

    `size_needed` maps (H, W) to the required size: a JPEG of twice that size or more is decoded at
    1/2, 1/4 or 1/8, which is faster.
    Raises UserError that names the file: missing, not an image, truncated.
    """
    need_regular(path)
    try:
        image = Image.open(path, formats=FORMATS)
        width, height = image.size
        if size_needed:
            image.draft(None, size_needed(height, width)[::-1])
        image.load()
        quarter_turned = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
        ImageOps.exif_transpose(image, in_place=True)
        return image, (width, height) if quarter_turned else (height, width)
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise UserError(f"{path}: is larger than {most:.0f} megapixels; cut it in tiles") from None
    except UnidentifiedImageError:
        kinds = "not an image that can be read (PNG, JPEG, BMP, TIFF, WebP)"
        raise UserError(f"{path}: {kinds if os.path.getsize(path) else 'is empty'}") from None
    except Exception as error:  # decoders raise many kinds
        reason = first_line(error)
        raise UserError(f"{path}: cannot be decoded, truncated or damaged ({reason})") from None


def need_utf8(path: Path) -> None:
    """Raise UserError for a name that cannot be written to a text file or a log."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: the file name is not UTF-8; rename it") from None


def to_rgb(image: Image.Image, path: str | Path = "the image") -> Tensor:
    """Any image as uint8 RGB [3, H, W].

    16 bits: 65535 is white. Floats: the largest value, at least 1, is white; NaN and infinity are
    black. Raises UserError for values outside 0 .. 65535: decibels, or a huge "no data" value
    beside which the rest would be black.
    """
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
        values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
        low, high = float(values.min()), float(values.max())
        need(
            low >= 0 and high <= 65535,
            f"{path}: holds values from {low:g} to {high:g}; scale them to 0 .. 65535, or floats "
            "to 0 .. 1",
        )
        top = 65535.0 if image.mode.startswith("I") else max(high, 1.0)
        image = Image.fromarray((values / top * 255).round().astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # a palette may carry transparency
    if image.mode != "RGB":
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(path: str | Path) -> Tensor:
    """An image as uint8 RGB [3, H, W], upright. Raises UserError that names the file."""
    return to_rgb(open_image(path)[0], path)


def read_label(
    path: str | Path,
    table: np.ndarray,
    size: tuple[int, int] | None = None,
    origin: str = "",
    colours: dict[int, int] | None = None,
) -> np.ndarray:
    """Class ids uint8 [H, W] of a mask, 255 = not labelled.

    table    uint8 [256]: value on disk -> class id, IGNORE, or OUTSIDE for a value that is not a
             class
    size     (H, W) of its image, upright, which the mask must share
    origin   where the allowed values come from, for the message about a wrong one
    colours  pack_colour(R, G, B) -> class id or IGNORE, for masks in colours

    A grey PNG holds values. An RGB PNG requires `colours`. A palette PNG means its colours if all
    are in `colours`; else its greys if all are greys (a tool may have compressed a grey PNG); else
    its indices. Transparent pixels of a mask in colours are not labelled.
    Raises UserError that names the file, the value and the allowed range.
    """
    image, stored = open_image(path)
    in_rgb = colours is not None and image.mode in ("RGB", "RGBA")
    need(
        in_rgb or image.mode in LABEL_MODES,
        f"{path}: is a {image.mode} image; a label is an index or palette PNG that holds one class "
        "number per pixel, or classes.txt gives every class its colour (road 128 64 128)",
    )
    if size and stored != size:
        turned = "; the image as its EXIF data turn it" if stored == size[::-1] else ""
        raise UserError(
            f"{path}: is {stored[1]}x{stored[0]} but its image is {size[1]}x{size[0]}; "
            f"they must have one size{turned}"
        )
    label = None
    if in_rgb:
        label = classes_of_colours(np.asarray(image.convert("RGBA")), colours)
    elif colours is not None and image.mode == "P":
        label = classes_of_palette(image, colours).take(np.asarray(image))
    unknown = label is None or (label == OUTSIDE).any()
    if image.mode == "P" and unknown and is_grey(image.getpalette()):
        used = np.unique(np.asarray(image))
        image, label = image.convert("L"), None
        one_to_one = len(np.unique(np.asarray(image))) == len(used)
        need(one_to_one, f"{path}: its palette has one grey for two numbers; save it as 8-bit grey")
    if label is None:
        return label_by_value(path, image, table, origin)
    if (label == OUTSIDE).any():
        y, x = np.argwhere(label == OUTSIDE)[0].tolist()
        red, green, blue = image.convert("RGB").getpixel((x, y))
        raise UserError(
            f"{path}: holds the colour {red} {green} {blue} at x {x}, y {y}, which is not a "
            f"class{origin}; add it there, or as `void` if it means nothing"
        )
    return label


def label_by_value(
    path: str | Path, image: Image.Image, table: np.ndarray, origin: str
) -> np.ndarray:
    """`read_label` of an image whose pixels are values: look them up in the table."""
    values = np.asarray(image)
    white = image.mode == "1" and values.any()
    need(not white, f"{path}: is a 1-bit mask, whose white may be 1 or 255; save it as 8-bit grey")
    if values.dtype not in (bool, np.uint8):  # 16 or 32 bits: a value above 255 is not a class
        values = np.where((values < 0) | (values > IGNORE), OUTSIDE, values)
    label = table.take(values.astype(np.uint8))
    wrong = label == OUTSIDE
    if wrong.any():
        allowed = np.flatnonzero(table[:IGNORE] != OUTSIDE)
        raise UserError(
            f"{path}: holds the value {np.asarray(image)[wrong].min()}, which is not a class; "
            f"allowed are {allowed[0]} to {allowed[-1]}{origin}, and 255 = not labelled"
        )
    return label


Number = TypeVar("Number", int, np.ndarray)


def pack_colour(red: Number, green: Number, blue: Number) -> Number:
    """A colour, or arrays of them (int32), as one number."""
    return 65536 * red + 256 * green + blue


def classes_of_colours(rgba: np.ndarray, colours: dict[int, int]) -> np.ndarray:
    """RGBA uint8 [..., 4] -> class ids uint8 [...]; IGNORE for a transparent pixel of any colour,
    OUTSIDE for a colour that is not in `colours`."""
    red, green, blue, alpha = np.moveaxis(rgba.astype(np.int32), -1, 0)
    packed = pack_colour(red, green, blue)
    known = np.array(sorted(colours))
    ids = np.array([colours[colour] for colour in known.tolist()], np.uint8)
    place = np.searchsorted(known, packed).clip(max=len(known) - 1)
    label = np.where(known[place] == packed, ids[place], np.uint8(OUTSIDE))
    return np.where(alpha == 0, np.uint8(IGNORE), label)


def classes_of_palette(image: Image.Image, colours: dict[int, int]) -> np.ndarray:
    """uint8 [256]: the class of each index of a palette PNG by its colour, see
    `classes_of_colours`.

    The index 255 is not labelled (as in masks of predict.py that a user erased) if its colour is
    not a class, or if every other index in the image is the number of its class.
    """
    image.apply_transparency()
    rgba = np.array(image.getpalette("RGBA"), np.uint8).reshape(-1, 4)
    classes = np.full(256, OUTSIDE, np.uint8)
    classes[: len(rgba)] = classes_of_colours(rgba, colours)
    others = np.setdiff1d(np.asarray(image), [IGNORE])
    if classes[IGNORE] == OUTSIDE or (classes[others] == others).all():
        classes[IGNORE] = IGNORE
    return classes


def is_grey(palette: Sequence[int]) -> bool:
    """Whether all colours of a palette (R, G, B, R, ...) are greys."""
    return palette[::3] == palette[1::3] == palette[2::3]


def read_palette(path: str | Path) -> bytes:
    """The palette R, G, B, R, ... of a palette PNG; empty for other images and for a palette of
    greys, which means these greys. Raises UserError that names the file."""
    need_regular(path)
    try:
        with Image.open(path, formats=FORMATS) as image:  # reads the header only
            palette = bytes(image.getpalette() or []) if image.mode == "P" else b""
    except Exception:
        open_image(path)  # raises the error that says what is wrong
        return b""
    return b"" if is_grey(palette) else palette


def read_bytes(path: str | Path) -> bytes:
    """The content of a file. Raises UserError that names the file."""
    need_regular(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises UserError that names the file."""
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    need("\0" not in text, f"{path}: is not a text file in UTF-8; save it as one")
    return text


def read_json(path: str | Path):
    """The content of a JSON file. Raises UserError that names the file."""
    content = read_bytes(path)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a JSON file ({first_line(error)})") from None


def stamp(*paths: str | None) -> list[list[int]]:
    """Size, mtime, ctime and inode of each file: differs if a file was changed or replaced, even by
    one of the same size and mtime."""
    try:
        stats = [os.stat(path) for path in paths if path]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats]


# ------------------------------------------------------------------------------------- writing
def output_file(option: str, name: str | Path, overwrite: bool) -> Path:
    """The output path that an option names. UserError if it cannot be written, or exists and
    `overwrite` is False."""
    path = Path(name)
    need(not path.is_dir(), f"{option} {path}: is a folder; name a file")
    writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    need(writable, f"{option} {path}: {path.parent} is not a folder that can be written to")
    need(
        overwrite or not path.is_file(),
        f"{option} {path}: exists; name another file, or replace it with --overwrite",
    )
    return path


def need_no_input(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """UserError if an output is one of the input files, also under another name or link."""
    existing = {identity(path): path for path in outputs if path.exists()}
    for path in inputs if existing else ():
        output = existing.get(identity(path))
        need(not output, f"{output}: would overwrite the input {path}; choose another output")


def identity(path: str | Path) -> tuple[int, int] | None:
    """Device and inode of a file, the same under all its names; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def atomic_write(path: str | Path, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at any time the path holds the old file or the whole new one.

    `writer` gets the open binary file. If it fails, the path is unchanged. A link stays a link. A
    device, a pipe and /dev/stdout are written in place.
    """
    stream = {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path))  # may be redirected to a file
    in_place = stream is not None
    with contextlib.suppress(FileNotFoundError):
        in_place |= not stat.S_ISREG(os.stat(path).st_mode)
    if in_place:
        with open(os.dup(stream) if stream else path, "wb") as file:
            writer(file)
        return
    path = Path(os.path.realpath(path))
    partial = partial_of(path)
    try:
        with open(partial, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """The temporary file of `atomic_write`."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write(path: str | Path, writer: Callable[[BinaryIO], object]) -> None:
    """`atomic_write`, which also makes the folder. UserError if the disk is full or permission is
    missing."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, writer)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); an earlier file is unchanged"
        ) from None


def write_json(path: str | Path, content: object) -> None:
    """`write` as JSON; types that JSON does not have become text."""
    text = json.dumps(content, indent=1, default=str) + "\n"
    write(path, lambda file: file.write(text.encode()))


def write_cache(path: Path, writer: Callable[[BinaryIO], object]) -> None:
    """Best-effort cache write: if it fails, the work is done again next time."""
    with contextlib.suppress(UserError):
        write(path, writer)
