"""Data sets, labelled splits, partial labels and transforms.

A `Source` is a data set as it lies on disk (or in memory, for `street`): names, files, classes, how to decode a label.
Label maps are uint8 with train ids; 255 is "not labelled" everywhere. Nothing is preprocessed.
"""
import functools
import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

import street
from mixing import IGNORE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
OUTSIDE = 254  # in a label table: a value that is no class
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class UserError(ValueError):
    """Something the user can mend. Shown as one line, exit status 2."""


# ----------------------------------------------------------------------------------------------------------- data sets
@dataclass(frozen=True)
class Sample:
    name: str                  # what labeled.txt calls it
    image: str                 # path, or "street:train/12"
    label: str | None = None   # path; None = an unlabelled image


@dataclass
class Source:
    name: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    train: list[Sample]
    val: list[Sample]
    test: list[Sample] = field(default_factory=list)
    table: np.ndarray | None = None            # uint8 [256]: value on disk -> train id, IGNORE or OUTSIDE
    size: tuple[int, int] | None = None        # (H, W) every image is brought to (training resolution)
    max_size: int | None = None                # ... or the longer side is brought down to
    eval_pad: tuple[int, int] | None = None    # (H, W) evaluated images are padded to
    min_classes: int = 1                       # distinct classes an image of the labelled split must hold
    cache_dir: Path | None = None              # training-size copies

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
        image = read_image(sample.image)
        height, width = image.shape[-2:]
        if sample.label is None:
            label = np.full((height, width), IGNORE, np.uint8)
        else:
            label = read_label(sample.label, self.table, len(self.classes))
            if label.shape != (height, width):
                raise UserError(f"{sample.label}: is {label.shape[1]}x{label.shape[0]} but its image {sample.image} is {width}x{height}; "
                                "a label must have the size of its image")
        size = (height, width) if full_resolution else self.training_size(height, width)
        return resize_image(image, size), torch.from_numpy(resize_nearest(label, size))

    def read_cached(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """The training-size copy of a sample, written once (atomically) and reused while the files stay the same."""
        stamp = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in (sample.image, sample.label) if path]
        key = hashlib.sha256(repr((stamp, self.size, self.max_size, None if self.table is None else self.table.tobytes())).encode()).hexdigest()
        path = self.cache_dir / key[:2] / f"{key[2:34]}.npy"
        if path.exists():
            both = torch.from_numpy(np.load(path, allow_pickle=False))  # [4, H, W]
        else:
            image, label = replace(self, cache_dir=None).read(sample)
            both = torch.cat([image, label[None]])
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda file: np.save(file, both.numpy()))
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


_scenes: dict = {}


def street_scene(split: str, index: int) -> tuple[Tensor, Tensor]:
    if (split, index) not in _scenes:  # drawn once, 16 kB each
        image, label = street.scene(split, index)
        _scenes[split, index] = torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)
    return _scenes[split, index]


def voc_palette(n: int) -> list[tuple[int, int, int]]:
    """The colour map of Pascal VOC: the bits of the class id, dealt to the high bits of red, green and blue."""
    return [tuple(sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)) for i in range(n)]


def need_folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder ({what})")
    return path


def list_files(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file() and not p.name.startswith("."))


def pair(images: list[Path], label_of: Callable[[Path], Path | None], name_of: Callable[[Path], str] = lambda p: p.stem) -> list[Sample]:
    """Samples of images with their labels, each of which must exist."""
    samples = []
    for image in images:
        label = label_of(image)
        if not label.is_file():
            raise UserError(f"{image}: has no label {label}")
        samples.append(Sample(name_of(image), str(image), str(label)))
    return samples


def table(values: dict[int, int]) -> np.ndarray:
    lut = np.full(256, OUTSIDE, np.uint8)
    for value, train_id in values.items():
        lut[value] = train_id
    return lut


def load_street(path, max_size=None) -> Source:
    split = {s: [Sample(f"{s}_{i:04d}", f"street:{s}/{i}", "drawn") for i in range(n)] for s, n in street.SPLITS.items()}
    return Source("street", list(street.CLASSES), list(street.PALETTE), split["train"], split["val"], split["test"])


CITYSCAPES = [  # id on disk, name, colour; the order is the train id
    (7, "road", (128, 64, 128)), (8, "sidewalk", (244, 35, 232)), (11, "building", (70, 70, 70)), (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)), (17, "pole", (153, 153, 153)), (19, "traffic light", (250, 170, 30)), (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)), (22, "terrain", (152, 251, 152)), (23, "sky", (70, 130, 180)), (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)), (26, "car", (0, 0, 142)), (27, "truck", (0, 0, 70)), (28, "bus", (0, 60, 100)), (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)), (33, "bicycle", (119, 11, 32))]


def load_cityscapes(path: Path, max_size=None) -> Source:
    ids = {value: IGNORE for value in range(34)} | {value: i for i, (value, _, _) in enumerate(CITYSCAPES)}
    ids[IGNORE] = IGNORE  # -1 (licence plate), as some tools write it

    def split(part: str) -> list[Sample]:
        images = need_folder(path / "leftImg8bit" / part, "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, extracted side by side")
        files = sorted(images.glob("*/*_leftImg8bit.png"))
        if not files:
            raise UserError(f"{images}: holds no CITY/*_leftImg8bit.png")
        return pair(files, lambda p: path / "gtFine" / part / p.parent.name / p.name.replace("_leftImg8bit", "_gtFine_labelIds"),
                    lambda p: p.stem.removesuffix("_leftImg8bit"))
    return Source("cityscapes", [c[1] for c in CITYSCAPES], [c[2] for c in CITYSCAPES], split("train"), split("val"),
                  table=table(ids), size=(512, 1024), min_classes=12)


PASCAL = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
          "sofa train tvmonitor").split()


def load_pascal(path: Path, max_size=None) -> Source:
    root = next((r for r in (path, path / "VOC2012", path / "VOCdevkit" / "VOC2012") if (r / "JPEGImages").is_dir()), path)
    need_folder(root / "JPEGImages", "the VOC2012 download, extracted")
    lists, plain, augmented = root / "ImageSets" / "Segmentation", root / "SegmentationClass", root / "SegmentationClassAug"

    def names(part: str) -> list[str]:
        if not (lists / f"{part}.txt").is_file():
            raise UserError(f"{lists / f'{part}.txt'}: no such list of images")
        return (lists / f"{part}.txt").read_text().split()
    val = names("val")
    labels = augmented if augmented.is_dir() else plain
    train = sorted({p.stem for p in list_files(augmented, [".png"])} - set(val)) if augmented.is_dir() else names("train")

    def split(stems: list[str], folder: Path) -> list[Sample]:
        images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
        missing = next((p for p in images if not p.is_file()), None)
        if missing or not images:
            raise UserError(f"{missing or labels}: no such image" if missing else f"{labels}: holds no training label")
        return pair(images, lambda p: folder / f"{p.stem}.png")
    return Source("pascal", PASCAL, voc_palette(21), split(train, labels), split(val, plain if plain.is_dir() else augmented),
                  table=table({i: i for i in range(21)} | {IGNORE: IGNORE}), eval_pad=(513, 513), min_classes=3)


SUN = ("wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser pillow mirror "
       "floor_mat clothes ceiling books fridge tv paper towel shower_curtain box whiteboard person night_stand toilet sink lamp bathtub bag").split()


def load_sun(path: Path, max_size=None) -> Source:
    labels = need_folder(path / "sunrgbd_train_test_labels", "the SUN RGB-D labels, 0 = void")

    def images(part: str) -> list[Path]:
        files = list_files(need_folder(path / f"SUNRGBD-{part}_images", "SUN RGB-D images"), [".jpg"])
        if not files:
            raise UserError(f"{path / f'SUNRGBD-{part}_images'}: holds no .jpg")
        return files

    def number(p: Path) -> int:
        digits = p.stem.rpartition("-")[2]
        if not digits.isdigit():
            raise UserError(f"{p}: expected a name like img-000001.jpg")
        return int(digits)
    train, test = images("train"), images("test")
    # the download numbers its training images from 1 again, while their labels follow the 5,050 test labels
    offset = 5050 if all(number(p) <= 5285 and (labels / f"img-{number(p) + 5050:06d}.png").is_file() for p in train) else 0
    return Source("sun", SUN, voc_palette(38)[1:], pair(train, lambda p: labels / f"img-{number(p) + offset:06d}.png"),
                  pair(test, lambda p: labels / f"img-{number(p):06d}.png"),
                  table=table({0: IGNORE, IGNORE: IGNORE} | {i + 1: i for i in range(37)}), size=(384, 512), eval_pad=(385, 513))


def load_folder(path: Path, max_size: int | None = 1024) -> Source:
    """A user's own data: images/{train,val}/*, labels/{train,val}/*.png, classes.txt with one name per line."""
    if not (path / "classes.txt").is_file():
        raise UserError(f"{path / 'classes.txt'}: no such file; it names the classes, one per line, in the order of the label values 0, 1, ...")
    classes = [line.strip() for line in (path / "classes.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    if not 2 <= len(classes) <= OUTSIDE:
        raise UserError(f"{path / 'classes.txt'}: names {len(classes)} classes; 2 to {OUTSIDE} are possible")

    def split(part: str) -> list[Sample]:
        images = list_files(need_folder(path / "images" / part, "the layout is images/{train,val}/*, labels/{train,val}/*.png, classes.txt"))
        labels = {p.stem: p for p in list_files(need_folder(path / "labels" / part, "one PNG per labelled image"), [".png"])}
        if not images:
            raise UserError(f"{path / 'images' / part}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
        stems = [p.stem for p in images]
        if len(set(stems)) < len(stems):
            raise UserError(f"{path / 'images' / part}: two images are called {next(s for s in stems if stems.count(s) > 1)}; one label could not tell them apart")
        orphan = sorted(set(labels) - set(stems))
        if orphan:
            raise UserError(f"{labels[orphan[0]]}: a label without an image of that name in {path / 'images' / part}")
        return [Sample(p.stem, str(p), str(labels[p.stem]) if p.stem in labels else None) for p in images]
    train, val = split("train"), split("val")
    if not any(s.label for s in train):
        raise UserError(f"{path / 'labels' / 'train'}: holds no label; paint at least one")
    bare = next((s for s in val if s.label is None), None)
    if bare:
        raise UserError(f"{bare.image}: a validation image without a label in {path / 'labels' / 'val'}; label it or move it to images/train")
    both = {s.name for s in train} & {s.name for s in val}
    source = Source("folder", classes, voc_palette(len(classes)), train, val, max_size=max_size,
                    table=table({i: i for i in range(len(classes))} | {IGNORE: IGNORE}))
    with Image.open(next(s.label for s in train if s.label)) as first:  # a palette PNG brings its own colours
        colours = first.getpalette() if first.mode == "P" else None
    if colours and len(set(zip(*[iter(colours[:3 * len(classes)])] * 3))) == len(classes):
        source.palette = [tuple(colours[3 * i:3 * i + 3]) for i in range(len(classes))]
    if both:
        print(f"note: {len(both)} names stand in both images/train and images/val ({sorted(both)[0]} ...); are they the same pictures?")
    return source


SOURCES = {"street": load_street, "cityscapes": load_cityscapes, "pascal": load_pascal, "sun": load_sun, "folder": load_folder}


def load_source(dataset: str, data_path: str | None, max_size: int | None = None, cache_dir: str | None = None) -> Source:
    """The data set `dataset` below `data_path`, its files listed and paired. Raises UserError that names what is missing."""
    if dataset == "street":
        if data_path:
            raise UserError("--data-path has no meaning with --dataset street, which is drawn in memory")
        return load_street(None)
    if not data_path:
        raise UserError(f"--dataset {dataset} needs --data-path DIR")
    source = SOURCES[dataset](need_folder(Path(data_path), f"--data-path of --dataset {dataset}"), max_size)
    source.cache_dir = Path(cache_dir) if cache_dir else None
    return source


# ------------------------------------------------------------------------------------------------------- reading files
def open_image(path) -> Image.Image:
    """A decoded PIL image. Raises UserError that names the file: missing, no image, truncated."""
    try:
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image that can be read") from None
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be decoded, truncated or damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None


def read_image(path) -> Tensor:
    """uint8 RGB [3, H, W]; EXIF rotation applied, grey, palette and alpha images brought to RGB, 16 bits to 8."""
    image = ImageOps.exif_transpose(open_image(path))
    if image.mode.startswith(("I", "F")):  # 16-bit grey; PIL would clip it at 255
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
        image = Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # a palette may carry transparency
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_label(path, lut: np.ndarray, num_classes: int) -> np.ndarray:
    """uint8 [H, W] of train ids from an index or palette PNG. Raises UserError that names the file and the value."""
    image = open_image(path)
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        raise UserError(f"{path}: is a {image.mode} picture; a label is an index or palette PNG that holds one class number per pixel")
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    if values.dtype != np.uint8:
        if values.min() < 0 or values.max() > 255:
            raise UserError(f"{path}: holds the value {values.max()}; allowed are 0 to {num_classes - 1}, and 255 = not labelled")
        values = values.astype(np.uint8)
    label = lut[values]
    if label.max(initial=0) >= num_classes and (label == OUTSIDE).any():
        wrong = sorted(set(np.unique(values).tolist()) & set(np.flatnonzero(lut == OUTSIDE).tolist()))
        allowed = np.flatnonzero(lut < OUTSIDE)
        raise UserError(f"{path}: holds the value {wrong[0]}, which is no class; allowed are {allowed.min()} to {allowed.max()}, and 255 = not labelled")
    return label


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, h, w], bilinear with antialiasing."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def nearest_index(size: int, original: int) -> np.ndarray:
    """The source row (or column) under the centre of each of `size` target rows."""
    return np.minimum(((np.arange(size) + 0.5) * original / size).astype(np.int64), original - 1)


def resize_nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if label.shape == tuple(size):
        return label
    return label[nearest_index(size[0], label.shape[0])][:, nearest_index(size[1], label.shape[1])]


# ------------------------------------------------------------------------------------- which images count as labelled
def label_index(source: Source, samples: list[Sample], quiet: bool = True) -> Iterator[dict]:
    """For each sample in turn {"classes": ids present, "share": labelled share of its pixels}, read lazily, checked,
    and cached by path, size and time of change of the files (a changed file is read again)."""
    home = source.cache_dir or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reco-segmentation"
    root = hashlib.sha256(f"{source.name}{source.classes}{source.size}{source.max_size}{os.path.abspath(samples[0].image) if samples else ''}".encode())
    path = home / f"labels-{root.hexdigest()[:16]}.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    changed = False

    def look(sample: Sample) -> dict:
        nonlocal changed
        if sample.image.startswith("street:"):
            label = source.read(sample)[1].numpy()
            return {"classes": present_classes(label), "share": 1.0}
        stamp = [[os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in (sample.image, sample.label)]
        entry = known.get(sample.label)
        if entry is None or entry["stamp"] != stamp:
            if source.name == "folder":
                label = source.read(sample)[1].numpy()  # decodes the image too: its size and its soundness are checked
            else:
                label = read_label(sample.label, source.table, len(source.classes))
                label = resize_nearest(label, source.training_size(*label.shape))
            entry = {"stamp": stamp, "classes": present_classes(label), "share": float((label != IGNORE).mean())}
            known[sample.label], changed = entry, True
        return entry
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
            chunk = 32
            bar = tqdm(samples, desc="reading labels", unit="label", disable=quiet, leave=False, delay=1)
            for start in range(0, len(samples), chunk):
                for entry in pool.map(look, samples[start:start + chunk]):
                    bar.update()
                    yield entry
            bar.close()
    finally:
        if changed:
            try:
                home.mkdir(parents=True, exist_ok=True)
                atomic_write(path, lambda file: file.write(json.dumps(known).encode()))
            except OSError:
                pass  # a cache that cannot be written costs only time


def present_classes(label: np.ndarray) -> list[int]:
    return np.flatnonzero(np.bincount(label.ravel(), minlength=256)[:OUTSIDE]).tolist()


def labelled_split(source: Source, number: int, seed: int, quiet: bool = True) -> list[Sample]:
    """`number` images that together show every class (SPEC, paper section 4.1): walk over a seeded shuffle of the
    sorted names; take an image if it holds a class that is least often taken so far and at least
    `source.min_classes` classes. Images passed over are tried again when the walk ends; a class that no remaining
    image could add is then no longer waited for. Deterministic in (data, number, seed)."""
    candidates = sorted((s for s in source.train if s.label), key=lambda s: s.name)
    if number > len(candidates):
        raise UserError(f"--num-labeled {number}: the data set has only {len(candidates)} labelled training images")
    candidates = [candidates[i] for i in np.random.default_rng([seed, 1]).permutation(len(candidates))]
    index = label_index(source, candidates, quiet)
    seen: list[set[int]] = []  # classes of candidates[i], read when the first walk comes to them
    taken, times = [], np.zeros(len(source.classes), int)
    waited_for, min_classes, remaining = set(range(len(source.classes))), source.min_classes, list(range(len(candidates)))
    while len(taken) < number:
        passed, before = [], len(taken)
        for i in remaining:
            if i == len(seen):
                seen.append(set(next(index)["classes"]))
            fewest = min(times[c] for c in waited_for)
            least = {c for c in waited_for if times[c] == fewest}
            if len(taken) < number and len(seen[i]) >= min_classes and least & seen[i]:
                taken.append(candidates[i])
                times[list(seen[i])] += 1
            else:
                passed.append(i)
            if len(taken) == number:
                break
        if len(taken) == before:  # no remaining image holds these classes: wait for the others
            waited_for -= least
            if not waited_for:    # nor any other: first too few images show min_classes, then any image will do
                if min_classes == 1:
                    taken += [candidates[i] for i in passed[:number - len(taken)]]
                waited_for, min_classes = set(range(len(source.classes))), 1
        remaining = passed
    index.close()
    return taken


def published_split(source: Source, path: str) -> list[Sample]:
    """The images a split file names, one per line: a bare name or a path, with or without the label's path after it."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--labeled-list {path}: no such file")
    by_name, chosen = {s.name: s for s in source.train}, {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.split():
            continue
        name = Path(line.split()[0]).name
        stem = name if name in by_name else name.rpartition(".")[0] or name
        stem = stem if stem in by_name else stem.removesuffix("_leftImg8bit")
        if stem not in by_name:
            raise UserError(f"{path}, line {number}: {line.split()[0]} is no training image of this data set")
        if by_name[stem].label is None:
            raise UserError(f"{path}, line {number}: {stem} has no label")
        chosen[stem] = by_name[stem]
    if not chosen:
        raise UserError(f"--labeled-list {path}: names no image")
    return list(chosen.values())


def divide(source: Source, num_labeled: int, label_ratio: str | None, labeled_list: str | None, seed: int,
           quiet: bool = True) -> tuple[list[Sample], list[Sample], bool]:
    """The labelled images, the unlabelled images, and whether labels are partial. Unlabelled images come without their label,
    but for partial labels, where every image takes part in both roles and keeps the pixels that are known. Where no
    image is left over (every image labelled) all are used without their labels."""
    with_label, partial = [s for s in source.train if s.label], bool(label_ratio)
    if source.name == "folder":  # a user's own labels are all read and checked before the training begins, and then remembered
        entries = list(label_index(source, with_label + source.val, quiet))[:len(with_label)]
        partial = partial or float(np.median([entry["share"] for entry in entries])) < SPARSE
    labelled = published_split(source, labeled_list) if labeled_list else labelled_split(source, num_labeled, seed, quiet) if num_labeled else with_label
    names = {s.name for s in labelled}
    if partial:
        return labelled, [s if s.name in names else replace(s, label=None) for s in source.train], True
    return labelled, [replace(s, label=None) for s in source.train if s.name not in names] or [replace(s, label=None) for s in source.train], False


SPARSE = 0.5  # a user's labels count as partial when the median one covers less than this share of its pixels


# ------------------------------------------------------------------------------------------------------ partial labels
RATIOS = {"p0": 0.0, "p1": 0.01, "p5": 0.05, "p25": 0.25}


def partial_label(label: np.ndarray, ratio: str, seed: int, name: str) -> np.ndarray:
    """The label (uint8 [H, W]) with all but a few pixels of each class set to 255; paper, section 4.2.

    p0 keeps one uniformly drawn pixel per class. pX starts from that pixel and grows a square, 5x5 dilation by 5x5
    dilation, until at least int(X % of the class's pixels) are covered: after k dilations the pixels of the class
    within Chebyshev distance 2k. So the level at which each pixel is reached is known at once, and one bincount over
    (class, level) gives the stopping level of every class. A pure function of (label, ratio, seed, name).
    """
    height, width = label.shape
    flat = label.ravel()
    counts = np.bincount(flat, minlength=256)[:256]
    counts[IGNORE] = 0
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    pick = (rng.random(256) * counts).astype(np.int64)  # for every class id, so that one does not shift another's draw
    order = np.argsort(flat, kind="stable")  # uint8: a radix sort
    start = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=256))[:-1]])
    seeds = order[np.minimum(start + pick, flat.size - 1)]  # [256] flat index of each class's first pixel
    kept = np.full(flat.size, IGNORE, np.uint8)
    if ratio == "p0":
        classes = np.flatnonzero(counts)
        kept[seeds[classes]] = classes
        return kept.reshape(height, width)
    y0, x0 = (seeds // width).astype(np.int16), (seeds % width).astype(np.int16)
    dy = np.abs(np.arange(height, dtype=np.int16)[:, None] - y0[label])  # [H, W]
    dx = np.abs(np.arange(width, dtype=np.int16)[None, :] - x0[label])
    level = (np.maximum(dy, dx) + np.int16(1)) // np.int16(2)  # the dilation that reaches the pixel
    levels = int(level.max()) + 1
    reached = np.bincount((label.astype(np.int32) * levels + level).ravel(), minlength=256 * levels).reshape(256, levels).cumsum(axis=1)
    wanted = np.maximum((RATIOS[ratio] * counts + 1e-9).astype(np.int64), 1)  # int(X % of n), and the start pixel itself
    stop = (reached >= wanted[:, None]).argmax(axis=1).astype(np.int16)
    stop[counts == 0] = -1  # absent and not labelled: nothing is kept
    return np.where(level <= stop[label], label, np.uint8(IGNORE))


# ---------------------------------------------------------------------------------------------------------- transforms
def reflect_index(start: int, length: int, size: int) -> Tensor:
    """Rows start ... start + length - 1 of an axis of `size` rows, reflected as often as needed beyond its end."""
    if size == 1:
        return torch.zeros(length, dtype=torch.long)
    index = torch.arange(start, start + length) % (2 * size - 2)
    return torch.where(index < size, index, 2 * size - 2 - index)


def random_scale_crop(image: Tensor, label: Tensor, confidence: Tensor | None, crop: tuple[int, int], scale: tuple[float, float],
                      rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """One image [3, H, W] (uint8 or float), its label [H, W] and confidence [H, W] (or None): scaled together by a
    uniform factor, padded on the right and below to the crop size (image reflected, label 255, confidence 0) and
    cropped at random. Bilinear (antialiased) for the image, nearest for the others. The draws are made on the CPU."""
    factor = rng.uniform(*scale)
    height, width = image.shape[-2:]
    h, w = max(1, int(height * factor)), max(1, int(width * factor))
    y = int(rng.integers(max(h - crop[0], 0) + 1))
    x = int(rng.integers(max(w - crop[1], 0) + 1))
    if (h, w) != (height, width):
        image = F.interpolate(image[None], size=(h, w), mode="bilinear", antialias=True)[0]
    elif (h, w) == tuple(crop):
        return image, label, confidence
    rows, columns = reflect_index(y, crop[0], h), reflect_index(x, crop[1], w)
    image = gather_rectangle(image, rows, columns)
    source_rows, source_columns = torch.from_numpy(nearest_index(h, height))[rows], torch.from_numpy(nearest_index(w, width))[columns]
    label = gather_rectangle(label, source_rows, source_columns)
    label[max(h - y, 0):] = IGNORE
    label[:, max(w - x, 0):] = IGNORE
    if confidence is not None:
        confidence = gather_rectangle(confidence, source_rows, source_columns)
        confidence[max(h - y, 0):] = 0
        confidence[:, max(w - x, 0):] = 0
    return image, label, confidence


def gather_rectangle(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A copy of the given rows and columns of [..., H, W]; the indices travel without waiting for the device."""
    rows, columns = rows.to(x.device, non_blocking=True), columns.to(x.device, non_blocking=True)
    return x.index_select(-2, rows).index_select(-1, columns)


def batch_scale_crop(images: Tensor, labels: Tensor, confidence: Tensor, crop: tuple[int, int], scale: tuple[float, float],
                     rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`random_scale_crop` of each image of a batch [B, 3, H, W], [B, H, W], [B, H, W], on its device."""
    if scale == (1.0, 1.0) and tuple(images.shape[-2:]) == tuple(crop):
        return images, labels, confidence
    cropped = [random_scale_crop(*each, crop, scale, rng) for each in zip(images, labels, confidence)]
    return tuple(torch.stack(parts) for parts in zip(*cropped))


def augment(images: Tensor, labels: Tensor, confidence: Tensor | None, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Colour jitter, blur and flip of a batch (SPEC, "Semi-supervised step"), on its device, each image with its own draws.

    images [B, 3, H, W] float in [0, 1]; labels and confidence [B, H, W] (confidence may be None). Jitter with
    probability 0.8: brightness, contrast, saturation 0.75-1.25, hue +-0.25, in an order drawn per batch; blur with 0.5, sigma
    0.15-1.15; flip with 0.5. The draws are made on the CPU and sent without waiting; only the images drawn are touched.
    """
    batch = len(images)
    on, jittered, blurred = images.device, np.flatnonzero(rng.random(batch) < 0.8), np.flatnonzero(rng.random(batch) < 0.5)
    flipped, order = rng.random(batch) < 0.5, rng.permutation(4)

    def send(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(on, non_blocking=True)
    if len(jittered):
        index, x = send(jittered), images[send(jittered)] if len(jittered) < batch else images
        factors = rng.uniform(0.75, 1.25, (3, len(jittered), 1, 1, 1)).astype(np.float32)
        shift = rng.uniform(-0.25, 0.25, (len(jittered), 1, 1)).astype(np.float32)
        for operation in order:
            if operation == 3:
                x = shift_hue(x, send(shift))
            else:
                other = (0.0, grey(x).mean(dim=(2, 3), keepdim=True) if operation == 1 else None, grey(x) if operation == 2 else None)[operation]
                factor = send(factors[operation])  # [b, 1, 1, 1]
                x = (x * factor if operation == 0 else other + factor * (x - other)).clamp_(0, 1)
        images = images.index_copy(0, index, x) if len(jittered) < batch else x
    if len(blurred):
        sigma = rng.uniform(0.15, 1.15, (len(blurred), 1)).astype(np.float32)
        index = send(blurred)
        images = images.index_copy(0, index, gaussian_blur(images[index], send(sigma)))
    flip = send(flipped)
    return (torch.where(flip[:, None, None, None], images.flip(-1), images), torch.where(flip[:, None, None], labels.flip(-1), labels),
            None if confidence is None else torch.where(flip[:, None, None], confidence.flip(-1), confidence))


def grey(x: Tensor) -> Tensor:
    """Luma of [B, 3, H, W] -> [B, 1, H, W]."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB [B, 3, H, W] in [0, 1] by `shift` [B, 1, 1] of a full circle; value and chroma stay.
    In hexagon coordinates channel n of a colour with hue H (in sixths) is V - chroma * clamp(min(k, 4 - k), 0, 1),
    k = (n + H) mod 6, n = 5, 3, 1 for red, green, blue."""
    value, minimum = x.amax(dim=1), x.amin(dim=1)  # [B, H, W]
    chroma = value - minimum
    red, green, blue = x.unbind(1)
    safe = chroma.clamp_min(1e-8)
    hue = torch.where(value == red, (green - blue) / safe, torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    hue = hue + 6 * shift
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(hue + n, 6)
        channels.append(torch.addcmul(value, chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1))
    return torch.stack(channels, dim=1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """[B, 3, H, W] blurred with its own sigma [B, 1] in pixels; nine taps (3 sigma at most 1.15), edges replicated."""
    batch, channels, height, width = x.shape
    offset = torch.arange(-4, 5, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma.to(x)) ** 2)  # [B, 9]
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # [3B, 9]
    x = F.pad(x, (4, 4, 4, 4), mode="replicate").view(1, batch * channels, height + 8, width + 8)
    x = F.conv2d(x, kernel[:, None, :, None], groups=batch * channels)
    return F.conv2d(x, kernel[:, None, None, :], groups=batch * channels).view(batch, channels, height, width)


def shrink_label(label: Tensor, size) -> Tensor:
    """Nearest sampling of [B, H, W] (labels, masks, confidences) at the size of the representation, never through a one-hot tensor."""
    return F.interpolate(label[:, None].float(), size=tuple(size), mode="nearest")[:, 0].to(label.dtype)


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


# ------------------------------------------------------------------------------------------------- what a loader reads
class TrainingCrops(Dataset):
    """Random scale and crop of image and label at training resolution, optionally with most of the label hidden.
    An item is asked for by (index, seed), the seed of its draws: a pure function of the two, in whichever worker."""

    def __init__(self, source: Source, samples: list[Sample], crop: tuple[int, int], scale: tuple[float, float],
                 label_ratio: str | None = None, seed: int = 0):
        self.source, self.samples, self.crop, self.scale, self.label_ratio, self.seed = source, samples, crop, scale, label_ratio, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Image uint8 [3, h, w], label uint8 [h, w] (255 = not labelled), index."""
        index, seed = key
        sample = self.samples[index]
        image, label = self.source.read(sample)
        if self.label_ratio:
            label = torch.from_numpy(partial_label(label.numpy(), self.label_ratio, self.seed, sample.name))
        image, label, _ = random_scale_crop(image, label, None, self.crop, self.scale, np.random.default_rng(seed))
        return image, label, index


class EvaluationImages(Dataset):
    """Whole images with their labels, padded where the data set's protocol asks for it."""

    def __init__(self, source: Source, samples: list[Sample], full_resolution: bool = False):
        self.source, self.samples, self.full_resolution = source, samples, full_resolution

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image, label = self.source.read(self.samples[index], self.full_resolution)
        if self.source.eval_pad and not self.full_resolution:
            height, width = (max(a, b) for a, b in zip(self.source.eval_pad, image.shape[-2:]))
            padded = torch.full((height, width), IGNORE, dtype=torch.uint8)
            padded[:label.shape[0], :label.shape[1]] = label
            image, label = gather_rectangle(image, reflect_index(0, height, image.shape[1]), reflect_index(0, width, image.shape[2])), padded
        return image, label, index


class StepSampler:
    """Batches of (index, seed) for TrainingCrops: images drawn with replacement, as a pure function of (seed, stream,
    step). Every process draws the same global batch and takes its share, so order survives any crash and any
    number of workers."""

    def __init__(self, length: int, batch_size: int, start: int, stop: int, seed: int, stream: int, rank: int = 0, world: int = 1):
        self.length, self.batch_size, self.start, self.stop = length, batch_size, start, stop
        self.seed, self.stream, self.rank, self.world = seed, stream, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            rng = np.random.default_rng([self.seed, self.stream, step])
            total = self.batch_size * self.world
            index, seeds = rng.integers(self.length, size=total), rng.integers(2 ** 63, size=total)
            mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            yield list(zip(index[mine].tolist(), seeds[mine].tolist()))
