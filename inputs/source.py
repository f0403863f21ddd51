"""A data set as it is on disk: its samples, its label values and how a sample is read.

Label maps are uint8 with class ids; 255 means "not labelled" everywhere. Nothing is preprocessed.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Sequence
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


def is_sparse(label: Tensor) -> bool:
    """Whether a label [H, W] covers so little of its image that it is made of points or strokes."""
    return (label != IGNORE).float().mean().item() < SPARSE


def value_table(values: dict[int, int]) -> np.ndarray:
    """uint8 [256]: value on disk -> class id or IGNORE; OUTSIDE for every value not named."""
    table = np.full(256, OUTSIDE, np.uint8)
    table[list(values)] = list(values.values())
    return table


@dataclass(frozen=True)
class Sample:
    name: str  # what labeled.txt calls it
    image: str  # path, or "street:train/12" for a scene that is drawn
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
    name: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    train: list[Sample] = field(default_factory=list)
    val: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    table: np.ndarray | None = None  # uint8 [256]: value on disk -> class id, IGNORE or OUTSIDE
    table_origin: str = ""  # what a message on a wrong label value says of the allowed ones
    colours: dict[int, int] | None = None  # of masks in colours, see files.read_label
    size: tuple[int, int] | None = None  # (H, W) every image is brought to (training resolution)
    max_size: int | None = None  # ... or the longer side is brought down to
    enlarge: bool = False  # ... and up to
    eval_pad: tuple[int, int] | None = None  # (H, W) evaluated images are padded to
    uniform: bool = False  # all images have one size on disk
    min_classes: int = 1  # distinct classes an image of the labelled split must hold
    own_files: bool = False  # a user's own: every file is checked before the training begins
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
        brought_to_one = self.size is not None or self.eval_pad is not None
        return self.uniform or (brought_to_one and not full_resolution)

    # ---------------------------------------------------------------------------------- reading
    def read(self, sample: Sample, full_resolution: bool = False) -> tuple[Tensor, Tensor]:
        """Image uint8 [3, H, W] and label uint8 [H, W] at training resolution (or as on disk).

        Without a label file all is 255. Raises UserError that names the file.
        """
        if sample.drawn:
            split, index = sample.image.removeprefix("street:").split("/")
            image, label = street_scene(split, int(index))
            return image, label if sample.label else torch.full_like(label, IGNORE)
        if self.cache_dir and not full_resolution:
            return self.read_cached(sample)
        size_needed = None if full_resolution else self.training_size
        picture, stored = files.open_image(sample.image, size_needed)
        size = stored if full_resolution else self.training_size(*stored)
        image = resize_image(files.to_rgb(picture), size)
        if not sample.label:
            return image, torch.full(size, IGNORE, dtype=torch.uint8)
        label = torch.from_numpy(self.read_label(sample, stored))
        return image, resize_label(label, size, self.own_files and is_sparse(label))

    def read_label(self, sample: Sample, size: tuple[int, int] | None = None) -> np.ndarray:
        """Class ids uint8 [H, W] as on disk; `size` is that of the image, which it must share."""
        return files.read_label(sample.label, self.table, size, self.table_origin, self.colours)

    def read_cached(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """The training-size copy of a sample, written once and used while its files stay."""
        content = [
            sample.image,
            sample.label,
            files.stamp(sample.image, sample.label),
            self.size,
            self.max_size,
            None if self.table is None else self.table.tobytes(),
            self.colours,
            *(["known pixels kept"] if self.own_files else []),
        ]
        key = hashlib.sha256(repr(content).encode()).hexdigest()
        path = self.cache_dir / key[:2] / f"{key[2:34]}.npy"
        try:
            copy = torch.from_numpy(np.load(path, allow_pickle=False))  # uint8 [4, H, W]
        except (OSError, ValueError, EOFError):  # not there yet, or damaged
            image, label = replace(self, cache_dir=None).read(sample)
            copy = torch.cat([image, label[None]])
            files.write_cache(path, lambda file: np.save(file, copy.numpy()))
        return copy[:3], copy[3]


@functools.cache
def street_scene(split: str, index: int) -> tuple[Tensor, Tensor]:
    """A scene, drawn once: image uint8 [3, 64, 64] and label uint8 [64, 64], 16 kB."""
    image, label = street.scene(split, index)
    return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)


# -------------------------------------------------------------------------- listing files
def name_of(file: Path) -> str:
    """A file's name without its ending; an accent is one character (a Mac may write it as two)."""
    return unicodedata.normalize("NFC", file.stem)


def list_files(
    folder: Path, what: str, pattern: str = "*", suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> list[Path]:
    """The files of a folder, which must exist; `what` says where it would come from."""
    need(folder.is_dir(), f"{folder}: no such folder ({what})")
    files = sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    for file in files:
        need_utf8(file)
    return files


def labelled_samples(
    images: list[Path],
    label_of: Callable[[Path], Path],
    labels: Sequence[Path] = (),
    suffix: str = "",
) -> list[Sample]:
    """Images with their labels, each of which must exist; so must the image of each of `labels`.
    `suffix` is no part of a name."""
    samples = []
    for image in images:
        label = label_of(image)
        need(label.is_file(), f"{image}: has no label {label}")
        samples.append(Sample(image.stem.removesuffix(suffix), str(image), str(label)))
    orphan = min({str(label) for label in labels} - {s.label for s in samples}, default=None)
    need(
        orphan is None,
        f"{orphan}: a label without an image; extract the images once more, or remove it",
    )
    return samples
