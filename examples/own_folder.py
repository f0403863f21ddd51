"""What from_coco.py and from_labelme.py share: the layout of `--dataset folder`."""

import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

NOT_LABELLED = 255


def refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def write_classes(out: Path, classes: list[str]) -> None:
    """OUT/classes.txt; one that is there, from another split, must have the same classes."""
    if not 2 <= len(classes) <= 253:
        refuse(f"{len(classes)} classes ({', '.join(classes[:5])}); 2 to 253 are possible")
    file, text = out / "classes.txt", "".join(f"{name}\n" for name in classes)
    if file.exists() and file.read_text() != text:
        refuse(f"{file}: has other classes than {', '.join(classes)}; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def add_picture(out: Path, split: str, image: Path, label: np.ndarray | None) -> None:
    """Copy a picture into OUT/images/SPLIT; its label, uint8 [H, W], goes into OUT/labels/SPLIT."""
    for kind in ("images", "labels"):
        (out / kind / split).mkdir(parents=True, exist_ok=True)
    if not image.is_file():
        refuse(f"{image}: no such picture")
    shutil.copy(image, out / "images" / split / image.name)
    if label is not None:
        Image.fromarray(label).save(out / "labels" / split / f"{image.stem}.png")
