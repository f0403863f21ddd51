"""Predict masks with a trained run: for every picture an index PNG in the run's palette, of the picture's own size, and an overlay.

    python predict.py RUN photo.jpg holiday/ --out-dir predictions              # holiday/a/b.jpg -> predictions/a/b.png, b_overlay.png
    python predict.py RUN unlabelled/ --out-dir predictions --suggest 10        # ... and which ten to label next
    python predict.py RUN --onnx network.onnx                                   # RGB [B, 3, H, W] in 0 .. 1 -> logits [B, C, H, W]
    python predict.py --checkpoint published_reco.pth --dataset cityscapes street.png --out-dir predictions
"""
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import data
import run
from data import UserError
from evaluate import predict_probabilities, tile_starts
from models import upsample

ENDINGS = (".png", "_overlay.png", "_confidence.png")


# ------------------------------------------------------------------------------------------------------------ pictures
def find_pictures(paths: list[str], out_dir: Path) -> dict[Path, Path]:
    """Every picture that `paths` name, folders walked, and where its output goes (a path without ending). Sub-folders are kept; no two pictures
    share an output and none is written over. Raises UserError for a path that leads to no picture."""
    found, seen = {}, set()
    for path in map(Path, paths):
        if path.is_dir():
            if path.resolve() == out_dir.resolve():
                raise UserError(f"--out-dir {out_dir}: is the folder of the pictures; choose another, or their masks would be taken for pictures next time")
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in data.IMAGE_SUFFIXES and p.is_file()
                           and not any(part.startswith(".") for part in p.relative_to(path).parts)
                           and not (path.resolve() in out_dir.resolve().parents and out_dir.resolve() in p.resolve().parents))
            if not files:
                raise UserError(f"{path}: holds no picture ({', '.join(data.IMAGE_SUFFIXES)}), nor do its sub-folders")
        elif path.is_file():
            files = [path]
        else:
            raise UserError(f"{path}: no such picture or folder")
        for file in files:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                found[file] = file.relative_to(path) if path.is_dir() else Path(file.name)
    taken = set()
    for file, relative in found.items():
        names = itertools.chain([relative.with_suffix(""), relative], (relative.with_name(f"{relative.stem}-{i}") for i in itertools.count(2)))
        outputs = ({f"{out_dir / name}{ending}".lower() for ending in ENDINGS} for name in names)
        names, outputs = itertools.tee(names)[0], None  # placeholder
    return found
