"""Predict masks with a trained run: for every picture an index PNG in the run's palette, of the
picture's own size, and an overlay.

    python predict.py RUN photo.jpg holiday --out-dir predictions   # holiday/a/b.jpg -> a/b.png
    python predict.py RUN unlabelled --out-dir predictions --suggest 10    # ... and what to label
    python predict.py RUN --onnx network.onnx      # RGB [B, 3, H, W] in 0 .. 1 -> logits
    python predict.py --checkpoint published_reco.pth --dataset cityscapes street.png \\
        --out-dir predictions
"""

import argparse
import glob
import importlib.util
import itertools
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import models
from engine.options import add_prediction_options, new_parser, number, positive
from engine.processes import launch
from inputs.errors import UserError, first_line, need, note
from inputs.files import IMAGE_SUFFIXES, need_utf8, partial_of, read_image, write
from inputs.folder import OTHER_PICTURES, all_pictures
from inputs.source import name_of
from inputs.transforms import upsample
from models import PUBLISHED, load_published

ENDINGS = (".png", "_overlay.png", "_confidence.png")
LONGEST_NAME = 255  # bytes, on most file systems


def parse_options() -> argparse.Namespace:
    parser = new_parser(__doc__, usage="predict.py [options] RUN IMAGE_OR_FOLDER ... --out-dir DIR")
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="RUN IMAGE_OR_FOLDER",
        help="a run's folder (or user/name on the hub), then pictures and folders of pictures",
    )
    add("--out-dir", metavar="DIR", help="where the masks and overlays go")
    add("--checkpoint", metavar="FILE", help="a published ReCo checkpoint (.pth) instead of a run")
    add("--dataset", choices=PUBLISHED, help="what the checkpoint was trained on")
    add(
        "--confidence",
        action="store_true",
        help="also write the probability of the predicted class as a grey PNG, 255 = 1",
    )
    add(
        "--suggest",
        type=positive,
        metavar="N",
        help="print the N pictures to label next, least certain first, those the run was trained "
        "on with a label left out, and write them to DIR/suggest.txt; the score is the mean over "
        "the pixels of 1 - the probability of the predicted class",
    )
    add_prediction_options(add)
    add(
        "--tile",
        type=number(int, 32, 2**15, "a whole number from 32 on"),
        default=1024,
        metavar="N",
        help="predict larger pictures in tiles of this side; smaller ones need less memory",
    )
    add(
        "--onnx",
        metavar="FILE",
        help="export the network, with normalisation and upsampling, for any size (what else "
        "resizes pictures here is not part of it)",
    )
    args = parser.parse_intermixed_args()
    args.run = None
    if args.paths and not args.checkpoint:
        args.run = args.paths.pop(0)
    need(
        args.checkpoint or not args.dataset, "--dataset goes with --checkpoint; a run knows its own"
    )
    model = args.run or args.checkpoint
    need(model, "name a run's folder or --checkpoint FILE")
    need(args.paths or args.onnx, f"name pictures or folders after {model}, or --onnx FILE")
    need(args.out_dir or not args.paths, "--out-dir DIR is missing: where the masks go")
    return args


# --------------------------------------------------------------------------- pictures and outputs
def find_pictures(paths: list[str], out_dir: Path) -> dict[Path, Path]:
    """Every picture that `paths` name, folders walked, and where its output goes (a path without
    ending). Sub-folders are kept; no two pictures share an output, and nothing is written over but
    earlier predictions. Raises UserError for a path that leads to no picture."""
    found: dict[Path, Path] = {}  # picture -> its name below out_dir
    several = sum(Path(path).is_dir() for path in paths) > 1
    for path in map(Path, paths):
        if path.is_file():
            found.setdefault(path.absolute(), Path(path.name))
            continue
        need(path.is_dir(), f"{path}: no such picture or folder")
        parent = Path(path.resolve().name) if several else Path()
        for file in pictures_below(path, out_dir):
            found.setdefault(file.absolute(), parent / file.relative_to(path))
    for picture in found:
        need_utf8(picture)
    pictures = {picture.resolve() for picture in found}
    targets, taken = {}, set()
    for picture, name in found.items():
        stem = free_stem(name, out_dir, taken)
        targets[picture] = stem
        longest = partial_of(Path(f"{stem}{ENDINGS[-1]}")).name
        need(
            len(os.fsencode(longest)) <= LONGEST_NAME,
            f"{picture}: its name is too long for a mask of that name; rename it",
        )
        need(
            not any(Path(f"{stem}{ending}").resolve() in pictures for ending in ENDINGS),
            f"--out-dir {out_dir}: the mask of {picture} would be written over a picture; choose "
            "another",
        )
        mask, overlay = (Path(f"{stem}{ending}") for ending in ENDINGS[:2])
        need(
            overlay.exists() or not mask.exists(),
            f"{mask}: is there without {overlay.name}, so it is no earlier prediction, and it is "
            "not written over; choose another --out-dir",
        )
    return targets


def pictures_below(folder: Path, out_dir: Path) -> list[Path]:
    """The pictures in a folder and its sub-folders, hidden ones and earlier predictions left
    out."""
    root, out = folder.resolve(), out_dir.resolve()
    need(
        root != out,
        f"--out-dir {out_dir}: is the folder of the pictures; choose another, or the masks would "
        "be taken for pictures next time",
    )
    inside = root in out.parents
    files = [p for p in all_pictures(folder) if not (inside and p.resolve().is_relative_to(out))]
    others = [path for path in files if path.suffix.lower() in OTHER_PICTURES]
    files = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    suffixes = ", ".join(IMAGE_SUFFIXES)
    need(files, f"{folder}: holds no picture ({suffixes}), nor do its sub-folders")
    if others:
        note(f"{len(others)} pictures are left out ({others[0]} ...): only {suffixes} are read")
    return files


def free_stem(name: Path, out_dir: Path, taken: set[str]) -> Path:
    """Where the output of a picture goes: a.jpg -> a; beside it a.png -> a.png; then numbers."""
    numbers = (name.with_name(f"{name.stem}-{i}") for i in itertools.count(2))
    for stem in itertools.chain([name.with_suffix(""), name], numbers):
        outputs = {f"{out_dir / stem}{ending}".lower() for ending in ENDINGS}
        if taken.isdisjoint(outputs):
            taken |= outputs
            return out_dir / stem


def write_masks(stem: Path, image: Tensor, label, confidence, palette) -> None:
    """STEM.png, STEM_overlay.png and, with a confidence, STEM_confidence.png."""
    mask = Image.fromarray(label)
    colours = np.full((256, 3), 255, np.uint8)  # of fewer the file would have too few bits for 255
    colours[: len(palette)] = palette
    mask.putpalette(colours.tobytes())  # "L" becomes "P"
    photograph = Image.fromarray(image.permute(1, 2, 0).numpy())
    overlay = Image.blend(photograph, mask.convert("RGB"), 0.5)
    save_png(Path(f"{stem}_overlay.png"), overlay, compress_level=1)  # first, see `find_pictures`
    save_png(Path(f"{stem}.png"), mask)
    if confidence is not None:
        grey = (confidence.clip(0, 1) * 255).round().astype(np.uint8)
        save_png(Path(f"{stem}_confidence.png"), Image.fromarray(grey))


def save_png(path: Path, picture: Image.Image, compress_level: int = 6) -> None:
    write(path, lambda file: picture.save(file, "PNG", compress_level=compress_level))


def suggest(
    scores: list[tuple[float, Path]], run: str | None, number: int
) -> tuple[list[str], int]:
    """The lines of suggest.txt: the pictures to label next, least certain first. Left out are those
    of the name of one that the run was trained on with a label, and those of images/... with a mask
    in labels/...; how many these are."""
    file = Path(run or ".") / "labeled.txt"
    labelled = set(file.read_text("utf-8").splitlines()) if run and file.exists() else set()
    unsure = [
        (score, picture)
        for score, picture in scores
        if name_of(picture).removesuffix("_leftImg8bit") not in labelled and not has_mask(picture)
    ]
    left_out = len(scores) - len(unsure)
    unsure = sorted(unsure, key=lambda entry: -entry[0])[:number]
    return [f"{score:.4f}  {picture}" for score, picture in unsure], left_out


def has_mask(picture: Path) -> bool:
    """Whether a picture in the layout of `--dataset folder` has a label."""
    images, part = picture.parent.parent, picture.parent.name
    return images.name == "images" and any(
        (images.parent / "labels" / part).glob(f"{glob.escape(picture.stem)}.[pP][nN][gG]")
    )


# ------------------------------------------------------------------------------------ ONNX export
class FullSizeNetwork(nn.Module):
    """What --onnx writes: normalisation, network and upsampling to the picture's size."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return upsample(self.model(images)[0], images.shape[-2:])


def export_onnx(model: nn.Module, classes: list[str], path: Path) -> None:
    """One file for any batch size, height and width; the class names stand in its metadata."""
    missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    need(
        not missing,
        f"--onnx needs packages that are not installed: pip install {' '.join(missing)}",
    )
    need(not path.is_dir(), f"--onnx {path}: is a folder; name a file")
    need(
        path.parent.is_dir() and os.access(path.parent, os.W_OK),
        f"--onnx {path}: {path.parent} is no folder that can be written to",
    )
    example = torch.rand(2, 3, 96, 128, device=next(model.parameters()).device)
    try:
        program = torch.onnx.export(
            FullSizeNetwork(model).eval(),
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
        )
    except torch.onnx.OnnxExporterError as error:
        reason = first_line(error)
        raise UserError(f"--onnx {path}: this network cannot be exported ({reason})") from None
    graph = program.model_proto
    graph.metadata_props.add(key="classes", value=json.dumps(classes))
    write(path, lambda file: file.write(graph.SerializeToString()))


def main() -> None:
    args = parse_options()
    warnings.filterwarnings("ignore", module="PIL")  # about metadata, or a size that is dealt with
    targets = find_pictures(args.paths, Path(args.out_dir)) if args.paths else {}
    if args.checkpoint:
        model = load_published(args.checkpoint, args.dataset)
    else:
        model = models.load(args.run)
    model.to(Accelerator().device)
    try:
        Path(args.out_dir or ".").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out-dir {args.out_dir}: cannot be made ({error.strerror})") from None
    if args.onnx:
        export_onnx(model, model.classes, Path(args.onnx))
        print(f"network written to {args.onnx}")

    window = tuple(model.config["crop_size"]) if args.sliding_window else None
    options = dict(tile=args.tile, scales=args.scales, flip=args.flip, window=window)
    scores = []
    hidden = None if targets else True  # None: shown on a terminal alone
    bar = tqdm(targets.items(), unit="picture", disable=hidden, dynamic_ncols=True)
    for picture, stem in bar:
        try:
            image = read_image(picture)
        except UserError as error:  # the others can still be predicted
            tqdm.write(f"predict.py: {error}", file=sys.stderr)
            continue
        label, confidence = model.predict(image, confidence=True, **options)
        write_masks(stem, image, label, confidence if args.confidence else None, model.palette)
        scores.append((1 - float(confidence.mean()), picture))
    report(args, targets, scores)
    sys.exit(0 if len(scores) == len(targets) else 1)


def report(args: argparse.Namespace, targets: dict, scores: list[tuple[float, Path]]) -> None:
    """What was written, and what to label next."""
    endings = "masks NAME.png, NAME_overlay.png"
    if args.confidence:
        endings += ", NAME_confidence.png"
    if args.suggest and scores:
        lines, left_out = suggest(scores, args.run, args.suggest)
        text = "".join(f"{line}\n" for line in lines)
        print(text, end="")
        write(Path(args.out_dir) / "suggest.txt", lambda file: file.write(text.encode()))
        if left_out:
            print(f"left out, since a picture of the same name has a label: {left_out}")
        endings += ", suggest.txt"
    if targets:
        print(f"{len(scores)} of {len(targets)} pictures: {endings} in {args.out_dir}")


if __name__ == "__main__":
    launch(main)
