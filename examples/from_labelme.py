"""labelme's JSON files to the folder that --dataset folder reads.

    $ python examples/from_labelme.py annotated mydata --split train
    $ python examples/from_labelme.py annotated_val mydata --split val --background background

A JSON file lies beside its picture; pictures without one are unlabelled. The classes are the names
found, sorted, or the lines of --labels FILE (of OUT/classes.txt, where another split was written
before). Later shapes are painted over earlier ones; a shape called __ignore__ is not labelled
(255). What nobody outlined is not labelled either, or with --background NAME a class of that name,
number 0. Polygons, rectangles, circles, lines, points and masks are known.
"""

import argparse
import base64
import io
import json
import math
from pathlib import Path, PurePath

import numpy as np
from own_folder import (
    NOT_LABELLED,
    PICTURES,
    add_picture,
    distinct_names,
    read_text,
    refuse,
    tell_share,
    write_classes,
)
from PIL import Image, ImageDraw
from tqdm import tqdm

IGNORED = "__ignore__"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotated", type=Path, help="the folder of pictures and JSON files")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train")
    parser.add_argument("--background", metavar="NAME", help="class of what nobody outlined")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="the class names, one a line")
    parser.add_argument("--width", type=int, default=5, help="of lines and points, in pixels")
    return parser.parse_args()


def read_shapes(file: Path) -> dict:
    """A labelme file with what is used of it; one line where it is none."""
    try:
        content = json.loads(file.read_bytes())
        shapes = [(s["label"], s.get("shape_type") or "polygon", s) for s in content["shapes"]]
        size = int(content["imageHeight"]), int(content["imageWidth"])
        image = file.parent / content["imagePath"].replace("\\", "/")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"{file}: is no labelme file ({type(error).__name__}: {error})")
    return {"file": file, "shapes": shapes, "size": size, "image": image}


def mask_of(file: Path, kind: str, shape: dict, size: tuple[int, int], width: int) -> np.ndarray:
    """The pixels of a shape, bool [H, W]."""
    picture = Image.new("1", size[::-1])
    draw = ImageDraw.Draw(picture)
    points = [tuple(point) for point in shape["points"]]
    if kind in ("polygon", "oriented_rectangle") and len(points) >= 3:
        draw.polygon(points, fill=1, outline=1)
    elif kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        draw.rectangle([min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)], fill=1)
    elif kind == "circle" and len(points) == 2:
        (x, y), radius = points[0], math.dist(*points)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)
    elif kind in ("line", "linestrip") and len(points) >= 2:
        draw.line(points, fill=1, width=width)
    elif kind in ("point", "points") and points:
        for x, y in points:
            draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=1)
    elif kind == "mask" and len(points) == 2:
        patch = Image.open(io.BytesIO(base64.b64decode(shape["mask"]))).convert("1")
        picture.paste(patch, tuple(round(value) for value in points[0]))
    else:
        refuse(f"{file}: a {kind} of {len(points)} points is not known")
    return np.array(picture)


def choose_classes(args: argparse.Namespace, names: set[str]) -> list[str]:
    """The background first; then the lines of --labels, or of the classes.txt of another split (a
    class may be missing in this one), or else the names found, sorted."""
    first = [args.background] if args.background else []
    written = args.out / "classes.txt"
    file = args.labels or (written if written.exists() else None)
    if not file:
        return first + sorted(names)
    lines = [line.strip() for line in read_text(file).splitlines()]
    listed = [line for line in lines if line and line not in (IGNORED, args.background)]
    unknown = sorted(names - set(listed))
    if unknown:
        refuse(f"{file}: lacks {unknown[0]}, which a shape in {args.annotated} is called")
    return first + listed


def main() -> None:
    args = parse_options()
    if not args.annotated.is_dir():
        refuse(f"{args.annotated}: no such folder")
    files = [read_shapes(file) for file in sorted(args.annotated.glob("[!.]*.json"))]
    if not files:
        refuse(f"{args.annotated}: holds no .json")
    annotated = {one["image"].resolve() for one in files}
    others = [
        path
        for path in sorted(args.annotated.iterdir() if args.split == "train" else [])
        if path.suffix.lower() in PICTURES
        and not path.name.startswith(".")
        and path.resolve() not in annotated
    ]
    distinct_names([PurePath(path.name) for path in [*(one["image"] for one in files), *others]])
    names = {name for one in files for name, _, _ in one["shapes"]} - {IGNORED, args.background}
    classes = choose_classes(args, names)
    write_classes(args.out, classes)
    ids = {name: i for i, name in enumerate(classes)} | {IGNORED: NOT_LABELLED}
    shares = []  # not labelled, of each annotated picture
    for one in tqdm(files, unit="picture", disable=None):
        label = np.full(one["size"], 0 if args.background else NOT_LABELLED, np.uint8)
        for name, kind, shape in one["shapes"]:
            try:
                label[mask_of(one["file"], kind, shape, one["size"], args.width)] = ids[name]
            except (OSError, ValueError, KeyError, TypeError) as error:
                refuse(f"{one['file']}: a {kind} called {name} cannot be drawn ({error})")
        shares.append((label == NOT_LABELLED).mean())
        add_picture(args.out, args.split, one["image"], label)
    for picture in others:
        add_picture(args.out, args.split, picture, None)
    print(f"{args.out}: {len(files)} annotated pictures in {args.split}, {len(others)} others")
    tell_share(shares)


if __name__ == "__main__":
    main()
