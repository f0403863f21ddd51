"""The data sets on disk: official layouts and encodings, odd pictures, bad input in one line, the caches, what a loader gets."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
import loaders
import trees
from data import IGNORE, Sample, UserError

SIXTEEN_BIT = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(kind: str, path, **options) -> data.Source:
    return data.load_source(kind, str(path), **options)


def every(source: data.Source) -> list[Sample]:
    return [*source.train, *source.val]


def raw(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------------------- layouts
# cityscapesScripts, labels.py: the train id of each id from 0 on
CITYSCAPES_TRAIN_IDS = [255] * 7 + [
    0,
    1,
    255,
    255,
    2,
    3,
    4,
    255,
    255,
    255,
    5,
    255,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
    255,
    255,
    16,
    17,
    18,
]


def test_cityscapes_ids(tmp_path):
    source = load("cityscapes", trees.cityscapes(tmp_path, train=1, val=1, size=(8, 16)))
    assert source.table[:34].tolist() == CITYSCAPES_TRAIN_IDS
    assert source.table[255] == IGNORE and (source.table[34:255] == data.OUTSIDE).all()
    assert (
        len(source.classes) == 19
        and source.classes[13] == "car"
        and source.palette[13] == (0, 0, 142)
    )


def test_cityscapes_ids_are_those_of_its_scripts():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    assert [
        label.trainId for label in sorted(labels, key=lambda label: label.id) if label.id >= 0
    ] == CITYSCAPES_TRAIN_IDS
    published = sorted(
        (label.trainId, label.id, label.name, label.color)
        for label in labels
        if 0 <= label.trainId < 19
    )
    assert [(i, name, colour) for _, i, name, colour in published] == data.CITYSCAPES


def test_cityscapes_at_its_true_size(tmp_path):
    source = load("cityscapes", trees.cityscapes(tmp_path, train=1, val=1, size=(1024, 2048)))
    image, label = source.read(source.train[0])
    assert (
        image.dtype == label.dtype == torch.uint8
        and image.shape == (3, 512, 1024)
        and label.shape == (512, 1024)
    )
    lut = np.array(CITYSCAPES_TRAIN_IDS, np.uint8)
    assert np.array_equal(label.numpy(), lut[raw(source.train[0].label)][1::2, 1::2])
    expected = np.asarray(
        Image.open(source.train[0].image).resize((1024, 512), Image.BILINEAR), int
    )
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1
    image, label = source.read(source.train[0], full_resolution=True)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), raw(source.train[0].image))
    assert np.array_equal(label.numpy(), lut[raw(source.train[0].label)])
    assert source.train[0].name == "aachen_000000_000019"


def test_cityscapes_archives_in_folders_of_their_own(tmp_path):
    trees.cityscapes(tmp_path, train=3, val=2, size=(8, 16))
    names = [s.name for s in every(load("cityscapes", tmp_path))]
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / f"{kind}_trainvaltest").mkdir()
        shutil.move(tmp_path / kind, tmp_path / f"{kind}_trainvaltest" / kind)
    (
        tmp_path
        / "leftImg8bit_trainvaltest/leftImg8bit/train/aachen/._aachen_000000_000019_leftImg8bit.png"
    ).write_bytes(b"junk of a file system")
    assert [s.name for s in every(load("cityscapes", tmp_path))] == names


def test_pascal_augmented_and_plain(tmp_path, capsys):
    root = trees.pascal(
        tmp_path / "VOCdevkit" / "VOC2012", train=3, val=2, extra=4, size=(375, 500)
    )
    source = load("pascal", tmp_path)  # as the archive nests it
    assert [len(source.train), len(source.val)] == [7, 2] and not {s.name for s in source.train} & {
        s.name for s in source.val
    }
    assert all("SegmentationClassAug" in s.label for s in source.train) and all(
        "SegmentationClassAug" not in s.label for s in source.val
    )
    for sample in (source.train[0], source.val[0]):
        image, label = source.read(sample)
        assert (
            image.shape == (3, 375, 500)
            and np.array_equal(label.numpy(), raw(sample.label))
            and (label == IGNORE).any()
        )
        assert np.array_equal(image.permute(1, 2, 0).numpy(), raw(sample.image))
    assert Image.open(source.val[0].label).mode == "P" and source.palette[15] == (192, 128, 128)
    shutil.rmtree(root / "SegmentationClassAug")
    plain = load("pascal", root)
    assert [s.name for s in plain.train] == (
        root / "ImageSets/Segmentation/train.txt"
    ).read_text().split() and "plain VOC" in capsys.readouterr().out


def test_sun_numbering_void_and_size(tmp_path):
    root = trees.sun(tmp_path / "sun", train=2, test=2, size=(530, 730))
    source = load("sun", root)
    assert [Path(s.label).name for s in source.train] == ["img-005051.png", "img-005052.png"]
    assert [Path(s.label).name for s in source.val] == ["img-000001.png", "img-000002.png"]
    values = raw(source.train[1].label)
    label = source.read(source.train[1], full_resolution=True)[1].numpy()
    assert np.array_equal(label, np.where(values == 0, 255, values.astype(int) - 1)) and 0 in values
    image, label = source.read(source.train[1])
    assert image.shape == (3, 384, 512) and label.shape == (384, 512)
    # numbered anew, as the reference leaves them
    for image in sorted((root / "SUNRGBD-train_images").iterdir(), reverse=True):
        image.rename(image.with_name(f"img-{int(image.stem[4:]) + 5050:06d}.jpg"))
    assert [s.label for s in load("sun", root).train] == [s.label for s in source.train]


def test_a_users_folder(tmp_path, capsys):
    source = load(
        "folder", trees.folder(tmp_path / "a", train=3, val=2, unlabelled=2, suffix=".jpg")
    )
    assert [bool(s.label) for s in source.train] == [True] * 3 + [False] * 2 and source.classes == [
        "thing 0",
        "thing 1",
        "thing 2",
    ]
    assert source.palette == data.voc_palette(3)
    image, label = source.read(source.train[-1])
    assert image.shape == (3, 48, 64) and (label == IGNORE).all()
    assert np.array_equal(source.read(source.train[0])[1].numpy(), raw(source.train[0].label))
    root = trees.folder(tmp_path / "b", classes=2, palette=False)
    own = [7, 8, 9, 200, 100, 50] + [0] * 762
    for path in (root / "labels").rglob("*.png"):  # a palette of its own; one label of one bit
        trees.save(path, raw(path), own)
    Image.fromarray(raw(root / "labels/train/train_001.png") > 0).save(
        root / "labels/train/train_001.png"
    )
    (root / "classes.txt").write_text("\ufeffroad\r\n\r\n  car \r\n", encoding="utf-8")
    source = load("folder", root)
    assert source.classes == ["road", "car"] and source.palette == [(7, 8, 9), (200, 100, 50)]
    assert source.read(source.train[1])[1].unique().tolist() == [0, 1]
    shutil.copy(root / "images/train/train_000.png", root / "images/val/train_000.png")
    shutil.copy(root / "labels/train/train_000.png", root / "labels/val/train_000.png")
    capsys.readouterr()
    load("folder", root)
    assert "train_000" in capsys.readouterr().out
    assert (
        source.test == []
    )  # the folder has none; pictures without labels there are nobody's business, labelled ones a part to evaluate on
    for kind in ("images", "labels"):
        shutil.copytree(root / kind / "val", root / kind / "test")
        if kind == "images":
            assert load("folder", root).test == []
    assert [s.label for s in load("folder", root).test] == [
        str(p) for p in sorted((root / "labels/test").iterdir())
    ]
    (root / "labels/test/val_000.png").unlink()
    with pytest.raises(UserError, match="images/test/val_000.png: an image without a label"):
        load("folder", root)


def test_max_size_brings_large_pictures_down(tmp_path):
    root = trees.folder(tmp_path, train=2, size=(180, 240), suffix=".jpg")
    image, label = load("folder", root, max_size=60).read(load("folder", root).train[0])
    assert image.shape == (3, 45, 60) and label.shape == (45, 60)
    full = load("folder", root).read(load("folder", root).train[0])[0]
    assert full.shape == (3, 180, 240)
    wide = load("folder", root, max_size=1000).read(load("folder", root).train[0])[0]
    assert torch.equal(full, wide)  # never up
    assert (
        data.resize_image(full, (45, 60)).int() - image.int()
    ).abs().float().mean() < 6  # decoded at a quarter


def test_street():
    source = data.load_source("street", None)
    assert [len(source.train), len(source.val), len(source.test)] == [1000, 300, 500]
    image, label = source.read(source.train[5])
    assert (
        image.dtype == label.dtype == torch.uint8
        and image.shape == (3, 64, 64)
        and label.shape == (64, 64)
    )
    assert (source.read(Sample("x", source.train[5].image))[1] == IGNORE).all()
    with pytest.raises(UserError, match="--data-path"):
        data.load_source("street", "/somewhere")


# -------------------------------------------------------------------------------------------------------- odd pictures
def test_any_kind_of_picture(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
    rgb, grey = colours[..., :3], colours[..., 0]

    def read(name, picture, **options):
        picture.save(tmp_path / name, **options)
        image = data.read_image(tmp_path / name)
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        return image.permute(1, 2, 0).numpy()

    for name in ("a.png", "a.bmp", "a.tif"):
        assert np.array_equal(read(name, Image.fromarray(rgb)), rgb)
    assert np.array_equal(read("a.webp", Image.fromarray(rgb), lossless=True), rgb)
    three = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(read("grey.png", Image.fromarray(grey)), three)
    assert np.array_equal(read("grey_alpha.png", Image.fromarray(grey).convert("LA")), three)
    assert np.array_equal(read("rgba.png", Image.fromarray(colours)), rgb)
    palette = Image.fromarray(grey // 64)
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    assert np.array_equal(
        read("palette.png", palette, transparency=1),
        (grey // 64)[..., None] * 30 + np.array([10, 20, 30], np.uint8),
    )
    sixteen = read("sixteen.png", Image.fromarray(SIXTEEN_BIT))
    assert (
        np.abs(sixteen[..., 1].astype(float) - SIXTEEN_BIT / 257).max() <= 0.5
    )  # not clipped at 255
    assert read("cmyk.jpg", Image.fromarray(rgb).convert("CMYK")).shape == (20, 30, 3)
    assert read("grey.jpg", Image.fromarray(grey)).shape == (20, 30, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_image_and_label(tmp_path, orientation):
    root = trees.folder(tmp_path, train=1, val=1, unlabelled=0, size=(64, 96), suffix=".jpg")
    path = root / "images/train/train_000.jpg"
    upright = Image.open(path).convert("RGB")
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # how a camera held that way would have stored it (PIL's transpositions)
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, quality=100, subsampling=0)
    for max_size in (1024, 24):  # at full size, and decoded at a quarter
        source = load("folder", root, max_size=max_size)
        image, label = source.read(source.train[0])
        assert image.shape[-2:] == label.shape == source.training_size(64, 96)
        expected = data.resize_image(
            torch.from_numpy(np.array(upright)).permute(2, 0, 1), tuple(label.shape)
        )
        assert (image.int() - expected.int()).abs().float().mean() < 8


def test_damaged_exif_data_cannot_crash(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description of the picture"
    content = exif.tobytes()
    for cut_at in range(8, len(content), 3):
        Image.new("RGB", (12, 8)).save(tmp_path / "a.jpg", exif=content[:cut_at])
        try:
            assert data.read_image(tmp_path / "a.jpg").shape in ((3, 8, 12), (3, 12, 8))
        except UserError as error:
            assert "a.jpg" in str(error)


# ----------------------------------------------------------------------------------------------------------- bad input
def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)


def first(root: Path, pattern: str) -> Path:
    return min(root.glob(pattern))


BAD = {  # name: (data set, what is done to its tree, what the one line must say)
    "no images": (
        "folder",
        lambda r: shutil.rmtree(r / "images/train"),
        ["images/train", "no such folder"],
    ),
    "no labels": (
        "folder",
        lambda r: shutil.rmtree(r / "labels/val"),
        ["labels/val", "no such folder"],
    ),
    "empty folder": (
        "folder",
        lambda r: [p.unlink() for p in (r / "images/val").iterdir()],
        ["images/val", "holds no image"],
    ),
    "no label": (
        "folder",
        lambda r: [p.unlink() for p in (r / "labels/train").iterdir()],
        ["labels/train", "holds no label"],
    ),
    "no classes.txt": (
        "folder",
        lambda r: (r / "classes.txt").unlink(),
        ["classes.txt", "one per line"],
    ),
    "one class": (
        "folder",
        lambda r: (r / "classes.txt").write_text("thing\n"),
        ["classes.txt", "names 1 classes"],
    ),
    "300 classes": (
        "folder",
        lambda r: (r / "classes.txt").write_text("\n".join(map(str, range(300)))),
        ["classes.txt", "names 300"],
    ),
    "classes.txt too short": (
        "folder",
        lambda r: (r / "classes.txt").write_text("a\nb\n"),
        ["labels/train/train_000.png", "value 2", "0 to 1", "classes.txt names 2"],
    ),
    "validation image bare": (
        "folder",
        lambda r: (r / "labels/val/val_000.png").unlink(),
        ["images/val/val_000.png", "without a label"],
    ),
    "label without image": (
        "folder",
        lambda r: (r / "images/train/train_001.png").unlink(),
        ["labels/train/train_001.png", "without an image"],
    ),
    "two images of a name": (
        "folder",
        lambda r: shutil.copy(r / "images/train/train_001.png", r / "images/train/train_001.jpg"),
        ["images/train", "train_001"],
    ),
    "two images of a name, apart": (
        "folder",
        lambda r: [
            shutil.copy(r / "images/train/train_001.png", r / "images/train" / f"train_001.{end}")
            for end in ("jpg", "k.png")
        ],
        ["images/train", "train_001"],
    ),
    "JPEG label": (
        "folder",
        lambda r: (r / "labels/train/train_001.png").rename(r / "labels/train/train_001.jpg"),
        ["train_001.jpg", "must be a PNG"],
    ),
    "other size": (
        "folder",
        lambda r: trees.save(r / "labels/train/train_001.png", np.zeros((48, 60), np.uint8)),
        ["train_001.png: is 60x48", "is 64x48"],
    ),
    "value outside": (
        "folder",
        lambda r: trees.save(r / "labels/val/val_000.png", np.full((48, 64), 9, np.uint8)),
        ["val_000.png", "value 9", "0 to 2", "255"],
    ),
    "value beyond a byte": (
        "folder",
        lambda r: trees.save(r / "labels/val/val_000.png", SIXTEEN_BIT),
        ["val_000.png", "which is no class", "0 to 2"],
    ),
    "RGB mask": (
        "folder",
        lambda r: trees.save(r / "labels/train/train_000.png", np.zeros((48, 64, 3), np.uint8)),
        ["train_000.png", "RGB", "index or palette"],
    ),
    "0/255 mask": (
        "folder",
        lambda r: [
            trees.save(p, np.where(raw(p) > 0, 255, 0).astype(np.uint8))
            for p in r.rglob("labels/*/*.png")
        ],
        ["labels/", "0/255 mask", "use 0/1"],
    ),
    "one 0/128 mask": (
        "folder",
        lambda r: trees.save(r / "labels/train/train_001.png", np.full((48, 64), 128, np.uint8)),
        ["train_001.png", "value 128"],
    ),
    "truncated image": (
        "folder",
        lambda r: cut(r / "images/train/train_000.png"),
        ["images/train/train_000.png", "truncated"],
    ),
    "truncated bare image": (
        "folder",
        lambda r: cut(r / "images/train/train_005.png"),
        ["images/train/train_005.png", "truncated"],
    ),
    "truncated label": (
        "folder",
        lambda r: cut(r / "labels/train/train_001.png"),
        ["labels/train/train_001.png", "truncated"],
    ),
    "truncated first label": (
        "folder",
        lambda r: cut(r / "labels/train/train_000.png", 0.3),
        ["labels/train/train_000.png", "truncated"],
    ),
    "garbled image": (
        "folder",
        lambda r: garble(r / "images/train/train_002.png"),
        ["images/train/train_002.png", "damaged"],
    ),
    "empty image": (
        "folder",
        lambda r: (r / "images/val/val_001.png").write_bytes(b""),
        ["images/val/val_001.png", "is empty"],
    ),
    "text for an image": (
        "folder",
        lambda r: (r / "images/val/val_001.png").write_text("hello"),
        ["images/val/val_001.png", "not an image"],
    ),
    "cityscapes: no images": (
        "cityscapes",
        lambda r: shutil.rmtree(r / "leftImg8bit"),
        ["leftImg8bit/train", "no such folder"],
    ),
    "cityscapes: no labels": (
        "cityscapes",
        lambda r: shutil.rmtree(r / "gtFine"),
        ["gtFine/train", "no such folder"],
    ),
    "cityscapes: empty": (
        "cityscapes",
        lambda r: shutil.rmtree(r / "leftImg8bit/val") or (r / "leftImg8bit/val").mkdir(),
        ["leftImg8bit/val", "holds no CITY"],
    ),
    "cityscapes: label missing": (
        "cityscapes",
        lambda r: first(r, "gtFine/train/jena/*labelIds.png").unlink(),
        ["jena_000001_000019_leftImg8bit.png", "has no label"],
    ),
    "cityscapes: image missing": (
        "cityscapes",
        lambda r: first(r, "leftImg8bit/val/jena/*").unlink(),
        ["jena_000001_000019_gtFine_labelIds.png", "without an image"],
    ),
    "cityscapes: size": (
        "cityscapes",
        lambda r: trees.save(first(r, "gtFine/train/*/*labelIds.png"), np.zeros((5, 7), np.uint8)),
        ["labelIds.png: is 7x5", "128x64"],
    ),
    "cityscapes: id": (
        "cityscapes",
        lambda r: trees.save(
            first(r, "gtFine/train/*/*labelIds.png"), np.full((64, 128), 40, np.uint8)
        ),
        ["labelIds.png", "40", "0 to 33"],
    ),
    "cityscapes: truncated": (
        "cityscapes",
        lambda r: cut(first(r, "leftImg8bit/train/*/*")),
        ["leftImg8bit.png", "truncated"],
    ),
    "pascal: no images": (
        "pascal",
        lambda r: shutil.rmtree(r / "JPEGImages"),
        ["JPEGImages", "no such folder"],
    ),
    "pascal: no list": (
        "pascal",
        lambda r: (r / "ImageSets/Segmentation/val.txt").unlink(),
        ["val.txt", "no such list"],
    ),
    "pascal: image missing": (
        "pascal",
        lambda r: first(r, "JPEGImages/*").unlink(),
        ["2007_000000.jpg", "no such image"],
    ),
    "pascal: val label missing": (
        "pascal",
        lambda r: (r / "SegmentationClass/2007_000004.png").unlink(),
        ["2007_000004.jpg", "has no label"],
    ),
    "pascal: no augmented label": (
        "pascal",
        lambda r: [p.unlink() for p in (r / "SegmentationClassAug").iterdir()],
        ["SegmentationClassAug", "no label"],
    ),
    "pascal: truncated": (
        "pascal",
        lambda r: cut(r / "JPEGImages/2007_000000.jpg"),
        ["2007_000000.jpg", "truncated"],
    ),
    "pascal: empty label": (
        "pascal",
        lambda r: (r / "SegmentationClassAug/2007_000000.png").write_bytes(b""),
        ["Aug/2007_000000.png", "is empty"],
    ),
    "sun: no labels": (
        "sun",
        lambda r: shutil.rmtree(r / "sunrgbd_train_test_labels"),
        ["sunrgbd_train_test_labels", "no such folder"],
    ),
    "sun: no images": (
        "sun",
        lambda r: [p.unlink() for p in (r / "SUNRGBD-test_images").iterdir()],
        ["SUNRGBD-test_images", "holds no .jpg"],
    ),
    "sun: odd name": (
        "sun",
        lambda r: (r / "SUNRGBD-test_images/img-000001.jpg").rename(
            r / "SUNRGBD-test_images/chair.jpg"
        ),
        ["chair.jpg", "img-000001.jpg"],
    ),
    "sun: label missing": (
        "sun",
        lambda r: (r / "sunrgbd_train_test_labels/img-000001.png").unlink(),
        ["test_images/img-000001.jpg", "has no label"],
    ),
    "sun: image missing": (
        "sun",
        lambda r: (r / "SUNRGBD-test_images/img-000001.jpg").unlink(),
        ["labels/img-000001.png", "without an image"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_line(tmp_path, name):
    kind, harm, words = BAD[name]
    root = getattr(trees, kind)(tmp_path / "data")
    harm(root)
    with pytest.raises(UserError) as error:
        source = load(kind, root)
        data.divide(source, 0, None, None, 0)
        assert kind != "folder"  # a user's own data are all checked before the training begins
        [source.read(s) for s in every(source)]
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_bad_calls(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load("pascal", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--data-path"):
        data.load_source("sun", None)
    root = trees.folder(tmp_path / "a", train=2, unlabelled=5)
    with pytest.raises(UserError, match="--num-labeled 3: .* only 2"):
        data.divide(load("folder", root), 3, None, None, 0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache-dir"):
        load("folder", root, cache_dir=str(tmp_path / "file" / "cache"))
    source = load("folder", root)
    (root / "images/train/train_000.png").unlink()  # after it was listed
    for use in (
        lambda: source.read(source.train[0]),
        lambda: data.divide(source, 0, None, None, 0),
    ):
        with pytest.raises(UserError, match="train_000.png"):
            use()


def test_classes_that_no_label_holds_are_told(tmp_path, capsys):
    root = trees.folder(tmp_path, classes=3)
    (root / "classes.txt").write_text("a\nb\nc\nnever\nagain\n")
    assert data.divide(load("folder", root), 0, None, None, 0, quiet=False)
    assert "no label holds never, again" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- caches
@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are decoded."""
    names, original = [], data.open_image
    monkeypatch.setattr(
        data,
        "open_image",
        lambda path, *args: names.append(Path(path).name) or original(path, *args),
    )
    return names


def test_labels_are_read_once(tmp_path, opened, cache):
    root = trees.folder(tmp_path / "data", train=4, val=2, unlabelled=2, suffix=".jpg")
    entries = list(data.label_index(load("folder", root), every(load("folder", root))))
    assert [e["classes"] for e in entries] == [[0, 1, 2]] * 4 + [[]] * 2 + [
        [0, 1, 2]
    ] * 2 and entries[0]["share"] == 1
    assert sum(name.endswith("jpg") for name in opened) == 8  # unlabelled images are tried as well
    opened.clear()
    assert list(data.label_index(load("folder", root), every(load("folder", root)))) == entries
    assert opened == ["train_000.png"] * 2  # load_folder looks at the palette of one
    opened.clear()
    trees.save(
        root / "labels/train/train_001.png",
        np.where(np.arange(64) < 32, 1, 255).astype(np.uint8) * np.ones((48, 1), np.uint8),
    )
    os.utime(root / "images/train/train_005.jpg", ns=(1, 1))
    changed = list(data.label_index(load("folder", root), every(load("folder", root))))
    assert changed[1]["classes"] == [1] and changed[1]["share"] == 0.5
    assert sorted(set(opened)) == [
        "train_000.png",
        "train_001.jpg",
        "train_001.png",
        "train_005.jpg",
    ]
    assert [path.suffix for path in (cache / "reco-segmentation").iterdir()] == [".json"]


def test_one_cache_for_all_seeds(tmp_path, opened, cache):
    source = load("pascal", trees.pascal(tmp_path / "data", train=6, extra=4))
    data.divide(source, 10, None, None, 0)
    opened.clear()
    for seed in range(1, 4):
        data.divide(source, 5, None, None, seed)
    assert not opened and len(list((cache / "reco-segmentation").iterdir())) == 1


def test_what_was_read_before_a_bad_label_is_kept(tmp_path, opened):
    source = load("folder", trees.folder(tmp_path / "data", train=40, unlabelled=0))
    cut(Path(source.train[35].label))
    for expected in (40, 5):
        opened.clear()
        with pytest.raises(UserError, match="train_035"):
            data.divide(source, 0, None, None, 0)
        assert len([name for name in opened if name.startswith("train")]) <= 2 * expected


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '"x"',
        "null",
        "{}",
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"classes": [99], "share": 1}}',
        "\x00\xff",
        '{"LABEL": {"stamp": null, "classes": [0], "share": 0.5}}',
        '{"LABEL": {"stamp": STAMP, "classes": [7], "share": 1}}',
        '{"LABEL": {"stamp": STAMP, "classes": "0", "share": 1}}',
        '{"LABEL": {"stamp": STAMP, "share": 1}}',
        '{"LABEL": {"stamp": STAMP, "classes": [0], "share": "all"}}',
        '{"LABEL": {"classes": [0], "share": 1}}',
    ],
)
def test_a_damaged_or_foreign_cache_is_harmless(tmp_path, cache, content):
    source = load("folder", trees.folder(tmp_path / "data", train=2))
    right = list(data.label_index(source, source.train))
    file = next((cache / "reco-segmentation").iterdir())
    content = content.replace("LABEL", source.train[0].label).replace(
        "STAMP", json.dumps(data.stamp(source.train[0]))
    )
    file.write_bytes(content.encode("latin-1"))
    assert list(data.label_index(source, source.train)) == right
    json.loads(file.read_text())  # and is mended


def test_a_cache_that_cannot_be_written_is_harmless(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = load("folder", trees.folder(tmp_path / "data", train=2))
    assert len(list(data.label_index(source, source.train))) == 4
    source.cache_dir = tmp_path / "file"
    assert torch.equal(
        source.read(source.train[0])[0], load("folder", tmp_path / "data").read(source.train[0])[0]
    )


@pytest.mark.parametrize("kind", ["cityscapes", "pascal", "sun", "folder"])
def test_training_size_copies(tmp_path, opened, kind):
    root = getattr(trees, kind)(tmp_path / "data")
    plain, cached = load(kind, root), load(kind, root, cache_dir=str(tmp_path / "copies"))
    samples = [plain.train[0], plain.train[-1], data.replace(plain.train[0], label=None)]

    def both_equal() -> int:
        expected = [plain.read(s) for s in samples]
        opened.clear()
        for (image, label), sample in zip(expected, samples):
            other = cached.read(sample)
            assert (
                torch.equal(image, other[0])
                and torch.equal(label, other[1])
                and other[0].dtype == torch.uint8
            )
        return len(opened)

    assert both_equal() > 0 and both_equal() == 0  # made, used
    files = sorted((tmp_path / "copies").rglob("*.npy"))
    assert len(files) == 3 and not list((tmp_path / "copies").rglob("*.part"))
    cut(files[0])
    files[1].write_bytes(b"no array")
    assert both_equal() > 0 and both_equal() == 0  # mended
    trees.save(
        Path(samples[0].label), raw(samples[0].label)[::-1].copy()
    )  # another label: another copy
    assert both_equal() > 0
    assert (
        cached.read(samples[0], full_resolution=True)[0].shape
        == plain.read(samples[0], full_resolution=True)[0].shape
    )


# ---------------------------------------------------------------------------------------------------- what a loader gets
def test_evaluation_images_are_padded_as_the_protocol_says(tmp_path):
    for kind, size, expected in (
        ("pascal", (375, 500), (513, 513)),
        ("pascal", (600, 30), (600, 513)),
        ("sun", (53, 73), (385, 513)),
        ("cityscapes", (8, 16), (512, 1024)),
        ("folder", (48, 64), (48, 64)),
    ):
        root = getattr(trees, kind)(tmp_path / f"{kind}{size[0]}", size=size)
        source = load(kind, root)
        image, label, index = loaders.EvaluationImages(source, source.val)[1]
        whole, inside = source.read(source.val[1])
        height, width = inside.shape
        assert (
            image.shape == (3, *expected)
            and label.shape == expected
            and image.dtype == label.dtype == torch.uint8
            and index == 1
        )
        assert torch.equal(image[:, :height, :width], whole) and torch.equal(
            label[:height, :width], inside
        )
        assert (label[height:] == IGNORE).all() and (label[:, width:] == IGNORE).all()
        if width < expected[1]:
            assert torch.equal(image[:, :height, width], whole[:, :, width - 2])  # reflected
        original = Image.open(source.val[1].image)
        assert loaders.EvaluationImages(source, source.val, full_resolution=True)[1][0].shape == (
            3,
            original.height,
            original.width,
        )


def test_a_crop_is_a_function_of_index_and_seed_in_whichever_worker(tmp_path):
    source = load("pascal", trees.pascal(tmp_path))
    crops = loaders.TrainingCrops(source, source.train, (40, 40), (0.5, 1.5), "p5", 3)

    def batches(workers: int):
        sampler = loaders.StepSampler(len(crops), 4, 2, 6, seed=1, stream=0)
        return list(DataLoader(crops, batch_sampler=sampler, num_workers=workers))

    for (image, label, index), (other, other_label, other_index) in zip(
        batches(0), batches(2), strict=True
    ):
        assert image.shape == (4, 3, 40, 40) and label.shape == (4, 40, 40)
        assert (
            torch.equal(image, other)
            and torch.equal(label, other_label)
            and torch.equal(index, other_index)
        )


def test_batches_are_a_function_of_seed_stream_and_step():
    def steps(start, stop, rank=0, world=1, seed=0, stream=0, batch=6):
        return list(loaders.StepSampler(50, batch, start, stop, seed, stream, rank, world))

    whole = steps(0, 10)
    assert (
        steps(4, 10) == whole[4:] and len(loaders.StepSampler(50, 6, 4, 10, 0, 0)) == 6
    )  # a resumed run goes on in the order
    assert whole != steps(0, 10, seed=1) and whole != steps(0, 10, stream=1)
    halves = [steps(0, 10, rank, 2, batch=3) for rank in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole  # two processes share one global batch
    drawn = np.bincount([index for batch in steps(0, 500) for index, _ in batch], minlength=50)
    assert (
        np.abs(drawn - 60).max() < 5 * 60**0.5
        and len({seed for batch in whole for _, seed in batch}) == 60
    )


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    data.atomic_write(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        data.atomic_write(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
