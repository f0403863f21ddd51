"""What the examples share: the layout of `--dataset folder`, and checks of what goes into it.

Nothing that is in the folder is ever replaced: an export can be added to it, and added again.
"""

import io
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path, PurePath, PureWindowsPath

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inputs.errors import UserError, need
from inputs.files import IMAGE_SUFFIXES, open_image, read_bytes, read_text

LONGEST_NAME = 200  # bytes; most file systems allow 255, and predict.py appends to names


def launch(main: Callable[[], None]) -> None:
    """Run an example. What the user can fix is one line and status 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a terminal may not know an umlaut
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `open_image` has a limit
    try:
        main()
    except (UserError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)  # a name may hold a line break
        sys.exit(2)


# ---------------------------------------------------------------------------------- what is read
def find_image(folder: Path, name: str) -> Path:
    """The image that an annotation file calls `name`, a path in the folder or of the computer where
    it was annotated; if it is not there, the image of that file name in the folder."""
    places = (folder / name.replace("\\", "/"), folder / PureWindowsPath(name).name)
    found = next((path for path in places if os.path.isfile(path)), None)
    need(found, f"{folder}: holds no image {name[:200]!r}")
    return found


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image as viewers show it; the image is decoded, so it is known to be sound."""
    return open_image(path, lambda height, width: (1, 1))[1]


def need_points(points: object, size: tuple[int, int], what: str) -> None:
    """Raise UserError unless `points` is a list of x, y in or near an image of `size` (H, W)."""
    pairs = isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)
    need(pairs, f"{what}: its points are not a list of x, y")
    for point in points:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in point)
        need(numbers, f"{what}: the point {point} is not two numbers")
        near = all(-side <= v <= 2 * side for v, side in zip(point, size[::-1], strict=True))
        need(near, f"{what}: the point {point} is far from the image of {size[1]}x{size[0]}")


# ------------------------------------------------------------------------------- what is written
def output_names(names: list[str]) -> list[str]:
    """A file name for each image, no stem twice, since stems join labels to images: its own name,
    or if two would be the same, those of its folders too (day/1.jpg: day_1.jpg). A name never
    leads out of a folder, since only names of files and folders are taken from a path."""
    paths = [PureWindowsPath(name) for name in names]  # knows / too
    parts = [[p for p in path.parts if p not in (path.anchor, "..")] for path in paths]
    for choice in ([part[-1:] for part in parts], parts):
        chosen = ["_".join(part) for part in choice]
        stems = [unicodedata.normalize("NFC", PurePath(name).stem) for name in chosen]
        if len(set(stems)) == len(stems):
            break
    first = {}
    for name, own, stem in zip(names, chosen, stems, strict=True):
        usable = name.isprintable() and not own.startswith(".") and len(own.encode()) < LONGEST_NAME
        need(usable, f"{name[:200]!r}: cannot be the name of an image; rename it")
        suffix = PurePath(own).suffix.lower()
        need(suffix in IMAGE_SUFFIXES, f"{name!r}: is none of {', '.join(IMAGE_SUFFIXES)}")
        other = first.setdefault(stem, name)
        need(other is name, f"{other} and {name}: both labels would be {stem}.png; rename one")
    return chosen


def write_classes(out: Path, classes: list[str]) -> None:
    """OUT/classes.txt; one that is there, from another split, must have the same classes."""
    for name in classes:
        usable = name and name.isprintable() and name == " ".join(name.split())
        usable = usable and not name.startswith("#")
        need(usable, f"{name!r} cannot be the name of a class (a line of classes.txt); rename it")
        need(classes.count(name) == 1, f"two classes are called {name}; rename one")
    more = "; --background NAME adds one" if len(classes) == 1 else ""
    need(
        2 <= len(classes) <= 253,
        f"{len(classes)} classes ({', '.join(classes[:5])}); 2 to 253 are possible{more}",
    )
    file, text = out / "classes.txt", "".join(f"{name}\n" for name in classes)
    need(
        not file.exists() or read_text(file) == text,
        f"{file}: has other classes than {', '.join(classes)}; choose another folder",
    )
    if not file.exists():
        add_file(file, text.encode())


def add_image(
    out: Path,
    split: str,
    name: str,
    image: Path | Image.Image,
    label: np.ndarray | None = None,
    palette: list[tuple[int, int, int]] | None = None,
) -> None:
    """An image (a file is copied) into OUT/images/SPLIT, its label, uint8 [H, W], as a grey PNG, or
    with a palette, into OUT/labels/SPLIT."""
    content = read_bytes(image) if isinstance(image, Path) else png_bytes(image)
    folder, stem = out / "images" / split, PurePath(name).stem
    for suffix in IMAGE_SUFFIXES:
        other = folder / f"{stem}{suffix}"
        need(other.name == name or not other.exists(), f"{other}: is there; rename {name}")
    add_file(folder / name, content)
    if label is not None:
        mask = Image.fromarray(label)
        if palette:
            mask.putpalette(np.array(palette, np.uint8).tobytes())  # "L" becomes "P"
        add_file(out / "labels" / split / f"{stem}.png", png_bytes(mask))


def png_bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def add_file(path: Path, content: bytes) -> None:
    """Write a new file. One of the same content may be there; another one is never replaced."""
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        if not os.path.lexists(path):
            with open(path, "xb") as file:
                try:
                    file.write(content)
                    file.flush()
                except OSError:  # a full disk
                    path.unlink()
                    raise
        same = path.is_file() and path.read_bytes() == content
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    need(same, f"{path}: is there and is not the same; remove it, or choose another folder")


def report_unlabelled(shares: list[float]) -> None:
    """Report how much of the annotated images is not labelled: a network that never sees the
    background calls it something else."""
    if shares and (mean := sum(shares) / len(shares)) >= 0.005:
        print(f"{mean:.0%} of their pixels are not labelled; --background NAME makes them a class")
