"""A data set: its samples, its label values and how a sample is read.

Label maps are uint8 with class ids; 255 always means "not labelled".
"""

import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inputs import files, street
from inputs.errors import need
from inputs.files import IGNORE, IMAGE_SUFFIXES, OUTSIDE, need_utf8
from inputs.transforms import resize_image, resize_label

SPARSE = 0.5  # a label that covers less than this share of its image is sparse
NPY_HEADER = 128  # bytes


def is_sparse(label: Tensor) -> bool:
    """Whether a label [H, W] covers less than half of its image: points or strokes."""
    return (label != IGNORE).float().mean().item() < SPARSE


def value_table(values: dict[int, int]) -> np.ndarray:
    """uint8 [256]: value on disk -> class id or IGNORE; OUTSIDE for values not in `values`."""
    table = np.full(256, OUTSIDE, np.uint8)
    table[list(values)] = list(values.values())
    return table


@dataclass(frozen=True)
class Sample:
    name: str  # as in labeled.txt
    image: str  # path, or "street:train/12" for an image that is drawn in memory
    label: str | None = None  # path; None = an unlabelled image

    @property
    def drawn(self) -> bool:
        return self.image.startswith("street:")


Splits = dict[str, list[Sample]]  # by "train", "val" and, where there is one, "test"


def voc_palette(number: int) -> list[tuple[int, int, int]]:
    """The colour map of Pascal VOC: bits 0, 1, 2 of the class are the high bits of R, G, B, ..."""

    def channel(value: int, first: int) -> int:
        return sum((value >> (3 * bit + first) & 1) << (7 - bit) for bit in range(8))

    return [(channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(number)]


@dataclass
class Source:
    """A data set: its classes, its files and how to read them. Loader processes get a pickled
    copy."""

    name: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    train: list[Sample] = field(default_factory=list)
    val: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    table: np.ndarray | None = None  # uint8 [256]: value on disk -> class id, IGNORE or OUTSIDE
    table_origin: str = ""  # where the allowed label values come from, for messages
    colours: dict[int, int] | None = None  # for masks in colours, see files.read_label
    size: tuple[int, int] | None = None  # (H, W) to which training images are resized
    max_size: int | None = None  # else: scale larger images down to this longer side
    enlarge: bool = False  # ... and smaller ones up
    eval_pad: tuple[int, int] | None = None  # (H, W) to which evaluated images are padded
    uniform: bool = False  # all images have the same size on disk
    min_classes: int = 1  # that an image of the labelled split must have
    own_files: bool = False  # a user's own data: check every file before training
    cache_dir: Path | None = None  # for training-size copies

    # ------------------------------------------------------------------------------------ sizes
    def training_size(self, height: int, width: int) -> tuple[int, int]:
        """The (H, W) of an image in training."""
        if self.size:
            return self.size
        factor = self.max_size / max(height, width) if self.max_size else 1.0
        factor = factor if self.enlarge else min(1.0, factor)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def one_size(self, full_resolution: bool = False) -> bool:
        """Whether all evaluated images have the same size, so that they can be batched."""
        resized = self.size is not None or self.eval_pad is not None
        return self.uniform or (resized and not full_resolution)

    # ---------------------------------------------------------------------------------- reading
    def read(self, sample: Sample, full_resolution: bool = False) -> tuple[Tensor, Tensor]:
        """Image uint8 [3, H, W] and label uint8 [H, W] at training resolution (or as on disk).

        Without a label file the label is 255 everywhere. Raises UserError that names the file.
        """
        if sample.drawn:
            split, index = sample.image.removeprefix("street:").split("/")
            image, label = street_scene(split, int(index))
            return image, label if sample.label else torch.full_like(label, IGNORE)
        if self.cache_dir and not full_resolution:
            return self.read_cached(sample)
        decoded, stored = files.open_image(
            sample.image, None if full_resolution else self.training_size
        )
        size = stored if full_resolution else self.training_size(*stored)
        image = resize_image(files.to_rgb(decoded, sample.image), size)
        if not sample.label:
            return image, torch.full(size, IGNORE, dtype=torch.uint8)
        label = torch.from_numpy(self.read_label(sample, stored))
        return image, resize_label(label, size, self.own_files and is_sparse(label))

    def read_label(self, sample: Sample, size: tuple[int, int] | None = None) -> np.ndarray:
        """Class ids uint8 [H, W] as on disk; `size` is that of the image, which it must share."""
        return files.read_label(sample.label, self.table, size, self.table_origin, self.colours)

    def read_cached(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """The training-size copy of a sample; written again if its files change."""
        content = [
            sample.image,
            sample.label,
            files.stamp(sample.image, sample.label),
            self.size,
            self.max_size,
            None if self.table is None else self.table.tobytes(),
            self.colours,
            self.own_files,
        ]
        key = hashlib.sha256(repr(content).encode()).hexdigest()
        path = self.cache_dir / key[:2] / f"{key[2:34]}.npy"
        copy = load_copy(path)
        if copy is None:
            image, label = replace(self, cache_dir=None).read(sample)
            copy = torch.cat([image, label[None]])
            files.write_cache(path, lambda file: np.save(file, copy.numpy()))
        return copy[:3], copy[3]


def load_copy(path: Path) -> Tensor | None:
    """A training-size copy, uint8 [4, H, W]: the image and its label. None if it is missing or
    damaged."""
    try:
        copy = np.load(path, allow_pickle=False)
    except Exception:  # numpy raises many kinds, and the copy can be made again
        return None
    whole = copy.dtype == np.uint8 and path.stat().st_size == copy.nbytes + NPY_HEADER
    return torch.from_numpy(copy) if whole and copy.ndim == 3 and len(copy) == 4 else None


@functools.cache
def street_scene(split: str, index: int) -> tuple[Tensor, Tensor]:
    """A street scene, drawn once: image uint8 [3, 64, 64] and label uint8 [64, 64], 16 kB."""
    image, label = street.scene(split, index)
    return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)


# -------------------------------------------------------------------------- listing files
def name_of(file: Path) -> str:
    """A file's name without its suffix, in NFC: macOS may store an accent as a character of its
    own."""
    return unicodedata.normalize("NFC", file.stem)


def list_files(
    folder: Path, what: str, pattern: str = "*", suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> list[Path]:
    """The sorted files of a folder, except hidden ones; `what` describes them in messages.

    Raises UserError that names a missing or empty folder, or a file that cannot be read."""
    need(folder.is_dir(), f"{folder}: no such folder ({what})")
    found = sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    kinds = pattern if pattern != "*" else ", ".join(suffixes)
    need(found, f"{folder}: holds no {kinds} ({what})")
    for file in found:
        need_utf8(file)
        files.need_regular(file)
    return found


def labelled_samples(
    images: list[Path], labels: list[Path], all_labels: Sequence[Path] = (), suffix: str = ""
) -> list[Sample]:
    """Pair images with labels. Each label must exist, and each of `all_labels` must have an image.
    `suffix` is removed from the names."""
    for image, label in zip(images, labels, strict=True):
        need(label.is_file(), f"{image}: has no label {label}")
    orphan = min({*all_labels} - {*labels}, default=None)
    need(not orphan, f"{orphan}: a label without an image; extract the images again, or remove it")
    return [
        Sample(image.stem.removesuffix(suffix), str(image), str(label))
        for image, label in zip(images, labels, strict=True)
    ]
