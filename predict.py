"""Predict masks with a trained run: for every image an index PNG of its size, in the run's palette,
and an overlay.

    python predict.py RUN photo.jpg holiday --out-dir DIR   # holiday/a/b.jpg -> DIR/a/b.png
    python predict.py RUN unlabelled --out-dir DIR --suggest 10  # and what to label next
    python predict.py RUN --onnx network.onnx               # RGB [B, 3, H, W] in 0 .. 1 -> logits
    python predict.py --checkpoint published_reco.pth --dataset cityscapes a.png --out-dir DIR

Inputs are never overwritten. An image that cannot be read is reported and left out; the exit status
is then 1.
"""

import argparse
import glob
import importlib.util
import itertools
import json
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from engine.evaluation import predict_images
from engine.options import add_prediction_options, new_parser, number, positive
from engine.processes import cores, launch
from inputs.errors import UserError, first_line, need
from inputs.files import (
    IMAGE_SUFFIXES,
    need_no_input,
    need_utf8,
    output_file,
    partial_of,
    read_image,
    write,
)
from inputs.folder import note_left_out
from inputs.source import name_of
from inputs.transforms import upsample
from models import PUBLISHED, Segmenter, load, load_published

ENDINGS = (".png", "_overlay.png", "_confidence.png")
LONGEST_NAME = 255  # bytes, on most file systems


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, usage="predict.py [options] RUN IMAGE_OR_FOLDER ... --out-dir DIR")
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="RUN IMAGE_OR_FOLDER",
        help="a run folder (or user/name on the Hub), then images and folders of images",
    )
    add("--out-dir", metavar="DIR", help="the folder for masks and overlays; must be empty")
    add(
        "--overwrite",
        action="store_true",
        help="use a DIR that is not empty; replaces files of the same names, but never an input",
    )
    add("--checkpoint", metavar="FILE", help="a published ReCo checkpoint (.pth) instead of a run")
    add("--dataset", choices=PUBLISHED, help="the data set that the checkpoint was trained on")
    add("--confidence", action="store_true", help="also write the confidence as a grey PNG")
    add(
        "--suggest",
        type=positive,
        metavar="N",
        help="print the N images to label next, and write them to DIR/suggest.txt: least certain "
        "first, by the mean of 1 - confidence, without images that have a label",
    )
    add_prediction_options(add)
    add(
        "--tile",
        type=number(int, 32, 2**15, "a whole number from 32 on"),
        default=1024,
        metavar="N",
        help="predict larger images in tiles of this side; smaller tiles take less memory",
    )
    add(
        "--onnx",
        metavar="FILE",
        help="export the network, with normalisation and upsampling, for images of any size",
    )
    args = parser.parse_intermixed_args(argv)
    args.run = args.paths.pop(0) if args.paths and not args.checkpoint else None
    model = args.run or args.checkpoint
    need(not (args.dataset and args.run), "--dataset has no effect without --checkpoint")
    need(model, "name a run folder or --checkpoint FILE")
    need(args.paths or args.onnx, f"name images or folders after {model}, or --onnx FILE")
    need(args.out_dir or not args.paths, "name a folder for the masks with --out-dir DIR")
    return args


# ----------------------------------------------------------------------------- images and outputs
def find_images(paths: list[str], out_dir: Path) -> dict[Path, Path]:
    """The images that `paths` name, also in sub-folders, each with its output path without an
    ending. The output keeps the sub-folders, and no two images share a path. UserError for a path
    without an image, and for an output that would replace an input."""
    found: dict[Path, Path] = {}  # image -> its path below out_dir
    several = sum(Path(path).is_dir() for path in paths) > 1
    for path in map(Path, paths):
        if path.is_file():
            found.setdefault(path.absolute(), Path(path.name))
            continue
        need(path.is_dir(), f"{path}: no such image or folder")
        parent = path.resolve().name if several else ""
        for file in images_below(path, out_dir):
            found.setdefault(file.absolute(), parent / file.relative_to(path))
    targets, taken = {}, set()
    for image, name in found.items():
        need_utf8(image)
        stem = targets[image] = free_stem(name, out_dir, taken)
        longest = os.fsencode(partial_of(Path(f"{stem}{ENDINGS[-1]}")).name)
        need(len(longest) <= LONGEST_NAME, f"{image}: its name is too long for a mask; rename it")
    outputs = [Path(f"{stem}{ending}") for stem in targets.values() for ending in ENDINGS]
    need_no_input(outputs, found)
    return targets


def images_below(folder: Path, out_dir: Path) -> list[Path]:
    """The images in a folder and its sub-folders, except hidden files and earlier predictions. A
    note reports what is not read."""
    root, out = folder.resolve(), out_dir.resolve()
    need(root != out, f"--out-dir {out_dir}: is the folder of the images; choose another")
    images = [
        path
        for path in sorted(folder.rglob("*"))  # does not follow links to folders
        if path.is_file()
        and path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not (root in out.parents and path.resolve().is_relative_to(out))
    ]
    need(images, f"{folder}: no image ({', '.join(IMAGE_SUFFIXES)}) in it or its sub-folders")
    note_left_out(folder, {*images}, out)
    return images


def free_stem(name: Path, out_dir: Path, taken: set[str]) -> Path:
    """A free output path: a for a.jpg, a.png for a second image a.png, then a-2, a-3, ..."""
    numbers = (name.with_name(f"{name.stem}-{i}") for i in itertools.count(2))
    for stem in itertools.chain([name.with_suffix(""), name], numbers):
        outputs = {f"{out_dir / stem}{ending}".lower() for ending in ENDINGS}
        if taken.isdisjoint(outputs):
            taken |= outputs
            return out_dir / stem


def write_masks(
    stem: Path,
    image: Tensor,
    label: np.ndarray,
    confidence: np.ndarray | None,
    palette: list[tuple[int, int, int]],
) -> None:
    """Write STEM.png, STEM_overlay.png and, with a confidence, STEM_confidence.png: image uint8
    [3, H, W], label uint8 [H, W], confidence float [H, W]."""
    mask = Image.fromarray(label)
    colours = np.full((256, 3), 255, np.uint8)  # 256 of them: a PNG of fewer may not hold 255
    colours[: len(palette)] = palette
    mask.putpalette(colours.tobytes())  # "L" becomes "P"
    overlay = Image.blend(Image.fromarray(image.permute(1, 2, 0).numpy()), mask.convert("RGB"), 0.5)
    save_png(Path(f"{stem}_overlay.png"), overlay, compress_level=1)
    save_png(Path(f"{stem}.png"), mask)
    if confidence is not None:
        grey = (confidence.clip(0, 1) * 255).round().astype(np.uint8)
        save_png(Path(f"{stem}_confidence.png"), Image.fromarray(grey))


def save_png(path: Path, image: Image.Image, compress_level: int = 6) -> None:
    """Write a PNG whole or not at all."""
    write(path, lambda file: image.save(file, "PNG", compress_level=compress_level))


# ------------------------------------------------------------------------------------- prediction
def read_in_order(
    pool: ThreadPoolExecutor, paths: Iterable[Path], ahead: int
) -> Iterator[tuple[Path, Tensor]]:
    """Yield each path with its image uint8 [3, H, W]; threads read `ahead` images in advance. An
    image that cannot be read is reported and left out."""
    waiting, paths = deque(), iter(paths)
    while True:
        for path in itertools.islice(paths, ahead + 1 - len(waiting)):
            waiting.append((path, pool.submit(read_image, path)))
        if not waiting:
            return
        path, future = waiting.popleft()
        try:
            yield path, future.result()
        except UserError as error:
            tqdm.write(f"predict.py: {error}", file=sys.stderr)


def read_batches(
    pool: ThreadPoolExecutor, paths: Iterable[Path], most: Callable[[torch.Size], int], ahead: int
) -> Iterator[tuple[tuple[Path, ...], tuple[Tensor, ...]]]:
    """Yield paths and images of one shape [3, H, W], in batches of at most most(shape)."""
    images = read_in_order(pool, paths, ahead)
    for shape, group in itertools.groupby(images, lambda pair: pair[1].shape):
        while batch := tuple(itertools.islice(group, most(shape))):
            yield tuple(zip(*batch, strict=True))


def predict_all(
    model: Segmenter, targets: dict[Path, Path], args: argparse.Namespace
) -> dict[Path, float]:
    """Write the outputs of all images. Returns how uncertain each prediction is: the mean of 1 -
    confidence. Threads read and write images while the network works; a few images per thread are
    in memory. After an error or Ctrl-C every output is whole or absent."""
    device, scores = model.mean.device, {}
    window = tuple(model.config["crop_size"]) if args.sliding_window else None
    options = dict(scales=args.scales, flip=args.flip, window=window)
    threads = min(8, cores())

    def batch_size(shape: torch.Size) -> int:
        height, width = model.network_size(*shape[-2:])
        return 1 if device.type == "cpu" else max(1, min(16, args.tile**2 // (height * width)))

    def save(path: Path, image: Tensor, label: np.ndarray, confidence: np.ndarray) -> None:
        to_write = confidence if args.confidence else None
        write_masks(targets[path], image, label, to_write, model.palette)
        scores[path] = 1 - float(confidence.mean())
        bar.update()

    # disable=None: shown only on a terminal
    bar = tqdm(total=len(targets), unit="image", disable=None, dynamic_ncols=True)
    with bar, ThreadPoolExecutor(threads) as pool:
        writing = deque()
        try:
            for paths, images in read_batches(pool, targets, batch_size, 2 * threads):
                size = model.network_size(*images[0].shape[-2:])
                batch = torch.stack(images)
                predicted = predict_images(model, batch, size, args.tile, device, **options)
                for output in zip(paths, images, *predicted, strict=True):
                    writing.append(pool.submit(save, *output))
                while len(writing) > 2 * threads:
                    writing.popleft().result()
            for future in writing:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {path: scores[path] for path in targets if path in scores}


# ----------------------------------------------------------------------------- what to label next
def suggest(scores: dict[Path, float], run: str | None, number: int) -> tuple[list[str], int]:
    """The lines of suggest.txt: the images to label next, least certain first; and how many images
    are left out, because the run was trained on a label of that name or the image has a mask."""
    file = Path(run or ".") / "labeled.txt"
    labelled = set(file.read_text("utf-8").splitlines()) if run and file.exists() else set()
    unlabelled = [
        image
        for image in scores
        if name_of(image).removesuffix("_leftImg8bit") not in labelled and not has_mask(image)
    ]
    chosen = sorted(unlabelled, key=scores.get, reverse=True)[:number]
    lines = [f"{scores[image]:.4f}  {image}" for image in chosen]
    return lines, len(scores) - len(unlabelled)


def has_mask(image: Path) -> bool:
    """Whether an image in images/PART has a mask in labels/PART, as with `--dataset folder`."""
    images, part = image.parent.parent, image.parent.name
    return images.name == "images" and any(
        (images.parent / "labels" / part).glob(f"{glob.escape(image.stem)}.[pP][nN][gG]")
    )


# ------------------------------------------------------------------------------------ ONNX export
class FullSizeNetwork(nn.Module):
    """What --onnx exports: normalisation, network and upsampling to the image's size."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return upsample(self.model(images)[0], images.shape[-2:])


def export_onnx(model: nn.Module, classes: list[str], path: Path) -> None:
    """Write one file for any batch size, height and width, with the class names in its
    metadata."""
    missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    need(not missing, f"--onnx requires missing packages: pip install {' '.join(missing)}")
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
        raise UserError(f"--onnx {path}: the network cannot be exported ({reason})") from None
    graph = program.model_proto
    graph.metadata_props.add(key="classes", value=json.dumps(classes))
    write(path, lambda file: file.write(graph.SerializeToString()))


def main() -> None:
    args = parse_options()
    warnings.filterwarnings("ignore", module="PIL")  # about metadata and sizes
    targets, out_dir = {}, Path(args.out_dir or ".")
    if args.paths:
        need(
            out_dir.exists() or not out_dir.is_symlink(),
            f"--out-dir {out_dir}: is a link that leads nowhere",
        )
        need(
            args.overwrite or not out_dir.is_dir() or not any(out_dir.iterdir()),
            f"--out-dir {out_dir}: is not empty; choose another, or add --overwrite to replace "
            "files of the same names",
        )
        targets = find_images(args.paths, out_dir)
    if args.onnx:
        args.onnx = output_file("--onnx", args.onnx, args.overwrite)
        weights = args.checkpoint or Path(args.run) / "model.safetensors"
        need_no_input([args.onnx], [*targets, weights])
    model = load_published(args.checkpoint, args.dataset) if args.checkpoint else load(args.run)
    model.to(Accelerator().device)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out-dir {out_dir}: cannot be made ({error.strerror})") from None
    if args.onnx:
        export_onnx(model, model.classes, args.onnx)
        print(f"network written to {args.onnx}")
    if targets:
        scores = predict_all(model, targets, args)
        report(args, len(targets), scores)
        sys.exit(0 if len(scores) == len(targets) else 1)


def report(args: argparse.Namespace, number: int, scores: dict[Path, float]) -> None:
    """Print what was written for the `number` images, and what to label next."""
    written = "masks NAME.png, NAME_overlay.png"
    if args.confidence:
        written += ", NAME_confidence.png"
    if args.suggest and scores:
        lines, left_out = suggest(scores, args.run, args.suggest)
        text = "".join(f"{line}\n" for line in lines)
        print(text, end="")
        write(Path(args.out_dir) / "suggest.txt", lambda file: file.write(text.encode()))
        if left_out:
            print(f"left out, since an image of the same name has a label: {left_out}")
        written += ", suggest.txt"
    print(f"{len(scores)} of {number} images: {written} in {args.out_dir}")


if __name__ == "__main__":
    launch(main)
