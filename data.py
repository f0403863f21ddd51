"""Data sets, labelled splits, partial labels and transforms.

A `Source` is a data set as it lies on disk (or in memory, for `street`): names, files, classes, how to decode a label.
Label maps are uint8 with train ids; 255 is "not labelled" everywhere. Nothing is preprocessed.
"""

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import street
from mixing import IGNORE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
OUTSIDE = 254  # in a label table: a value that is no class
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class UserError(ValueError):
    """Something the user can mend. Shown as one line, exit status 2."""


def need(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


def note(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {text}", flush=True)


# ----------------------------------------------------------------------------------------------------------- data sets
@dataclass(frozen=True)
class Sample:
    name: str  # what labeled.txt calls it
    image: str  # path, or "street:train/12"
    label: str | None = None  # path; None = an unlabelled image


@dataclass
class Source:
    name: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    train: list[Sample]
    val: list[Sample]
    test: list[Sample] = field(default_factory=list)
    table: np.ndarray | None = None  # uint8 [256]: value on disk -> train id, IGNORE or OUTSIDE
    size: tuple[int, int] | None = None  # (H, W) every image is brought to (training resolution)
    max_size: int | None = None  # ... or the longer side is brought down to
    eval_pad: tuple[int, int] | None = None  # (H, W) evaluated images are padded to
    min_classes: int = 1  # distinct classes an image of the labelled split must hold
    cache_dir: Path | None = None  # training-size copies

    def training_size(self, height: int, width: int) -> tuple[int, int]:
        if self.size:
            return self.size
        shrink = min(1.0, self.max_size / max(height, width)) if self.max_size else 1.0
        return max(1, round(height * shrink)), max(1, round(width * shrink))

    def read(self, sample: Sample, full_resolution: bool = False) -> tuple[Tensor, Tensor]:
        """Image uint8 [3, H, W] and label uint8 [H, W] of one sample at training resolution (or as on disk).
        Raises UserError that names the file."""
        if sample.image.startswith("street:"):
            split, index = sample.image.removeprefix("street:").split("/")
            image, label = street_scene(split, int(index))
            return image, label if sample.label else torch.full_like(label, IGNORE)
        if self.cache_dir and not full_resolution:
            return self.read_cached(sample)
        picture, stored = open_image(sample.image, None if full_resolution else self.training_size)
        size = stored if full_resolution else self.training_size(*stored)
        label = np.full(size, IGNORE, np.uint8)
        if sample.label:
            label = resize_nearest(
                read_label(sample.label, self.table, len(self.classes), stored), size
            )
        return resize_image(to_rgb(picture), size), torch.from_numpy(label)

    def read_cached(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """The training-size copy of a sample, written once (atomically) and reused while the files stay the same."""
        what = [
            sample.image,
            sample.label,
            stamp(sample),
            self.size,
            self.max_size,
            None if self.table is None else self.table.tobytes(),
        ]
        key = hashlib.sha256(repr(what).encode()).hexdigest()
        path = self.cache_dir / key[:2] / f"{key[2:34]}.npy"
        try:
            both = torch.from_numpy(np.load(path, allow_pickle=False))  # uint8 [4, H, W]
        except (OSError, ValueError, EOFError):  # not there yet, or damaged
            image, label = replace(self, cache_dir=None).read(sample)
            both = torch.cat([image, label[None]])
            write_cache(path, lambda file: np.save(file, both.numpy()))
        return both[:3], both[3]


def atomic_write(path: Path, write: Callable) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the whole new one. `write` gets the open file.
    An interrupted write leaves no partial file behind under the final name."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_cache(path: Path, write: Callable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, write)
    except OSError:
        pass  # a full disk: a cache that cannot be written costs only time


def stamp(sample: Sample) -> list[list[int]]:
    """What changes when the files of a sample change: size and time of modification."""
    try:
        return [
            [os.stat(path).st_size, os.stat(path).st_mtime_ns]
            for path in (sample.image, sample.label)
            if path
        ]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


@functools.cache
def street_scene(split: str, index: int) -> tuple[Tensor, Tensor]:
    image, label = street.scene(split, index)  # drawn once, 16 kB each
    return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)


def voc_palette(n: int) -> list[tuple[int, int, int]]:
    """The colour map of Pascal VOC: the bits of the class id, dealt to the high bits of red, green and blue."""
    return [
        tuple(
            sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
            for channel in range(3)
        )
        for i in range(n)
    ]


def list_files(
    folder: Path, what: str, pattern: str = "*", suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> list[Path]:
    """Files of a folder, which must exist; `what` says where it would come from."""
    need(folder.is_dir(), f"{folder}: no such folder ({what})")
    return sorted(
        p
        for p in folder.glob(pattern)
        if p.suffix.lower() in suffixes and not p.name.startswith(".")
    )


def pair(
    images: list[Path],
    label_of: Callable,
    labels: list[Path] = (),
    name_of: Callable = lambda p: p.stem,
) -> list[Sample]:
    """Samples of images with their labels, each of which must exist; so must the image of each of `labels`."""
    wanted = [label_of(image) for image in images]
    for image, label in zip(images, wanted):
        need(label.is_file(), f"{image}: has no label {label}")
    orphan = min(set(labels) - set(wanted), default=None)
    need(
        not orphan,
        f"{orphan}: a label without an image; extract the images once more, or remove it",
    )
    return [Sample(name_of(image), str(image), str(label)) for image, label in zip(images, wanted)]


def table(values: dict[int, int]) -> np.ndarray:
    lut = np.full(256, OUTSIDE, np.uint8)
    lut[list(values)] = list(values.values())
    return lut


def load_street(path=None, max_size=None) -> Source:
    split = {
        s: [Sample(f"{s}_{i:04d}", f"street:{s}/{i}", "drawn") for i in range(n)]
        for s, n in street.SPLITS.items()
    }
    return Source(
        "street",
        list(street.CLASSES),
        list(street.PALETTE),
        split["train"],
        split["val"],
        split["test"],
    )


CITYSCAPES = [  # id on disk, name, colour; the order is the train id
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
]


def load_cityscapes(path: Path, max_size=None) -> Source:
    ids = dict.fromkeys((*range(34), IGNORE), IGNORE) | {
        value: i for i, (value, _, _) in enumerate(CITYSCAPES)
    }

    def root(
        kind: str,
    ) -> Path:  # both archives extracted side by side, or each into a folder of its own
        return next(
            (p for p in (path / kind, path / f"{kind}_trainvaltest" / kind) if p.is_dir()),
            path / kind,
        )

    def split(part: str) -> list[Sample]:
        images, labels = root("leftImg8bit") / part, root("gtFine") / part
        files = list_files(
            images,
            "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, extracted side by side",
            "*/*_leftImg8bit.png",
        )
        need(files, f"{images}: holds no CITY/*_leftImg8bit.png")
        return pair(
            files,
            lambda p: labels / p.parent.name / p.name.replace("_leftImg8bit", "_gtFine_labelIds"),
            list_files(labels, "gtFine_trainvaltest.zip", "*/*_gtFine_labelIds.png"),
            lambda p: p.stem.removesuffix("_leftImg8bit"),
        )

    return Source(
        "cityscapes",
        [c[1] for c in CITYSCAPES],
        [c[2] for c in CITYSCAPES],
        split("train"),
        split("val"),
        table=table(ids),
        size=(512, 1024),
        min_classes=12,
    )


PASCAL = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


def load_pascal(path: Path, max_size=None) -> Source:
    root = next(
        (
            r
            for r in (path, path / "VOC2012", path / "VOCdevkit" / "VOC2012")
            if (r / "JPEGImages").is_dir()
        ),
        path,
    )
    images, plain, augmented = (
        root / name for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug")
    )
    need(images.is_dir(), f"{images}: no such folder (the VOC2012 download, extracted)")

    def names(part: str) -> list[str]:
        file = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        need(file.is_file(), f"{file}: no such list of images")
        return file.read_text().split()

    def split(stems: list[str], labels: Path) -> list[Sample]:
        need(stems, f"{labels}: holds no label for this split")
        missing = next(
            (p for p in (images / f"{stem}.jpg" for stem in stems) if not p.is_file()), None
        )
        need(not missing, f"{missing}: no such image, but it is listed or has a label")
        return pair([images / f"{stem}.jpg" for stem in stems], lambda p: labels / f"{p.stem}.png")

    val = names("val")
    if augmented.is_dir():
        train = split(
            sorted({p.stem for p in list_files(augmented, "", "*.png")} - set(val)), augmented
        )
    else:
        train = split(names("train"), plain)
        note(
            f"{augmented} is not there, so the {len(train)} plain VOC images are used; the augmented set has 10,582"
        )
    return Source(
        "pascal",
        PASCAL,
        voc_palette(21),
        train,
        split(val, plain if plain.is_dir() else augmented),
        table=table({i: i for i in (*range(21), IGNORE)}),
        eval_pad=(513, 513),
        min_classes=3,
    )


SUN = [
    "wall",
    "floor",
    "cabinet",
    "bed",
    "chair",
    "sofa",
    "table",
    "door",
    "window",
    "bookshelf",
    "picture",
    "counter",
    "blinds",
    "desk",
    "shelves",
    "curtain",
    "dresser",
    "pillow",
    "mirror",
    "floor_mat",
    "clothes",
    "ceiling",
    "books",
    "fridge",
    "tv",
    "paper",
    "towel",
    "shower_curtain",
    "box",
    "whiteboard",
    "person",
    "night_stand",
    "toilet",
    "sink",
    "lamp",
    "bathtub",
    "bag",
]


def load_sun(path: Path, max_size=None) -> Source:
    labels = path / "sunrgbd_train_test_labels"

    def images(part: str) -> list[Path]:
        files = list_files(
            path / f"SUNRGBD-{part}_images", "the SUN RGB-D images", suffixes=(".jpg",)
        )
        need(files, f"{path / f'SUNRGBD-{part}_images'}: holds no .jpg")
        odd = next((p for p in files if not p.stem.rpartition("-")[2].isdigit()), None)
        need(not odd, f"{odd}: expected a name like img-000001.jpg")
        return files

    def label_of(p: Path, offset: int = 0) -> Path:
        return labels / f"img-{int(p.stem.rpartition('-')[2]) + offset:06d}.png"

    train, test, everything = (
        images("train"),
        images("test"),
        list_files(labels, "the SUN RGB-D labels, 0 = void", "img-*.png"),
    )
    # the download numbers its training images from 1 again, while their labels follow the 5,050 test labels
    shift = 5050 if {label_of(p, 5050) for p in train} <= set(everything) else 0
    samples = pair(
        train + test,
        lambda p: label_of(p, shift if p.parent.name == "SUNRGBD-train_images" else 0),
        everything,
    )
    return Source(
        "sun",
        SUN,
        voc_palette(38)[1:],
        samples[: len(train)],
        samples[len(train) :],
        table=table({0: IGNORE, IGNORE: IGNORE} | {i + 1: i for i in range(37)}),
        size=(384, 512),
        eval_pad=(385, 513),
    )


def load_folder(path: Path, max_size: int | None = 1024) -> Source:
    """A user's own data: images/{train,val}/*, labels/{train,val}/*.png, classes.txt with one name per line; a test part if there is one."""
    names = path / "classes.txt"
    need(
        names.is_file(),
        f"{names}: no such file; it names the classes, one per line, in the order of the label values 0, 1, ...",
    )
    classes = [
        line.strip()
        for line in names.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        if line.strip()
    ]
    need(
        2 <= len(classes) < OUTSIDE,
        f"{names}: names {len(classes)} classes; 2 to {OUTSIDE - 1} are possible",
    )

    def split(part: str) -> list[Sample]:
        images = list_files(
            path / "images" / part,
            "the layout is images/{train,val}/*, labels/{train,val}/*.png, classes.txt",
        )
        labels = {
            p.stem: p for p in list_files(path / "labels" / part, "one PNG per labelled image")
        }
        stems = sorted(p.stem for p in images)
        need(images, f"{path / 'images' / part}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
        twice = next((a for a, b in zip(stems, stems[1:]) if a == b), None)
        need(
            twice is None,
            f"{path / 'images' / part}: two images are called {twice}; one label could not tell them apart",
        )
        for label in labels.values():
            need(
                label.suffix.lower() == ".png",
                f"{label}: a label must be a PNG; other formats change or scale its values",
            )
        orphan = labels.get(min(labels.keys() - stems, default=None))
        need(
            not orphan,
            f"{orphan}: a label without an image of that name in {path / 'images' / part}",
        )
        bare = next((p for p in images if part != "train" and p.stem not in labels), None)
        need(
            not bare,
            f"{bare}: an image without a label in {path / 'labels' / part}; label it or move it to images/train",
        )
        need(labels, f"{path / 'labels' / part}: holds no label; paint at least one")
        return [
            Sample(p.stem, str(p), str(labels[p.stem]) if p.stem in labels else None)
            for p in images
        ]

    train, val, test = (
        split("train"),
        split("val"),
        split("test") if (path / "labels" / "test").is_dir() else [],
    )
    first = open_image(next(s.label for s in train if s.label))[
        0
    ]  # a palette PNG brings its own colours
    colours = list(zip(*[iter((first.getpalette() or []) if first.mode == "P" else [])] * 3))[
        : len(classes)
    ]
    both = sorted({s.name for s in train} & {s.name for s in val})
    if both:
        note(
            f"{len(both)} names stand in both images/train and images/val ({both[0]} ...); are they the same pictures?"
        )
    return Source(
        "folder",
        classes,
        colours if len(set(colours)) == len(classes) else voc_palette(len(classes)),
        train,
        val,
        test,
        table=table({i: i for i in (*range(len(classes)), IGNORE)}),
        max_size=max_size,
    )


SOURCES = {
    "street": load_street,
    "cityscapes": load_cityscapes,
    "pascal": load_pascal,
    "sun": load_sun,
    "folder": load_folder,
}


def load_source(
    dataset: str, data_path: str | None, max_size: int | None = None, cache_dir: str | None = None
) -> Source:
    """The data set `dataset` below `data_path`, its files listed and paired. Raises UserError that names what is missing."""
    if dataset == "street":
        need(
            not data_path,
            "--data-path has no meaning with --dataset street, which is drawn in memory",
        )
        return load_street()
    need(data_path, f"--dataset {dataset} needs --data-path DIR")
    need(
        Path(data_path).is_dir(),
        f"{data_path}: no such folder (--data-path of --dataset {dataset})",
    )
    source = SOURCES[dataset](Path(data_path), max_size)
    if cache_dir:
        try:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache-dir {cache_dir}: cannot be made ({error.strerror})") from None
        source.cache_dir = Path(cache_dir)
    return source


# ------------------------------------------------------------------------------------------------------- reading files
# Everything is decoded by PIL. torchvision's decoders are a tenth (PNG) to a sixth (JPEG) faster, but a damaged PNG ends the process there.
def open_image(path, fit: Callable | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """A decoded PIL image, turned as its EXIF data say, and its stored height and width. `fit`: (height, width) -> the size needed;
    a JPEG of twice that size is decoded at a half, a quarter or an eighth. Raises UserError that names the file: missing, no image, truncated."""
    try:
        image = Image.open(path)
        width, height = image.size
        if fit:
            image.draft(None, fit(height, width)[::-1])
        image.load()
        turned = image.getexif().get(0x0112, 1) >= 5  # by a quarter
        ImageOps.exif_transpose(image, in_place=True)
        return image, (width, height) if turned else (height, width)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: {'not an image that can be read' if os.path.getsize(path) else 'is empty'}"
        ) from None
    except Exception as error:  # decoders raise many kinds
        raise UserError(
            f"{path}: cannot be decoded, truncated or damaged ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from None


def to_rgb(image: Image.Image) -> Tensor:
    """uint8 RGB [3, H, W]; grey, palette and alpha images brought to RGB, 16 bits to 8."""
    if image.mode.startswith(("I", "F")):  # PIL would clip these at 255
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
        image = Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # a palette may carry transparency
    return torch.from_numpy(
        np.array(image if image.mode == "RGB" else image.convert("RGB"))
    ).permute(2, 0, 1)


def read_image(path) -> Tensor:
    """uint8 RGB [3, H, W] of any picture, turned as its EXIF data say. Raises UserError that names the file."""
    return to_rgb(open_image(path)[0])


def read_label(
    path, lut: np.ndarray, num_classes: int, size: tuple[int, int] | None = None
) -> np.ndarray:
    """uint8 [H, W] of train ids from an index or palette PNG, which must have this size, that of its image. Raises UserError that names the
    file, the value and the allowed range."""
    image, stored = open_image(path)
    need(
        image.mode in ("L", "P", "1", "I", "I;16", "I;16B"),
        f"{path}: is a {image.mode} picture; a label is an index or palette PNG that holds one class number per pixel",
    )
    if size and stored != size:
        raise UserError(
            f"{path}: is {stored[1]}x{stored[0]} but its image is {size[1]}x{size[0]}; they must have one size"
        )
    values = np.asarray(image)
    label = lut.take(
        values.astype(np.uint8)
        if values.dtype in (bool, np.uint8)
        else np.where(values > IGNORE, OUTSIDE, values)
    )
    if (label == OUTSIDE).any():
        allowed = np.flatnonzero(lut[:IGNORE] != OUTSIDE)
        names = (
            f" (classes.txt names {num_classes})"
            if (Path(path).absolute().parents[2] / "classes.txt").is_file()
            else ""
        )
        raise UserError(
            f"{path}: holds the value {values[label == OUTSIDE].min()}, which is no class; allowed are {allowed[0]} to {allowed[-1]}"
            f"{names}, and 255 = not labelled"
        )
    return label


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, h, w], bilinear with antialiasing."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def nearest_index(size: int, original: int, device="cpu") -> Tensor:
    """The source row (or column) under the centre of each of `size` target rows."""
    return (2 * torch.arange(size, device=device) + 1) * original // (2 * size)


def resize_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if values.shape == tuple(size):
        return values
    rows, columns = (nearest_index(*pair).numpy() for pair in zip(size, values.shape))
    return values.take(rows, axis=0).take(columns, axis=1)


# ------------------------------------------------------------------------------------- which images count as labelled
def label_index(source: Source, samples: list[Sample], quiet: bool = True) -> Iterator[dict]:
    """For each sample in turn {"classes": ids in its label, "share": labelled share of its pixels}, read lazily, checked,
    and cached by path, size and time of change of the files (a changed file is read again)."""
    home = (
        source.cache_dir
        or Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        / "reco-segmentation"
    )
    what = [
        source.name,
        source.classes,
        source.size,
        source.max_size,
        os.path.abspath(source.train[0].image),
    ]
    path = home / f"labels-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"
    ids, before = set(range(len(source.classes))), {}
    try:
        known = {
            name: entry
            for name, entry in json.loads(path.read_text()).items()
            if set(entry["classes"]) <= ids and 0 <= entry["share"] <= 1
        }
        before = dict(known)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none yet, or not ours
        known = {}

    def look(sample: Sample) -> dict:
        if sample.image.startswith("street:"):
            return inspect(source, sample)
        name, now = sample.label or sample.image, stamp(sample)
        if name not in known or known[name].get("stamp") != now:
            known[name] = {"stamp": now, **inspect(source, sample)}
        return known[name]

    try:
        bar = tqdm(
            samples, desc="reading labels", unit="file", disable=quiet or None, leave=False, delay=1
        )  # None: on a terminal alone
        with (
            bar,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ):  # decoding releases the interpreter lock
            for start in range(0, len(samples), 32):
                for entry in pool.map(look, samples[start : start + 32]):
                    bar.update()
                    yield entry
    finally:
        if known != before:
            write_cache(path, lambda file: file.write(json.dumps(known).encode()))


def inspect(source: Source, sample: Sample) -> dict:
    """What a label holds. Of a user's own data the image is decoded too (a JPEG at an eighth) and the label checked at full size, so that
    every file is known to be sound before the training begins."""
    stored = (
        open_image(sample.image, lambda height, width: (1, 1))[1]
        if source.name == "folder"
        else None
    )
    if not sample.label:
        return {"classes": [], "share": 0.0}
    if source.name == "street":
        label = source.read(sample)[1].numpy()
    else:
        label = read_label(sample.label, source.table, len(source.classes), stored)
        label = label if stored else resize_nearest(label, source.training_size(*label.shape))
    count = np.bincount(label.ravel(), minlength=256)
    return {
        "classes": np.flatnonzero(count[:IGNORE]).tolist(),
        "share": 1 - int(count[IGNORE]) / label.size,
    }


def labelled_split(source: Source, number: int, seed: int, quiet: bool = True) -> list[Sample]:
    """`number` images that together show every class (SPEC, paper section 4.1): walk over a seeded shuffle of the sorted names; take an
    image if it holds a class that is least often taken so far and at least `source.min_classes` classes. Images passed over are tried
    again when the walk ends. Deterministic in (data, number, seed).
    After a walk in vain the first image of a class not yet seen is taken, however few its classes; a class that no remaining image could
    add is no longer waited for."""
    candidates = sorted((s for s in source.train if s.label), key=lambda s: s.name)
    need(
        number <= len(candidates),
        f"--num-labeled {number}: the data set has only {len(candidates)} labelled training images",
    )
    candidates = [
        candidates[i] for i in np.random.default_rng([seed, 1]).permutation(len(candidates))
    ]
    index = label_index(source, candidates, quiet)
    seen: list[set[int]] = []  # classes of candidates[i], read when the first walk comes to them
    taken, times, remaining = [], np.zeros(len(source.classes), int), list(range(len(candidates)))
    waiting, min_classes = set(range(len(source.classes))), source.min_classes

    def take(i: int) -> None:
        taken.append(candidates[i])
        times[list(seen[i])] += 1
        remaining.remove(i)

    while len(taken) < number:
        before = len(taken)
        for i in list(remaining):
            if i == len(seen):
                seen.append(set(next(index)["classes"]))
            fewest = min(times[c] for c in waiting)
            least = {c for c in waiting if times[c] == fewest}
            if len(seen[i]) >= min_classes and least & seen[i]:
                take(i)
            if len(taken) == number:
                break
        if len(taken) == before:  # a walk in vain
            unseen = next((i for i in remaining if least & seen[i]), None) if fewest == 0 else None
            if unseen is not None:
                take(unseen)
            elif waiting - least:
                waiting -= least
            elif (
                min_classes > 1
            ):  # too few images show so many classes: from here on the others will do
                waiting, min_classes = set(range(len(source.classes))), 1
            else:
                for i in remaining[: number - len(taken)]:
                    take(i)
    index.close()
    return taken


def published_split(source: Source, path: str) -> list[Sample]:
    """The images a split file names, one per line: a bare name or a path, with or without the label's path after it."""
    file, by_name, chosen = Path(path), {s.name: s for s in source.train}, {}
    need(file.is_file(), f"--labeled-list {path}: no such file")
    for number, line in enumerate(
        file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1
    ):
        if line.strip():
            files = [
                Path(line.strip()),
                Path(line.split()[0]),
            ]  # a user's file name may hold spaces
            names = [
                name
                for p in files
                for name in (p.name, p.stem, p.stem.removesuffix("_leftImg8bit"))
            ]
            sample = next((by_name[name] for name in names if name in by_name), None)
            need(
                sample,
                f"{path}, line {number}: {line.split()[0]} is no training image of this data set",
            )
            need(sample.label, f"{path}, line {number}: {sample.image} has no label")
            chosen[sample.name] = sample
    need(chosen, f"--labeled-list {path}: names no image")
    return list(chosen.values())


def check_folder(source: Source, quiet: bool = True) -> bool:
    """Read every file of a user's own data once (then it is remembered) and raise UserError for what cannot be used. True where the labels are
    sparse: a quarter of them or more cover less than half of their pixels, so all count as partial."""
    entries = dict(
        zip(source.train + source.val, label_index(source, source.train + source.val, quiet))
    )
    labelled = {sample: entry for sample, entry in entries.items() if sample.label}
    absent = set(range(len(source.classes))).difference(
        *(entry["classes"] for entry in labelled.values())
    )
    void = next((sample for sample, entry in labelled.items() if entry["share"] < 1), None)
    if 0 not in absent and len(absent) == len(source.classes) - 1 and void:
        raise UserError(
            f"{void.label}: like all other labels it holds nothing but 0 and 255, as a 0/255 mask; 255 means not labelled, so use 0/1"
        )
    if absent and not quiet:
        note(
            f"no label holds {', '.join(source.classes[c] for c in sorted(absent)[:5])}{' ...' if len(absent) > 5 else ''}, which classes.txt names"
        )
    return bool(np.mean([entries[s]["share"] < 0.5 for s in source.train if s.label]) >= 0.25)


def divide(
    source: Source,
    num_labeled: int,
    label_ratio: str | None,
    labeled_list: str | None,
    seed: int,
    quiet: bool = True,
) -> tuple[list[Sample], list[Sample], bool]:
    """The labelled images, the unlabelled images, and whether labels are partial. Unlabelled images come without their label,
    but for partial labels, where every image takes part in both roles and keeps the pixels that are known. Where no
    image is left over (every image labelled) all are used without their labels."""
    sparse = source.name == "folder" and check_folder(source, quiet)
    labelled = [s for s in source.train if s.label]
    if labeled_list:
        labelled = published_split(source, labeled_list)
    elif num_labeled:
        labelled = labelled_split(source, num_labeled, seed, quiet)
    chosen, bare = set(labelled), [replace(s, label=None) for s in source.train]
    if label_ratio or sparse:
        return labelled, [s if s in chosen else b for s, b in zip(source.train, bare)], True
    return labelled, [b for s, b in zip(source.train, bare) if s not in chosen] or bare, False


# ------------------------------------------------------------------------------------------------------ partial labels
RATIOS = {"p0": 0, "p1": 1, "p5": 5, "p25": 25}  # per cent


def partial_label(label: np.ndarray, ratio: str, seed: int, name: str) -> np.ndarray:
    """The label (uint8 [H, W]) with all but a few pixels of each class set to 255; paper, section 4.2.

    p0 keeps one uniformly drawn pixel per class. pX starts from that pixel and grows a square, 5x5 dilation by 5x5
    dilation, until at least int(X % of the class's pixels) are covered: after k dilations the pixels of the class
    within Chebyshev distance 2k. So the level at which each pixel is reached is known at once, and one bincount over
    (class, level) gives the stopping level of every class. A pure function of (label, ratio, seed, name).
    """
    height, width = label.shape
    by_row = (
        np.bincount((label + 256 * np.arange(height)[:, None]).ravel(), minlength=256 * height)
        .reshape(height, 256)
        .cumsum(axis=0)
    )
    counts = by_row[-1] * (np.arange(256) != IGNORE)
    draws = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(
        256
    )  # for every class id, so that one does not shift another's
    classes = np.flatnonzero(counts)
    y0, x0 = np.zeros(256, np.int16), np.zeros(256, np.int16)
    for c in classes:  # the drawn pixel of the class, counted row by row
        pick = int(draws[c] * counts[c])
        y0[c] = row = np.searchsorted(by_row[:, c], pick, side="right")
        x0[c] = np.flatnonzero(label[row] == c)[pick - (by_row[row - 1, c] if row else 0)]
    if ratio == "p0":
        kept = np.full_like(label, IGNORE)
        kept[y0[classes], x0[classes]] = classes
        return kept
    down, across = np.arange(height, dtype=np.int16)[:, None], np.arange(width, dtype=np.int16)
    level = np.maximum(np.abs(down - y0.take(label)), np.abs(across - x0.take(label)))
    level = (level + np.int16(1)) >> np.int16(1)  # the dilation that reaches the pixel
    levels = int(level.max()) + 1
    key = label.astype(np.intp) * levels + level
    reached = np.bincount(key.ravel(), minlength=256 * levels).reshape(256, levels).cumsum(axis=1)
    wanted = np.maximum(
        counts * RATIOS[ratio] // 100, 1
    )  # int(X % of n), and the start pixel itself
    stop = (reached >= wanted[:, None]).argmax(axis=1)
    keep = (np.arange(levels) <= stop[:, None]) & (counts > 0)[:, None]  # [class, level]
    return np.where(keep, np.arange(256)[:, None], IGNORE).astype(np.uint8).take(key)


# ---------------------------------------------------------------------------------------------------------- transforms
def reflect_pad(x: Tensor, height: int, width: int) -> Tensor:
    """[..., H, W] continued on the right and below to at least this size, reflected as often as needed."""
    for dim, wanted in ((-2, height), (-1, width)):
        while x.shape[dim] < wanted:
            size = x.shape[dim]
            more = min(wanted - size, max(size - 1, 1))
            x = torch.cat([x, x.narrow(dim, max(size - 1 - more, 0), more).flip(dim)], dim)
    return x


def random_scale_crop(
    image: Tensor,
    label: Tensor,
    confidence: Tensor | None,
    crop: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One image [3, H, W] (uint8 or float), its label [H, W] and confidence [H, W] (or None): scaled together by a
    uniform factor, padded on the right and below to the crop size (image reflected, label 255, confidence 0) and
    cropped at random. Bilinear (antialiased) for the image, nearest for the others. The draws are made on the CPU."""
    factor = rng.uniform(*scale)
    height, width = image.shape[-2:]
    h, w = max(1, int(height * factor)), max(1, int(width * factor))
    y, x = (int(rng.integers(max(size - part, 0) + 1)) for size, part in zip((h, w), crop))
    if (h, w) != (height, width):
        image = F.interpolate(image[None], size=(h, w), mode="bilinear", antialias=True)[0]
        index = (
            nearest_index(h, height, label.device)[:, None] * width
            + nearest_index(w, width, label.device)
        ).flatten()
    window = (..., slice(y, y + crop[0]), slice(x, x + crop[1]))

    def follow(values: Tensor, outside: int) -> Tensor:
        if (h, w) != (height, width):
            values = values.flatten().index_select(0, index).view(h, w)
        return F.pad(values, (0, max(crop[1] - w, 0), 0, max(crop[0] - h, 0)), value=outside)[
            window
        ]

    return (
        reflect_pad(image, *crop)[window],
        follow(label, IGNORE),
        None if confidence is None else follow(confidence, 0),
    )


def batch_scale_crop(
    images: Tensor,
    labels: Tensor,
    confidence: Tensor,
    crop: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """`random_scale_crop` of each image of a batch [B, 3, H, W], [B, H, W], [B, H, W], on its device."""
    if scale == (1.0, 1.0) and tuple(images.shape[-2:]) == tuple(crop):
        return images, labels, confidence
    cropped = [
        random_scale_crop(*each, crop, scale, rng) for each in zip(images, labels, confidence)
    ]
    return tuple(torch.stack(parts) for parts in zip(*cropped))


def augment(
    images: Tensor, labels: Tensor, confidence: Tensor | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Colour jitter, blur and flip of a batch (SPEC, "Semi-supervised step"), on its device, each image with its own draws.

    images [B, 3, H, W] float in [0, 1]; labels and confidence [B, H, W] (confidence may be None). Jitter with probability 0.8: brightness,
    contrast, saturation 0.75-1.25, hue +-0.25, in random order; blur with 0.5, sigma 0.15-1.15; flip with 0.5. The draws are made on the CPU
    and sent without waiting, so the host knows which images a change is for and only these are touched.
    """
    batch = len(images)
    jitter, blur, flip = rng.random((3, batch)) < [[0.8], [0.5], [0.5]]
    order = rng.random((batch, 4)).argsort(axis=1)  # of the four changes below
    amount = np.concatenate(
        [rng.uniform(0.75, 1.25, (3, batch)), rng.uniform(-0.25, 0.25, (1, batch))]
    ).astype(np.float32)
    sigma = rng.uniform(0.15, 1.15, batch).astype(np.float32)

    def mirrored(x: Tensor, part: slice) -> Tensor:
        return change_some(x, flip[part], lambda x: x.flip(-1))

    def look(part: slice) -> Tensor:
        x = images[part]
        for turn in range(4):
            for i, change in enumerate(JITTER):
                x = change_some(x, jitter[part] & (order[part, turn] == i), change, amount[i, part])
        return mirrored(change_some(x, blur[part], gaussian_blur, sigma[part]), part)

    # on the CPU image by image, so that an image and what is made of it stay in the cache
    size = 1 if images.device.type == "cpu" else batch
    images = torch.cat([look(slice(i, i + size)) for i in range(0, batch, size)])
    return (
        images,
        mirrored(labels, slice(batch)),
        None if confidence is None else mirrored(confidence, slice(batch)),
    )


def change_some(
    x: Tensor, chosen: np.ndarray, change: Callable, amount: np.ndarray | None = None
) -> Tensor:
    """x [B, ...] with `change` applied to the chosen (bool [B], on the host) of its images, each with its amount [B]."""
    index = np.flatnonzero(chosen)
    if not len(index):
        return x
    amounts = [] if amount is None else [send(amount[index], x.device)]
    if len(index) == len(x):
        return change(x, *amounts)
    index = send(index, x.device)
    return x.index_copy(0, index, change(x.index_select(0, index), *amounts))


def send(values: np.ndarray, device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def grey(x: Tensor) -> Tensor:
    """Luma of [B, 3, H, W] -> [B, 1, H, W]."""
    return (0.299 * x[:, :1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle; value and chroma stay. With the hue h in sixths, red is value - chroma +
    chroma * clamp(|h - 3| - 1, 0, 1), green and blue are value - chroma * clamp(|h - 2| - 1, 0, 1) and the same with 4."""
    red, green, blue = x.unbind(1)  # [B, H, W]
    value = torch.maximum(torch.maximum(red, green), blue)
    minimum = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - minimum
    safe = chroma.clamp_min(1e-8)
    hue = torch.where(
        value == red,
        (green - blue).div_(safe),
        torch.where(
            value == green, (blue - red).div_(safe).add_(2), (red - green).div_(safe).add_(4)
        ),
    )
    hue.add_(shift[:, None, None], alpha=6)
    hue.sub_(hue.div(6).floor_(), alpha=6)  # 0 to 6

    def ramp(n: int) -> Tensor:
        return (hue - n).abs_().sub_(1).clamp_(0, 1)

    return torch.stack(
        [
            minimum.addcmul_(chroma, ramp(3)),
            torch.addcmul(value, chroma, ramp(2), value=-1),
            torch.addcmul(value, chroma, ramp(4), value=-1),
        ],
        dim=1,
    )


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blurred with its own sigma in pixels; nine taps (3 sigma at most 1.15), edges replicated. Sums of shifted images: faster on the CPU
    than a grouped convolution, and exact where convolutions are rounded to TF32."""
    taps = torch.exp(
        -0.5 * (torch.arange(5, device=x.device) / sigma[:, None]) ** 2
    )  # [B, 5], the centre and one side
    taps = (taps / (2 * taps.sum(dim=1, keepdim=True) - 1))[:, :, None, None, None]
    for dim, edges in ((-1, (4, 4, 0, 0)), (-2, (0, 0, 4, 4))):
        size, padded = x.shape[dim], F.pad(x, edges, mode="replicate")
        x = padded.narrow(dim, 4, size) * taps[:, 0]
        for k in range(1, 5):
            x.addcmul_(
                padded.narrow(dim, 4 - k, size) + padded.narrow(dim, 4 + k, size), taps[:, k]
            )
    return x


def blend(other: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, x, factor[:, None, None, None]).clamp_(0, 1)


JITTER = (
    lambda x, factor: blend(x.new_zeros(1), x, factor),  # brightness
    lambda x, factor: blend(grey(x).mean(dim=(2, 3), keepdim=True), x, factor),  # contrast
    lambda x, factor: blend(grey(x), x, factor),  # saturation
    shift_hue,
)


def shrink_label(label: Tensor, size) -> Tensor:
    """Nearest sampling of [B, H, W] (labels, masks, confidences) at the size of the representation, never through a one-hot tensor."""
    return F.interpolate(label[:, None].float(), size=tuple(size), mode="nearest")[:, 0].to(
        label.dtype
    )


def to_float(images: Tensor, device) -> Tensor:
    """uint8 [B, 3, H, W] on the host -> float in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float().div_(255)


@functools.cache
def mean_colour(device) -> Tensor:
    """[3, 1, 1], the colour that normalises to 0."""
    return torch.tensor(MEAN, device=device)[:, None, None]


def normalise(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> ImageNet mean 0 and deviation 1."""
    # the constants stand in the kernel's arguments, so nothing is sent to the device
    return torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
