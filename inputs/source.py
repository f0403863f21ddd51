"""A data set as it is on disk: its samples, its label values and how a sample is read.

Label maps are uint8 with class ids; 255 means "not labelled" everywhere. Nothing is preprocessed.
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
    """Whether a label [H, W] covers so little of its image that it must be points or strokes."""
    return (label != IGNORE).float().mean().item() < SPARSE


def value_table(values: dict[int, int]) -> np.ndarray:
    """uint8 [256]: value on disk -> class id or IGNORE; OUTSIDE for every value not named."""
    table = np.full(256, OUTSIDE, np.uint8)
    table[list(values)] = list(values.values())
    return table


@dataclass(frozen=True)
class Sample:
    name: str  # what labeled.txt calls it
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
    """What a data set is, where its files are and how they are read. Loader processes get a copy,
    so it holds nothing that cannot be pickled."""

    name: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    train: list[Sample] = field(default_factory=list)
    val: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    table: np.ndarray | None = None  # uint8 [256]: value on disk -> class id, IGNORE or OUTSIDE
    table_origin: str = ""  # what a message on a wrong label value says of the allowed ones
    colours: dict[int, int] | None = None  # of masks in colours, see files.read_label
    size: tuple[int, int] | None = None  # (H, W) of every image in training
    max_size: int | None = None  # ... or of the longer side, if the image is larger
    enlarge: bool = False  # ... or smaller
    eval_pad: tuple[int, int] | None = None  # (H, W) evaluated images are padded to
    uniform: bool = False  # all images have one size on disk
    min_classes: int = 1  # distinct classes an image of the labelled split must hold
    own_files: bool = False  # a user's own: every file is checked before training
    cache_dir: Path | None = None  # for training-size copies

    # ------------------------------------------------------------------------------------ sizes
    def training_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) at which an image of the data set is trained on."""
        if self.size:
            return self.size
        factor = self.max_size / max(height, width) if self.max_size else 1.0
        factor = factor if self.enlarge else min(1.0, factor)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def one_size(self, full_resolution: bool = False) -> bool:
        """Whether all evaluated images have one size, so that several make a batch."""
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
        """The training-size copy of a sample, written once and used until its files change."""
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
    """A file's name without its suffix; an accent is one character (a Mac may write it as two)."""
    return unicodedata.normalize("NFC", file.stem)


def list_files(
    folder: Path, what: str, pattern: str = "*", suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> list[Path]:
    """The sorted files of a folder, hidden ones aside; `what` says where they come from.

    Raises UserError that names the folder if it is missing or holds none, or the odd file."""
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
    """Each image with its label, which must exist; so must the image of each of `all_labels`.
    `suffix` is not part of a name."""
    for image, label in zip(images, labels, strict=True):
        need(label.is_file(), f"{image}: has no label {label}")
    orphan = min({*all_labels} - {*labels}, default=None)
    need(not orphan, f"{orphan}: a label without an image; extract the images again, or remove it")
    return [
        Sample(image.stem.removesuffix(suffix), str(image), str(label))
        for image, label in zip(images, labels, strict=True)
    ]
