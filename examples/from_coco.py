"""COCO annotations (instances or panoptic) to the folder that --dataset folder reads.

    $ python examples/from_coco.py instances_train.json images mydata --split train
    $ python examples/from_coco.py instances_val.json images mydata --split val
    $ python examples/from_coco.py panoptic_val.json images mydata --split val --panoptic DIR

Every category becomes a class, in the order of the category ids. Where instances overlap the
smaller one is on top. Pixels that nobody annotated are not labelled (255), or with --background
NAME a class of that name, number 0. A picture without annotations is unlabelled (and left out of
val and test), since nobody may have looked at it yet; with --empty-is-background it is all
background. A picture keeps its name, or where two share one has the names of its folders before it
(day/1.jpg: day_1.jpg).
"""

import argparse
import json
from pathlib import Path, PurePath

import numpy as np
from own_folder import (
    NOT_LABELLED,
    PICTURES,
    add_picture,
    distinct_names,
    refuse,
    tell_share,
    write_classes,
)
from PIL import Image
from pycocotools.coco import COCO
from tqdm import tqdm


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, help="the JSON file")
    parser.add_argument("images", type=Path, help="the folder of the pictures")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train")
    parser.add_argument("--background", metavar="NAME", help="class of what nobody annotated")
    parser.add_argument(
        "--empty-is-background",
        action="store_true",
        help="pictures without annotations were looked at, and show none of the classes",
    )
    parser.add_argument(
        "--panoptic", type=Path, metavar="DIR", help="where a panoptic file's PNGs lie"
    )
    return parser.parse_args()


def read_coco(args: argparse.Namespace) -> tuple[list[dict], dict[int, list[dict]], list, dict]:
    """The pictures, the annotations of each (by its id), the classes, and category id -> class."""
    try:
        content = json.loads(args.annotations.read_bytes())
        pictures, entries = content["images"], content["annotations"]
        names = {one["id"]: one["name"] for one in content["categories"]}
        order = sorted(names)
        by_image = {image["id"]: [] for image in pictures}
        twice = len(by_image) < len(pictures)
        for image in pictures:  # as Windows may write them
            image["file_name"] = image["file_name"].replace("\\", "/")
        for entry in entries:
            by_image.setdefault(entry["image_id"], []).append(entry)
        marked = [one for entry in entries for one in entry.get("segments_info", [entry])]
        odd = sorted({one["category_id"] for one in marked} - names.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"{args.annotations}: is no COCO file ({type(error).__name__}: {error})")
    if odd:
        refuse(f"{args.annotations}: an annotation has the category {odd[0]}, which is not listed")
    if not all(entry.get("segmentation") or "segments_info" in entry for entry in entries):
        refuse(f"{args.annotations}: an annotation has no segmentation; boxes alone make no masks")
    if twice:
        refuse(f"{args.annotations}: two of its pictures have the same id")
    first = [args.background] if args.background else []
    classes = first + [names[one] for one in order if names[one] not in first]
    return pictures, by_image, classes, {one: classes.index(names[one]) for one in names}


def paint_instances(coco: COCO, instances: list, ids: dict, label: np.ndarray) -> None:
    """The instances of a picture into its label uint8 [H, W], the largest first."""
    for instance in sorted(instances, key=lambda one: -(one.get("area") or 0)):
        label[coco.annToMask(instance) > 0] = ids[instance["category_id"]]


def paint_segments(file: Path, entry: dict, ids: dict, label: np.ndarray) -> None:
    """A panoptic PNG, in which R + 256 G + 65536 B is a segment's id, into the label uint8 [H, W]
    of its picture."""
    if not file.is_file():
        refuse(f"{file}: no such PNG (--panoptic names its folder)")
    red, green, blue = (
        np.asarray(Image.open(file).convert("RGB")).astype(np.int64).transpose(2, 0, 1)
    )
    segments = red + 256 * green + 65536 * blue
    for segment in entry["segments_info"]:
        label[segments == segment["id"]] = ids[segment["category_id"]]


def paint(args, coco: COCO, image: dict, entries: list[dict], ids: dict) -> np.ndarray | None:
    """The label uint8 [H, W] of a picture; None: it is unlabelled."""
    if not entries and not args.empty_is_background:
        return None
    try:
        nothing = 0 if args.background else NOT_LABELLED
        label = np.full((image["height"], image["width"]), nothing, np.uint8)
        for entry in (one for one in entries if "segments_info" in one):
            folder = args.panoptic or args.annotations.with_suffix("")
            paint_segments(folder / entry["file_name"], entry, ids, label)
        paint_instances(coco, [one for one in entries if "segments_info" not in one], ids, label)
        return label
    except Exception as error:  # pycocotools raises plain ones
        refuse(
            f"{args.annotations}: the annotations of {image['file_name']} cannot be painted "
            f"({type(error).__name__}: {error})"
        )


def main() -> None:
    args = parse_options()
    if args.empty_is_background and not args.background:
        refuse("--empty-is-background has no meaning without --background")
    pictures, by_image, classes, ids = read_coco(args)
    coco = COCO()
    coco.imgs = {image["id"]: image for image in pictures}
    names = distinct_names([PurePath(image["file_name"]) for image in pictures])
    write_classes(args.out, classes)
    shares = []  # not labelled, of each labelled picture
    for image, name in zip(tqdm(pictures, unit="picture", disable=None), names, strict=True):
        label = paint(args, coco, image, by_image[image["id"]], ids)
        if label is not None:
            shares.append((label == NOT_LABELLED).mean())
        if label is not None or args.split == "train":
            add_picture(args.out, args.split, args.images / image["file_name"], label, name)
    without = len(pictures) - len(shares)
    kind = "unlabelled" if args.split == "train" else "left out"
    print(f"{args.out}: {len(shares)} labelled pictures in {args.split}, {without} {kind}")
    if args.background and without:
        print(f"if those show nothing but {args.background}, add --empty-is-background")
    tell_share(shares)
    tell_left(args, {image["file_name"] for image in pictures})


def tell_left(args: argparse.Namespace, listed: set[str]) -> None:
    """Say how many pictures of the folder the JSON does not list: they may serve unlabelled."""
    here = args.out / "images" / "train"
    found = [path for path in args.images.rglob("*") if path.suffix.lower() in PICTURES]
    left = sum(path.relative_to(args.images).as_posix() not in listed for path in found)
    if left and args.split == "train" and args.images.resolve() != here.resolve():
        print(
            f"{args.images}: {left} more are not in the JSON; copied to {here} they are unlabelled"
        )


if __name__ == "__main__":
    main()
