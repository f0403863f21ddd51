"""Predict masks with a trained run: for every picture an index PNG in the run's palette, of the picture's own size, and an overlay.

python predict.py RUN photo.jpg holiday --out-dir predictions               # holiday/a/b.jpg -> predictions/a/b.png, a/b_overlay.png
python predict.py RUN unlabelled --out-dir predictions --suggest 10         # ... and which ten to label next
python predict.py RUN --onnx network.onnx                                   # RGB [B, 3, H, W] in 0 .. 1 -> logits [B, C, H, W]
python predict.py --checkpoint published_reco.pth --dataset cityscapes street.png --out-dir predictions
"""

import importlib.util
import itertools
import json
import math
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

import data
import processes
import run
from data import UserError, need
from evaluate import predict_probabilities, tile_starts
from models import upsample

ENDINGS = (".png", "_overlay.png", "_confidence.png")


def find_pictures(paths: list[str], out_dir: Path) -> dict[Path, Path]:
    """Every picture that `paths` name, folders walked, and where its output goes (a path without ending). Sub-folders are kept; no two
    pictures share an output, and no picture is written over. Raises UserError for a path that leads to no picture."""
    found, several = {}, sum(Path(p).is_dir() for p in paths) > 1
    for path in map(Path, paths):
        if path.is_file():
            found.setdefault(path.resolve(), (path, Path(path.name)))
            continue
        need(path.is_dir(), f"{path}: no such picture or folder")
        root, out = path.resolve(), out_dir.resolve()
        need(
            root != out,
            f"--out-dir {out_dir}: is the folder of the pictures; choose another, or the masks would be taken for pictures next time",
        )
        files = [
            p
            for p in sorted(path.rglob("*"))
            if p.suffix.lower() in data.IMAGE_SUFFIXES
            and p.is_file()
            and not any(part.startswith(".") for part in p.relative_to(path).parts)
            and not (root in out.parents and p.resolve().is_relative_to(out))
        ]  # earlier predictions
        need(
            files,
            f"{path}: holds no picture ({', '.join(data.IMAGE_SUFFIXES)}), nor do its sub-folders",
        )
        for p in files:
            found.setdefault(
                p.resolve(), (p, (Path(root.name) if several else Path()) / p.relative_to(path))
            )
    targets, taken = {}, set()
    for picture, name in found.values():  # a.jpg -> a; beside it a.png -> a.png; then numbers
        for stem in itertools.chain(
            [name.with_suffix(""), name],
            (name.with_name(f"{name.stem}-{i}") for i in itertools.count(2)),
        ):
            outputs = [f"{out_dir / stem}{ending}" for ending in ENDINGS]
            if taken.isdisjoint(o.lower() for o in outputs):
                break
        taken.update(o.lower() for o in outputs)
        targets[picture] = out_dir / stem
        need(
            not any(Path(o).resolve() in found for o in outputs),
            f"--out-dir {out_dir}: the mask of {picture} would be written over a picture; choose another",
        )
    return targets


def network_size(config: dict, height: int, width: int) -> tuple[int, int]:
    """The size at which the network sees a picture: the resolution it was trained at, aspect kept. Cityscapes and SUN RGB-D are trained at one size:
    the longer side is brought to theirs, up or down. A folder's images are at most --max-size on the longer side and Pascal's at most 500: larger
    pictures are brought down. Street scenes have the scale of their pixels: a picture is taken as it is. A side has 32 pixels or more, so that
    any backbone can halve it five times."""
    dataset = config["arguments"]["dataset"]
    fixed = {"cityscapes": 1024, "sun": 512}.get(dataset)
    limit = {"pascal": 500, "folder": config["arguments"].get("max_size")}.get(dataset)
    factor = (
        fixed / max(height, width)
        if fixed
        else min(1.0, limit / max(height, width))
        if limit
        else 1.0
    )
    return max(32, round(height * factor)), max(32, round(width * factor))


@torch.no_grad()
def predict_picture(
    model: nn.Module,
    image: Tensor,
    size: tuple[int, int],
    tile: int = 1024,
    device="cpu",
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Class uint8 [H, W] and its probability float32 [H, W] of every pixel of a picture uint8 [3, H, W]. The network sees it at `size`, in
    overlapping tiles where that is larger than a tile, and the probabilities are brought back to the picture's size a strip at a time: the memory
    needed depends on the tile and hardly on the picture. `options` are those of predict_probabilities."""
    small, (height, width) = data.resize_image(image, size), image.shape[-2:]
    label, confidence = np.empty((height, width), np.uint8), np.empty((height, width), np.float32)
    for (top, bottom, y), (left, right, x) in itertools.product(
        tiles(size[0], height, tile), tiles(size[1], width, tile)
    ):
        if not y or not x:  # the picture is so much smaller than `size` that no pixel falls here
            continue
        prob = predict_probabilities(
            model, data.to_float(small[None, :, top:bottom, left:right], device), **options
        )[0]  # [C, h, w]
        step = max(1, 2**23 // (len(prob) * len(x)))
        for strip in (y[i : i + step] for i in range(0, len(y), step)):
            part = resample(
                resample(prob, 1, strip, size[0] / height, top), 2, x, size[1] / width, left
            )  # [C, rows, columns] of the picture
            best, index = part.max(dim=0)
            where = slice(strip.start, strip.stop), slice(x.start, x.stop)
            label[where], confidence[where] = index.byte().cpu().numpy(), best.cpu().numpy()
    return label, confidence


def tiles(length: int, original: int, tile: int) -> list[tuple[int, int, range]]:
    """Tiles that cover a length: where each starts and stops, and which pixels of the original length are taken from it. Neighbours meet in
    the middle of their overlap, so a pixel is seen with a sixth of a tile around it."""
    tile = min(tile, length)
    starts = tile_starts(length, tile)
    meet = [0, *((left + tile + right) / 2 for left, right in itertools.pairwise(starts)), length]
    edges = [
        math.ceil(at * original / length - 0.5) for at in meet
    ]  # the first pixel whose centre lies behind
    return [
        (start, start + tile, range(*pair))
        for start, pair in zip(starts, itertools.pairwise(edges))
    ]


def resample(prob: Tensor, dim: int, pixels: range, scale: float, start: int) -> Tensor:
    """Bilinear values along a dimension at the centres of pixels of another scale; `start` is where prob begins."""
    at = (
        (torch.arange(pixels.start, pixels.stop, dtype=torch.float64) + 0.5) * scale - 0.5 - start
    ).clamp(0, prob.shape[dim] - 1)
    low = at.long()
    weight = (at - low).float().to(prob.device)[(...,) + (None,) * (2 - dim)]
    low = low.to(prob.device)
    return torch.lerp(
        prob.index_select(dim, low),
        prob.index_select(dim, (low + 1).clamp_max(prob.shape[dim] - 1)),
        weight,
    )


def write_masks(
    stem: Path, image: Tensor, label: np.ndarray, confidence: np.ndarray | None, palette
) -> None:
    """STEM.png, STEM_overlay.png and, where asked for, STEM_confidence.png."""
    mask = Image.fromarray(label)
    mask.putpalette(np.asarray(palette, np.uint8).tobytes())  # "L" becomes "P"
    overlay = Image.blend(Image.fromarray(image.permute(1, 2, 0).numpy()), mask.convert("RGB"), 0.5)
    grey = (
        []
        if confidence is None
        else [Image.fromarray((confidence.clip(0, 1) * 255).round().astype(np.uint8))]
    )
    for picture, ending in zip([mask, overlay, *grey], ENDINGS):
        run.write(
            Path(f"{stem}{ending}"),
            lambda file: picture.save(file, "PNG", compress_level=1 if picture is overlay else 6),
        )


class Exported(nn.Module):
    """What --onnx writes: normalisation, network and upsampling in one graph."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return upsample(self.model(data.normalise(images))[0], images.shape[-2:])


def export_onnx(model: nn.Module, classes: list[str], path: Path) -> None:
    """One file for any batch size, height and width; the class names stand in its metadata."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--onnx needs packages that are not installed: pip install {' '.join(missing)}"
        )
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UserError(f"--onnx {path}: {path.parent} is no folder that can be written to")
    example = torch.rand(2, 3, 96, 128, device=next(model.parameters()).device)
    try:
        program = torch.onnx.export(
            Exported(model).eval(),
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"--onnx {path}: this network cannot be exported ({str(error).strip().splitlines()[0]})"
        ) from None
    graph = program.model_proto
    graph.metadata_props.add(key="classes", value=json.dumps(classes))
    run.write(path, lambda file: file.write(graph.SerializeToString()))


def main() -> None:
    parser = run.Parser(
        description=__doc__,
        formatter_class=run.Formatter,
        usage="predict.py [options] RUN IMAGE_OR_FOLDER ... --out-dir DIR",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="RUN IMAGE_OR_FOLDER",
        help="a run's folder, then pictures and folders of pictures",
    )
    parser.add_argument("--out-dir", metavar="DIR", help="where the masks and overlays go")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="a published ReCo checkpoint (.pth) instead of a run"
    )
    parser.add_argument(
        "--dataset",
        choices=["cityscapes", "pascal", "sun"],
        help="what the checkpoint was trained on",
    )
    parser.add_argument(
        "--confidence",
        action="store_true",
        help="also write the probability of the predicted class as a grey PNG, 255 = 1",
    )
    parser.add_argument(
        "--suggest",
        type=run.positive,
        metavar="N",
        help="print the N pictures to label next, least certain first, those the run was trained on with a label left out, and write them to DIR/suggest.txt; "
        "the score is the mean over the pixels of 1 - the probability of the predicted class",
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored picture")
    parser.add_argument(
        "--scales",
        type=run.positive_float,
        nargs="+",
        default=[1.0],
        metavar="S",
        help="average over these scales",
    )
    parser.add_argument(
        "--sliding-window",
        action="store_true",
        help="average over tiles of the training crop's size that overlap by a third",
    )
    parser.add_argument(
        "--tile",
        type=run.number(int, 32, 2**15, "a whole number from 32 on"),
        default=1024,
        metavar="N",
        help="predict larger pictures in tiles of this side; smaller ones need less memory",
    )
    parser.add_argument(
        "--onnx",
        metavar="FILE",
        help="export the network, with normalisation and upsampling, for any size",
    )
    args = parser.parse_intermixed_args()
    args.run = None if args.checkpoint else args.paths.pop(0) if args.paths else None
    need(
        args.checkpoint or not args.dataset, "--dataset goes with --checkpoint; a run knows its own"
    )
    need(
        args.paths or args.onnx or not (args.run or args.checkpoint),
        f"name pictures or folders after {args.run or 'the options'}, or --onnx FILE",
    )
    need(args.out_dir or not args.paths, "--out-dir DIR is missing: where the masks go")
    warnings.filterwarnings("ignore", module="PIL")  # about metadata, or a size that is dealt with

    targets = find_pictures(args.paths, Path(args.out_dir)) if args.paths else {}
    device = Accelerator().device
    model, config = run.load_trained(args, device)
    try:
        Path(args.out_dir or ".").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out-dir {args.out_dir}: cannot be made ({error.strerror})") from None
    if args.onnx:
        export_onnx(model, config["classes"], Path(args.onnx))
        print(f"network written to {args.onnx}")
    options = dict(
        scales=args.scales,
        flip=args.flip,
        window=tuple(config["crop_size"]) if args.sliding_window else None,
    )
    scores = []
    for picture, stem in tqdm(
        targets.items(), unit="picture", disable=None if targets else True, dynamic_ncols=True
    ):
        try:
            image = data.read_image(picture)
        except Exception as error:  # decoders raise many kinds
            tqdm.write(
                f"predict.py: {error if isinstance(error, UserError) else f'{picture}: cannot be read ({type(error).__name__})'}",
                file=sys.stderr,
            )
            continue
        label, confidence = predict_picture(
            model, image, network_size(config, *image.shape[-2:]), args.tile, device, **options
        )
        write_masks(stem, image, label, confidence if args.confidence else None, config["palette"])
        scores.append((1 - float(confidence.mean()), picture))
    if args.suggest and scores:
        file = Path(args.run or ".") / "labeled.txt"
        labelled = (
            set(file.read_text().splitlines()) if args.run and file.exists() else set()
        )  # of the run: they have a label already
        unsure = sorted(
            (
                entry
                for entry in scores
                if entry[1].stem.removesuffix("_leftImg8bit") not in labelled
            ),
            key=lambda entry: -entry[0],
        )[: args.suggest]
        lines = [f"{score:.4f}  {picture}" for score, picture in unsure]
        print("\n".join(lines))
        run.write(
            Path(args.out_dir) / "suggest.txt",
            lambda file: file.write("".join(f"{line}\n" for line in lines).encode()),
        )
    if targets:
        print(
            f"{len(scores)} of {len(targets)} pictures: masks NAME.png, NAME_overlay.png{', NAME_confidence.png' if args.confidence else ''}"
            f"{', suggest.txt' if args.suggest and scores else ''} in {args.out_dir}"
        )
    sys.exit(0 if len(scores) == len(targets) else 1)


if __name__ == "__main__":
    processes.launch(main)
