"""labelme's JSON files to the folder that --dataset folder reads.

    $ python examples/from_labelme.py annotated mydata --split train
    $ python examples/from_labelme.py annotated_val mydata --split val --background background

A JSON file is beside its image; images without one are unlabelled. The classes are the names found,
sorted, or the lines of --labels FILE (of OUT/classes.txt, if another split was written before).
Later shapes are painted over earlier ones; a shape called __ignore__ is not labelled (255). What
nobody outlined is not labelled either, or with --background NAME a class of that name, number 0.
Polygons, rectangles, circles, lines, points and masks are read. An image or a mask that is in the
folder already is never replaced.
"""

import argparse
import base64
import io
import math
import os
from pathlib import Path

import numpy as np
from own_folder import (
    add_image,
    find_image,
    image_size,
    launch,
    need_points,
    output_names,
    report_unlabelled,
    write_classes,
)
from PIL import Image, ImageDraw
from tqdm import tqdm

from inputs.errors import UserError, need
from inputs.files import IGNORE, IMAGE_SUFFIXES, read_json, read_text

IGNORED = "__ignore__"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotated", type=Path, help="the folder of images and JSON files")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train")
    parser.add_argument("--background", metavar="NAME", help="class of what nobody outlined")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="the class names, one a line")
    parser.add_argument("--width", type=int, default=5, help="of lines and points, in pixels")
    return parser.parse_args()


def read_annotation(file: Path) -> dict:
    """A labelme file: its "image" (a path), "size" (H, W) and "shapes", each a dict of label, kind,
    points and mask. Raises UserError that names the file if it is anything else."""
    content = read_json(file)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    name = content.get("imagePath") if isinstance(content, dict) else None
    need(isinstance(shapes, list) and isinstance(name, str), f"{file}: is not a labelme file")
    image = find_image(file.parent, name)
    size = image_size(image)
    stated = content.get("imageHeight"), content.get("imageWidth")
    need(
        stated == size,
        f"{file}: is not a labelme file of {image.name}: imageHeight and imageWidth are {stated}, "
        f"those of the image {size}",
    )
    found = []
    for shape in shapes:
        label = shape.get("label") if isinstance(shape, dict) else None
        need(isinstance(label, str), f"{file}: a shape's label is {label!r}, not text")
        kind = shape.get("shape_type") or "polygon"
        need_points(shape.get("points"), size, f"{file}: a shape called {label!a}")
        found.append(dict(label=label, kind=kind, points=shape["points"], mask=shape.get("mask")))
    return {"image": image, "size": size, "shapes": found, "file": file}


def mask_of(shape: dict, size: tuple[int, int], width: int, file: Path) -> np.ndarray:
    """The pixels of a shape, bool [H, W]."""
    canvas = Image.new("1", size[::-1])
    draw = ImageDraw.Draw(canvas)
    kind, points = shape["kind"], [tuple(point) for point in shape["points"]]
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
        (x1, y1), (x2, y2) = points  # the first and the last pixel
        patch = decode_mask(shape["mask"], (round(x2 - x1) + 1, round(y2 - y1) + 1), file)
        canvas.paste(patch, (round(x1), round(y1)))
    else:
        raise UserError(f"{file}: a {kind} of {len(points)} points is not known")
    return np.array(canvas)


def decode_mask(text: object, size: tuple[int, int], file: Path) -> Image.Image:
    """labelme's mask, a PNG in base64 of its box's size (W, H), grey 0 and 1 or black and white."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as png:
            need(png.size == size, f"{file}: a mask is not of the size of its box")
            return Image.fromarray(np.asarray(png.convert("L")) > 0)
    except UserError:
        raise
    except Exception as error:  # decoders raise many kinds
        raise UserError(f"{file}: a mask cannot be decoded ({type(error).__name__})") from None


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
        raise UserError(f"{file}: lacks {unknown[0]!a}, the label of a shape in {args.annotated}")
    return first + listed


def main() -> None:
    args = parse_options()
    need(args.width > 0, f"--width {args.width}: 1 or more")
    need(args.annotated.is_dir(), f"{args.annotated}: no such folder")
    files = [read_annotation(file) for file in sorted(args.annotated.glob("[!.]*.json"))]
    need(files, f"{args.annotated}: holds no .json")
    annotated = {os.path.realpath(one["image"]) for one in files}
    others = [
        path
        for path in sorted(args.annotated.iterdir() if args.split == "train" else [])
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and os.path.realpath(path) not in annotated
    ]
    images = [*(one["image"] for one in files), *others]
    output_names([path.name for path in images])
    classes = {shape["label"] for one in files for shape in one["shapes"]}
    classes = choose_classes(args, classes - {IGNORED, args.background})
    write_classes(args.out, classes)
    ids = {name: i for i, name in enumerate(classes)} | {IGNORED: IGNORE}
    shares = []  # not labelled, of each annotated image
    for one in tqdm(files, unit="image", disable=None):
        label = np.full(one["size"], 0 if args.background else IGNORE, np.uint8)
        for shape in one["shapes"]:
            label[mask_of(shape, one["size"], args.width, one["file"])] = ids[shape["label"]]
        shares.append((label == IGNORE).mean())
        add_image(args.out, args.split, one["image"].name, one["image"], label)
    for image in others:
        add_image(args.out, args.split, image.name, image)
    print(f"{args.out}: {len(files)} annotated images in {args.split}, {len(others)} others")
    report_unlabelled(shares)


if __name__ == "__main__":
    launch(main)
