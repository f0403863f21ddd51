"""COCO annotations (instances or panoptic) to the folder that --dataset folder reads.

    $ python examples/from_coco.py instances_train.json images mydata --split train
    $ python examples/from_coco.py instances_val.json images mydata --split val
    $ python examples/from_coco.py panoptic_val.json images mydata --split val --panoptic DIR

Every category becomes a class, in the order of the category ids. If instances overlap, the smaller
one is on top. Pixels that nobody annotated are not labelled (255), or with --background NAME a
class of that name, number 0. An image without annotations is unlabelled (and left out of val and
test), since nobody may have looked at it yet; with --empty-is-background it is all background. An
image keeps its name; if two share one, the names of its folders come before it (day/1.jpg:
day_1.jpg). An image or a mask that is in the folder already is never replaced.
"""

import argparse
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
from pycocotools import mask as rle
from tqdm import tqdm

from inputs.errors import UserError, need
from inputs.files import IGNORE, IMAGE_SUFFIXES, open_image, read_json


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, help="the JSON file")
    parser.add_argument("images", type=Path, help="the folder of the images")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train")
    parser.add_argument("--background", metavar="NAME", help="class of what nobody annotated")
    parser.add_argument(
        "--empty-is-background",
        action="store_true",
        help="images without annotations were looked at, and show none of the classes",
    )
    parser.add_argument(
        "--panoptic", type=Path, metavar="DIR", help="the folder of a panoptic file's PNGs"
    )
    return parser.parse_args()


# -------------------------------------------------------------------------------- the JSON file
def entries_of(content: object, kind: str, *keys: str) -> list[dict]:
    """One of the lists of a COCO file, whose entries are checked to have the keys."""
    found = content.get(kind) if isinstance(content, dict) else None
    need(isinstance(found, list), f"is not a COCO file: it has no list of {kind}")
    for number, entry in enumerate(found):
        whole = isinstance(entry, dict) and all(entry.get(key) is not None for key in keys)
        need(whole, f"entry {number} of {kind} lacks {' or '.join(keys)}")
    return found


def same_id(value: object) -> int | str:
    """An id by its value: some programs write numbers as text."""
    need(isinstance(value, int | str) and not isinstance(value, bool), f"the id {value!r} is odd")
    text = str(value).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def by_id(entries: list[dict], kind: str) -> dict[int | str, dict]:
    """The images or categories by id, each of which may occur once."""
    found = {}
    for entry in entries:
        key = same_id(entry["id"])
        need(key not in found, f"two {kind} have the id {key}")
        found[key] = entry
    return found


def check_coco(content: object, background: str | None) -> tuple[dict, dict, list[str], dict]:
    """The images by id, the annotations of each by its id, the classes, category id -> class."""
    images = by_id(entries_of(content, "images", "id", "file_name"), "images")
    categories = by_id(entries_of(content, "categories", "id", "name"), "categories")
    for entry in (*images.values(), *categories.values()):
        name = entry.get("file_name", entry.get("name"))
        need(isinstance(name, str), f"the name {name!r} is not text")
    annotations = {key: [] for key in images}
    lost = []
    for entry in entries_of(content, "annotations", "image_id"):
        key = same_id(entry["image_id"])
        annotations.get(key, lost).append(entry)
        segments = "segments_info" in entry
        for one in entries_of(entry, "segments_info", "id") if segments else [entry]:
            category = same_id(one.get("category_id", ""))
            need(category in categories, f"the category {category!r} is not listed")
        drawn = segments or entry.get("segmentation")
        need(drawn, "an annotation has no segmentation; boxes do not make masks")
    need(len(lost) == 0 or any(annotations.values()), "no annotation belongs to a listed image")
    if lost:
        print(f"{len(lost)} annotations belong to no listed image ({lost[0]['image_id']!r} ...)")
    order = sorted(categories, key=lambda key: (isinstance(key, str), key))
    first = [background] if background else []
    names = [categories[key]["name"] for key in order]
    classes = first + [name for name in names if name not in first]
    ids = {key: classes.index(name) for key, name in zip(order, names, strict=True)}
    return images, annotations, classes, ids


def read_coco(args: argparse.Namespace) -> tuple[dict, dict, list[str], dict]:
    """`check_coco` of the JSON file, which a UserError names."""
    content = read_json(args.annotations)
    try:
        return check_coco(content, args.background)
    except UserError as error:
        raise UserError(f"{args.annotations}: {error}") from None


# ------------------------------------------------------------------------------------- the masks
def run_lengths(counts: object, what: str) -> list[int]:
    """COCO's run lengths: a list, or text of five bits a character, in which each run from the
    fourth on is a difference from the last but one."""
    if isinstance(counts, list):
        return counts
    need(isinstance(counts, str) and counts.isascii(), f"{what}: a mask has no run lengths")
    runs, value, shift = [], 0, 0
    for code in counts.encode():
        bits = code - 48
        need(0 <= bits < 64 and shift < 60, f"{what}: the run lengths of a mask are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs


def to_rle(segmentation: object, size: tuple[int, int], what: str) -> dict:
    """pycocotools' form of an instance, its polygons or run lengths checked first: its C code
    reads on wherever they lead."""
    height, width = size
    if isinstance(segmentation, dict):
        need(segmentation.get("size") == [height, width], f"{what}: its mask has another size")
        runs = run_lengths(segmentation.get("counts"), what)
        whole = all(type(run) is int and run >= 0 for run in runs) and sum(runs) == height * width
        need(whole, f"{what}: its run lengths do not add up to {width}x{height} pixels")
        return rle.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    need(isinstance(segmentation, list), f"{what}: its segmentation is neither list nor mask")
    for polygon in segmentation:
        pairs = isinstance(polygon, list) and len(polygon) % 2 == 0 and len(polygon) >= 6
        need(pairs, f"{what}: a polygon is not three points x, y or more")
        need_points([[*pair] for pair in zip(*[iter(polygon)] * 2, strict=True)], size, what)
    return rle.merge(rle.frPyObjects(segmentation, height, width))


def paint_instances(instances: list, ids: dict, label: np.ndarray, what: str) -> None:
    """The instances of an image into its label uint8 [H, W], the largest first."""
    painted = [
        (to_rle(one["segmentation"], label.shape, what), ids[same_id(one["category_id"])])
        for one in instances
    ]
    for mask, number in sorted(painted, key=lambda pair: -int(rle.area(pair[0]))):
        label[rle.decode(mask) > 0] = number


def paint_segments(folder: Path, entry: dict, ids: dict, label: np.ndarray, what: str) -> None:
    """A panoptic PNG, in which R + 256 G + 65536 B is a segment's id, into the label uint8 [H, W]
    of its image."""
    name = entry.get("file_name")
    need(isinstance(name, str), f"{what}: has no panoptic PNG")
    rgb = np.asarray(open_image(folder / name)[0].convert("RGB")).astype(np.int64)
    need(rgb.shape[:2] == label.shape, f"{folder / name}: has another size than its image")
    segments = rgb @ np.array([1, 256, 65536])
    classes = {}
    for segment in entry["segments_info"]:
        key = same_id(segment["id"])
        need(key not in classes, f"{what}: two segments have the id {key}")
        classes[key] = ids[same_id(segment["category_id"])]
    present = {*np.unique(segments).tolist()}
    lost = (present - {0}) ^ classes.keys()
    for key in lost:
        raise UserError(f"{folder / name}: the segment {key} is in the PNG or the JSON only")
    for key, number in classes.items():
        label[segments == key] = number


def paint(args, size: tuple[int, int], entries: list[dict], ids: dict, what: str):
    """The label uint8 [H, W] of an image; None: it is unlabelled."""
    if not entries and not args.empty_is_background:
        return None
    label = np.full(size, 0 if args.background else IGNORE, np.uint8)
    folder = args.panoptic or args.annotations.with_suffix("")
    for entry in (one for one in entries if "segments_info" in one):
        paint_segments(folder, entry, ids, label, what)
    paint_instances([one for one in entries if "segments_info" not in one], ids, label, what)
    return label


def main() -> None:
    args = parse_options()
    need(
        args.background or not args.empty_is_background,
        "--empty-is-background has no effect without --background",
    )
    need(args.images.is_dir(), f"{args.images}: no such folder")
    images, annotations, classes, ids = read_coco(args)
    names = output_names([image["file_name"] for image in images.values()])
    found = {key: find_image(args.images, image["file_name"]) for key, image in images.items()}
    files = {os.path.realpath(path) for path in found.values()}
    need(len(files) == len(found), f"{args.annotations}: lists an image of {args.images} twice")
    write_classes(args.out, classes)
    shares = []  # not labelled, of each labelled image
    for (key, image), name in zip(tqdm(images.items(), disable=None), names, strict=True):
        size, what = image_size(found[key]), f"{args.annotations}: {image['file_name']}"
        need(
            (image.get("height"), image.get("width")) == size,
            f"{what}: width and height are {image.get('width')} and {image.get('height')}, those "
            f"of the file {size[1]} and {size[0]}",
        )
        label = paint(args, size, annotations[key], ids, what)
        if label is not None:
            shares.append((label == IGNORE).mean())
        if label is not None or args.split == "train":
            add_image(args.out, args.split, name, found[key], label)
    without = len(images) - len(shares)
    kind = "unlabelled" if args.split == "train" else "left out"
    print(f"{args.out}: {len(shares)} labelled images in {args.split}, {without} {kind}")
    if args.background and without:
        print(f"if those show nothing but {args.background}, add --empty-is-background")
    report_unlabelled(shares)
    report_unlisted(args, files)


def report_unlisted(args: argparse.Namespace, listed: set[str]) -> None:
    """Report how many images of the folder the JSON does not list: they may serve unlabelled."""
    here = args.out / "images" / "train"
    found = [path for path in args.images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    left = sum(os.path.realpath(path) not in listed for path in found)
    if left and args.split == "train" and os.path.realpath(args.images) != os.path.realpath(here):
        print(
            f"{args.images}: {left} more are not in the JSON; copied to {here} they are unlabelled"
        )


if __name__ == "__main__":
    launch(main)
