"""The data sets: their classes, their sizes, and how a sample is read.

A `Source` is a data set as it lies on disk (or in memory, for `street`). Label maps are uint8 with
class ids; 255 is "not labelled" everywhere. Nothing is preprocessed.
"""

import functools
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import files
import layouts
import street
from errors import UserError, need
from files import OUTSIDE
from layouts import CAMVID, CITYSCAPES, PASCAL, SUN, Sample, voc_palette
from mixing import IGNORE
from transforms import resize_image, resize_label

SPARSE = 0.5  # a label that covers less than this share of its image is sparse


def is_sparse(label: Tensor) -> bool:
    """Whether a label [H, W] covers so little of its image that it is made of points or strokes."""
    return (label != IGNORE).float().mean().item() < SPARSE


def value_table(values: dict[int, int]) -> np.ndarray:
    """uint8 [256]: value on disk -> class id or IGNORE; OUTSIDE for every value not named."""
    table = np.full(256, OUTSIDE, np.uint8)
    table[list(values)] = list(values.values())
    return table


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
        return image, resize_label(label, None, size, self.own_files and is_sparse(label))[0]

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


# ---------------------------------------------------------------------------- the data sets
# What is known of each without its files. Of a user's own folder that is next to nothing.
SOURCES = {
    "street": Source("street", list(street.CLASSES), list(street.PALETTE), uniform=True),
    "camvid": Source(
        "camvid",
        [name for name, _ in CAMVID],
        [colour for _, colour in CAMVID],
        table=value_table({i: i for i in range(11)} | {11: IGNORE, IGNORE: IGNORE}),
        size=(360, 480),
        uniform=True,
        min_classes=9,
    ),
    "cityscapes": Source(
        "cityscapes",
        [name for _, name, _ in CITYSCAPES],
        [colour for _, _, colour in CITYSCAPES],
        table=value_table(
            dict.fromkeys((*range(34), IGNORE), IGNORE)
            | {value: i for i, (value, _, _) in enumerate(CITYSCAPES)}
        ),
        size=(512, 1024),
        uniform=True,
        min_classes=12,
    ),
    "pascal": Source(
        "pascal",
        PASCAL.split(", "),
        voc_palette(21),
        table=value_table({i: i for i in (*range(21), IGNORE)}),
        max_size=500,  # no image is larger
        eval_pad=(513, 513),
        min_classes=3,
    ),
    "sun": Source(
        "sun",
        SUN.split(", "),
        voc_palette(38)[1:],
        table=value_table({0: IGNORE, IGNORE: IGNORE} | {i + 1: i for i in range(37)}),
        size=(384, 512),
        eval_pad=(385, 513),
    ),
    "folder": Source("folder", [], [], own_files=True),
}
LISTED = {
    "camvid": layouts.list_camvid,
    "cityscapes": layouts.list_cityscapes,
    "pascal": layouts.list_pascal,
    "sun": layouts.list_sun,
}


def load_source(
    dataset: str, data_path: str | None, max_size: int | None = None, cache_dir: str | None = None
) -> Source:
    """The data set below `data_path`, its files listed and each image found its label.

    max_size   for --dataset folder: larger images are brought down to this longer side
    cache_dir  where training-size copies are kept
    Raises UserError that names what is missing.
    """
    if dataset == "street":
        need(
            not data_path,
            "--data-path has no meaning with --dataset street, which is drawn in memory",
        )
        return replace(SOURCES["street"], **list_street())
    need(data_path, f"--dataset {dataset} needs --data-path DIR")
    path = Path(data_path)
    need(path.is_dir(), f"{path}: no such folder (--data-path of --dataset {dataset})")
    if dataset == "folder":
        source = load_folder(path, max_size)
    else:
        source = replace(SOURCES[dataset], **LISTED[dataset](path))
    if cache_dir:
        try:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache-dir {cache_dir}: cannot be made ({error.strerror})") from None
        source.cache_dir = Path(cache_dir)
    return source


def list_street() -> layouts.Splits:
    """Every scene of the embedded data; its label is drawn with it."""
    return {
        split: [Sample(f"{split}_{i:04d}", f"street:{split}/{i}", "drawn") for i in range(number)]
        for split, number in street.SPLITS.items()
    }


def load_folder(path: Path, max_size: int | None = None) -> Source:
    """A user's own data: the files of `layouts.list_folder` and the classes that the user names."""
    file, classes, palette, void = layouts.read_classes(path)
    need(
        2 <= len(classes) < OUTSIDE,
        f"{file}: names {len(classes)} classes; 2 to {OUTSIDE - 1} are possible",
    )
    colours = None
    if palette:
        pairs = [*zip(palette, range(len(classes)), strict=True), *((c, IGNORE) for c in void)]
        colours = {files.pack_colour(*colour): i for colour, i in pairs}
        need(len(colours) == len(pairs), f"{file}: gives two entries the same colour")
    splits = layouts.list_folder(path)
    first_label = next(sample.label for sample in splits["train"] if sample.label)
    return replace(
        SOURCES["folder"],
        classes=classes,
        palette=palette or own_palette(first_label, len(classes)) or voc_palette(len(classes)),
        table=value_table({i: i for i in (*range(len(classes)), IGNORE)}),
        table_origin=f" ({file.name} names {len(classes)})",
        colours=colours,
        max_size=max_size,
        **splits,
    )


def own_palette(label: str, number: int) -> list[tuple[int, int, int]] | None:
    """The first colours of a palette PNG; None where there are too few or two are the same."""
    image, _ = files.open_image(label)
    if image.mode != "P":
        return None
    values = image.getpalette() or []
    colours = [tuple(values[3 * i : 3 * i + 3]) for i in range(number)]
    return colours if len(set(colours)) == number and len(values) >= 3 * number else None
