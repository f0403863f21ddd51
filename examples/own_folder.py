"""What from_coco.py and from_labelme.py share: the layout of `--dataset folder`."""

import shutil
import sys
from pathlib import Path, PurePath
from typing import NoReturn

import numpy as np
from PIL import Image

NOT_LABELLED = 255
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".jfif")


def refuse(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def read_text(file: Path) -> str:
    """A text file, without the mark that Windows sets before it."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        refuse(f"{file}: is no text file in UTF-8; save it as one")
    except OSError as error:
        refuse(f"{file}: cannot be read ({error.strerror})")


def write_classes(out: Path, classes: list[str]) -> None:
    """OUT/classes.txt; one that is there, from another split, must have the same classes."""
    for name in classes:
        if not name or name.startswith("#") or name != " ".join(name.split()):
            refuse(f"{name!r} cannot be the name of a class (a line of classes.txt); rename it")
        if classes.count(name) > 1:
            refuse(f"two classes are called {name}; rename one")
    if not 2 <= len(classes) <= 253:
        more = "; --background NAME adds one" if len(classes) == 1 else ""
        refuse(f"{len(classes)} classes ({', '.join(classes[:5])}); 2 to 253 are possible{more}")
    file, text = out / "classes.txt", "".join(f"{name}\n" for name in classes)
    if file.exists() and read_text(file) != text:
        refuse(f"{file}: has other classes than {', '.join(classes)}; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    except OSError as error:
        refuse(f"{file}: cannot be written ({error.strerror or error})")


def distinct_names(paths: list[PurePath]) -> list[str]:
    """A file name for each picture, no stem twice, since stems join labels to pictures: its own
    name, or where two would be the same those of its folders too (day/1.jpg: day_1.jpg)."""
    for names in ([path.name for path in paths], ["_".join(path.parts) for path in paths]):
        by_stem = {PurePath(name).stem: path for name, path in zip(names, paths, strict=True)}
        if len(by_stem) == len(paths):
            return names
    stems = [PurePath(name).stem for name in names]
    twice = next(stem for stem in stems if stems.count(stem) > 1)
    first, second = [path for path, stem in zip(paths, stems, strict=True) if stem == twice][:2]
    refuse(f"{first} and {second}: their labels would both be called {twice}.png; rename one")


def add_picture(
    out: Path, split: str, image: Path, label: np.ndarray | None, name: str | None = None
) -> None:
    """Copy a picture into OUT/images/SPLIT, as `name` or its own; its label, uint8 [H, W], goes
    into OUT/labels/SPLIT."""
    name = name or image.name
    target = out / "images" / split / name
    if not image.is_file():
        refuse(f"{image}: no such picture")
    try:
        for kind in ("images", "labels"):
            (out / kind / split).mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(image)):  # it may lie there already
            shutil.copy(image, target)
        if label is not None:
            Image.fromarray(label).save(out / "labels" / split / f"{target.stem}.png")
    except OSError as error:
        refuse(f"{error.filename or out}: cannot be written ({error.strerror or error})")


def tell_share(shares: list[float]) -> None:
    """Say how much of the annotated pictures is not labelled: a network that is never shown the
    background calls it something else."""
    if shares and (mean := sum(shares) / len(shares)) >= 0.005:
        print(f"{mean:.0%} of their pixels are not labelled; --background NAME makes them a class")
