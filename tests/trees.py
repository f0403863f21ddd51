"""Small data sets in the official layouts, and ways to damage them.

True file names, true encodings, any size (height, width). Every image is a few upright stripes and
a box, each of one class, and a class has the same colour in every image, so a network can learn it.
All of it is a function of the arguments.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from inputs import files, labels

CITIES = ("aachen", "jena", "zurich")
CITYSCAPES_IDS = (7, 8, *range(11, 14), 17, *range(19, 29), *range(31, 34))  # the others are void
CITYSCAPES_TRAIN_IDS = [255] * 34  # cityscapesScripts, labels.py: the train id of each id
for train_id, id_on_disk in enumerate(CITYSCAPES_IDS):
    CITYSCAPES_TRAIN_IDS[id_on_disk] = train_id


def voc_palette() -> list[int]:
    """The 256 colours of Pascal VOC's PNGs, as PIL takes them."""
    palette = np.zeros((256, 3), int)
    for i in range(256):
        for bit in range(8):
            for channel in range(3):
                palette[i, channel] |= (i >> (3 * bit + channel) & 1) << (7 - bit)
    return palette.ravel().tolist()


def colour(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image [H, W, 3]: every value of a label map has its own colour, with some noise."""
    lut = np.random.default_rng(0).integers(20, 236, (256, 3))
    return (lut[values] + rng.integers(-12, 13, (*values.shape, 3))).clip(0, 255).astype(np.uint8)


def stripes(size: tuple[int, int], values: list[int], rng: np.random.Generator) -> np.ndarray:
    """A label map uint8 [H, W] of one stripe per value and a box of the first one."""
    height, width = size
    order = rng.permutation(np.asarray(values, np.uint8))
    label = np.repeat(order[np.arange(width) * len(order) // width][None], height, axis=0)
    y, x = rng.integers(max(1, height // 2)), rng.integers(max(1, width // 2))
    label[y : y + height // 4 + 1, x : x + width // 4 + 1] = values[0]
    return label


def save(path: Path, array: np.ndarray, palette: list[int] | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette(palette)  # "L" becomes "P"
    image.save(path, **options)
    return path


def raw(path) -> np.ndarray:
    """The values in an image file."""
    return np.asarray(Image.open(path))


def cut(path: Path, share: float = 0.6) -> None:
    """Truncate a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def garble(path: Path) -> None:
    """Overwrite some bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)


# ---------------------------------------------------------------------------------- ways to damage
def remove(pattern: str):
    """Remove what matches first, a file or a folder with all that it holds."""

    def harm(root: Path) -> None:
        path = min(root.glob(pattern))
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


def empty(folder: str):
    return lambda root: [path.unlink() for path in (root / folder).iterdir()]


def paint(pattern: str, array):
    """Replace the label or image that matches first."""
    return lambda root: save(min(root.glob(pattern)), np.asarray(array))


def text(file: str, content: str):
    return lambda root: (root / file).write_text(content)


def damage(pattern: str, how):
    return lambda root: how(min(root.glob(pattern)))


def copy(file: str, *names: str):
    return lambda root: [shutil.copy(root / file, (root / file).with_name(n)) for n in names]


def rename(file: str, name: str):
    return lambda root: (root / file).rename((root / file).with_name(name))


# ---------------------------------------------------------------------------------- how it is read
def split(source, **options) -> labels.Split:
    """`labels.split_train` with the options' defaults."""
    defaults = dict(num_labeled=0, label_ratio=None, labeled_list=None, seed=0, quiet=True)
    options = defaults | options
    return labels.split_train(source, argparse.Namespace(**options), options.pop("quiet"))


def watch_decoding(monkeypatch) -> list[str]:
    """A list that grows by the name of each file that is decoded."""
    names, original = [], files.open_image

    def open_image(path, *options):
        names.append(Path(path).name)
        return original(path, *options)

    monkeypatch.setattr(files, "open_image", open_image)
    return names


# ------------------------------------------------------------------------------------- the layouts
def cityscapes(
    root: Path,
    train: int = 4,
    val: int = 2,
    size: tuple[int, int] = (64, 128),
    classes: int = 19,
    seed: int = 0,
) -> Path:
    """leftImg8bit and gtFine as extracted.

    Grey label PNGs of the 34 ids: each image holds some void ids and 12 or more of the first
    `classes` classes (all of them when there are fewer)."""
    rng = np.random.default_rng([seed, 1])
    for part, number in (("train", train), ("val", val)):
        for i in range(number):
            city = CITIES[i % len(CITIES)]
            stem = f"{city}_{i:06d}_000019"
            chosen = rng.permutation(CITYSCAPES_IDS[:classes])[: max(12, classes - i % 3)].tolist()
            label = stripes(size, chosen, rng)
            label[-max(1, size[0] // 8) :] = 1  # ego vehicle
            label[: max(1, size[0] // 16), : max(1, size[1] // 4)] = 4  # static
            image_file = root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png"
            label_file = root / "gtFine" / part / city / f"{stem}_gtFine_labelIds.png"
            instances = label_file.with_name(f"{stem}_gtFine_instanceIds.png")
            save(image_file, colour(label, rng))
            save(label_file, label)
            save(instances, label.astype(np.uint16))  # is beside it and not read
    return root


def pascal(
    root: Path,
    train: int = 4,
    val: int = 2,
    size: tuple[int, int] = (50, 60),
    augmented: bool = True,
    extra: int = 2,
    classes: int = 21,
    seed: int = 0,
) -> Path:
    """JPEGImages, ImageSets/Segmentation, and SegmentationClass of `train` and `val` images.

    Those are palette PNGs, 255 along the borders of objects. With `augmented` also
    SegmentationClassAug (grey PNGs), which covers those and `extra` training images more. One more
    image is not listed."""
    rng = np.random.default_rng([seed, 2])
    names = [f"2007_{i:06d}" for i in range(train + val + extra + 1)]
    parts = {"train": names[:train], "val": names[train : train + val]}
    for i, name in enumerate(names):
        classes_here = [1 + (i * 3 + k) % (classes - 1) for k in range(min(3, classes - 1))]
        label = stripes(size, [0, *classes_here], rng)
        save(root / "JPEGImages" / f"{name}.jpg", colour(label, rng), quality=95)
        edge = np.zeros(size, bool)
        edge[:, 1:] = label[:, 1:] != label[:, :-1]
        edge[1:] |= label[1:] != label[:-1]
        label[edge] = 255
        if i < train + val:
            save(root / "SegmentationClass" / f"{name}.png", label, voc_palette())
        if augmented and i < train + val + extra:
            save(root / "SegmentationClassAug" / f"{name}.png", label)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part, stems in parts.items():
        (lists / f"{part}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    (lists / "trainval.txt").write_text("".join(f"{stem}\n" for stem in names[: train + val]))
    return root


def sun(
    root: Path,
    train: int = 4,
    test: int = 2,
    size: tuple[int, int] = (53, 73),
    offset: int = 5050,
    seed: int = 0,
) -> Path:
    """The images are numbered from 1 in both folders.

    The label of training image n is number n + 5050, that of a test image has its number. Grey
    label PNGs, 0 = void, 1-37 the classes."""
    rng = np.random.default_rng([seed, 3])
    for part, number, shift in (("train", train, offset), ("test", test, 0)):
        for i in range(1, number + 1):
            label = stripes(size, [0, *(1 + rng.permutation(37)[:5])], rng)
            file = root / f"SUNRGBD-{part}_images" / f"img-{i:06d}.jpg"
            save(file, colour(label, rng), quality=95)
            save(root / "sunrgbd_train_test_labels" / f"img-{i + shift:06d}.png", label)
    return root


def camvid(
    root: Path,
    train: int = 4,
    val: int = 2,
    test: int = 2,
    size: tuple[int, int] = (45, 60),
    seed: int = 0,
) -> Path:
    """CamVid/{train,val,test} and CamVid/{train,val,test}annot: grey label PNGs, 11 = void."""
    rng = np.random.default_rng([seed, 5])
    for part, number in (("train", train), ("val", val), ("test", test)):
        for i in range(number):
            name = f"0016E5_{len(part) * 1000 + i * 30:05d}.png"
            label = stripes(size, rng.permutation(11)[: 11 - i % 3].tolist(), rng)
            label[-max(1, size[0] // 8) :] = 11
            save(root / "CamVid" / part / name, colour(label, rng))
            save(root / "CamVid" / f"{part}annot" / name, label)
    return root


def folder(
    root: Path,
    train: int = 4,
    val: int = 2,
    unlabelled: int = 2,
    size: tuple[int, int] = (48, 64),
    classes: int = 3,
    palette: bool = True,
    painted: float = 1.0,
    suffix: str = ".png",
    seed: int = 0,
) -> Path:
    """A user's own data: `train` labelled and `unlabelled` more training images, `val` validation
    images, classes.txt. Labels are palette or index PNGs; of a training label only the upper share
    `painted` is painted, the rest is 255."""
    rng = np.random.default_rng([seed, 4])
    for part, number, more in (("train", train, unlabelled), ("val", val, 0)):
        (root / "labels" / part).mkdir(parents=True)
        for i in range(number + more):
            label = stripes(size, list(range(classes)), rng)
            save(root / "images" / part / f"{part}_{i:03d}{suffix}", colour(label, rng))
            if part == "train" and painted < 1:
                label[max(1, round(size[0] * painted)) :] = 255
            if i < number:
                file = root / "labels" / part / f"{part}_{i:03d}.png"
                save(file, label, voc_palette() if palette else None)
    (root / "classes.txt").write_text("".join(f"thing {i}\n" for i in range(classes)))
    return root
