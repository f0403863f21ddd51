"""COCO annotations (instances or panoptic) to the folder that --dataset folder reads.

    $ python examples/from_coco.py instances_train.json images mydata --split train
    $ python examples/from_coco.py instances_val.json images mydata --split val
    $ python examples/from_coco.py panoptic_val.json images mydata --split val --panoptic DIR

Every category becomes a class, in the order of the category ids. Where instances overlap the
smaller one is on top. Pixels that nobody annotated are not labelled (255), or with --background
NAME a class of that name, number 0. A picture without annotations is unlabelled; with --background
it is all background. A picture keeps its name, or where two share one has the names of its folders
before it (day/1.jpg: day_1.jpg).
"""

import argparse
import contextlib
import io
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
        "--panoptic", type=Path, metavar="DIR", help="where a panoptic file's PNGs lie"
    )
    return parser.parse_args()


def paint_instances(coco: COCO, image: dict, ids: dict[int, int], nothing: int) -> np.ndarray:
    """The label uint8 [H, W] of a picture: its instances, the largest first."""
    label = np.full((image["height"], image["width"]), nothing, np.uint8)
    instances = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
    for instance in sorted(instances, key=lambda one: -one.get("area", 0)):
        label[coco.annToMask(instance) > 0] = ids[instance["category_id"]]
    return label


def paint_segments(folder: Path, entry: dict, ids: dict[int, int], nothing: int) -> np.ndarray:
    """The label uint8 [H, W] of a panoptic PNG, in which R + 256 G + 65536 B is a segment's id."""
    file = folder / entry["file_name"]
    if not file.is_file():
        refuse(f"{file}: no such PNG (--panoptic names its folder)")
    red, green, blue = (
        np.asarray(Image.open(file).convert("RGB")).astype(np.int64).transpose(2, 0, 1)
    )
    segments = red + 256 * green + 65536 * blue
    label = np.full(segments.shape, nothing, np.uint8)
    for segment in entry["segments_info"]:
        label[segments == segment["id"]] = ids[segment["category_id"]]
    return label


def main() -> None:
    args = parse_options()
    try:
        content = json.loads(args.annotations.read_bytes())
        categories = sorted(content["categories"], key=lambda one: one["id"])
        pictures, entries = content["images"], content["annotations"]
        first = [args.background] if args.background else []
        ids = {one["id"]: i for i, one in enumerate(categories, start=len(first))}
        classes = first + [one["name"] for one in categories]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"{args.annotations}: is no COCO file ({type(error).__name__}: {error})")
    nothing = 0 if args.background else NOT_LABELLED
    panoptic = bool(entries) and "segments_info" in entries[0]
    if panoptic:
        by_image = {entry["image_id"]: entry for entry in entries}
        folder = args.panoptic or args.annotations.with_suffix("")
    else:
        coco = load_instances(args.annotations)
    annotated = {entry["image_id"] for entry in entries}
    marked = [one for entry in entries for one in entry.get("segments_info", [entry])]
    odd = sorted({one["category_id"] for one in marked} - ids.keys())
    if odd:
        refuse(f"{args.annotations}: an annotation has the category {odd[0]}, which is not listed")
    if not panoptic and not all(entry.get("segmentation") for entry in entries):
        refuse(f"{args.annotations}: an annotation has no segmentation; boxes alone make no masks")
    names = distinct_names([PurePath(image["file_name"]) for image in pictures])
    write_classes(args.out, classes)
    shares = []  # not labelled, of each annotated picture
    for image, name in zip(tqdm(pictures, unit="picture", disable=None), names, strict=True):
        label = None
        if panoptic and image["id"] in annotated:
            label = paint_segments(folder, by_image[image["id"]], ids, nothing)
        elif not panoptic and (image["id"] in annotated or args.background):
            label = paint_instances(coco, image, ids, nothing)
        if label is not None:
            shares.append((label == NOT_LABELLED).mean())
        add_picture(args.out, args.split, args.images / image["file_name"], label, name)
    print(f"{args.out}: {len(pictures)} pictures, {len(annotated)} annotated, in {args.split}")
    tell_share(shares)
    here, listed = args.out / "images" / "train", {image["file_name"] for image in pictures}
    found = [path for path in args.images.rglob("*") if path.suffix.lower() in PICTURES]
    left = sum(path.relative_to(args.images).as_posix() not in listed for path in found)
    if left and args.split == "train" and args.images.resolve() != here.resolve():
        print(
            f"{args.images}: {left} more are not in the JSON; copied to {here} they are unlabelled"
        )


def load_instances(file: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):  # its chatter
        return COCO(str(file))


if __name__ == "__main__":
    main()
