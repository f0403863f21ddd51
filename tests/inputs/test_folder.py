"""A user's own folder: its files, its classes, its masks, and bad input, each named in one line."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import trees
from inputs import files, folder, labels
from inputs.errors import UserError
from inputs.files import IGNORE
from inputs.source import Source, value_table, voc_palette
from trees import copy, cut, damage, empty, garble, paint, raw, remove, rename, save, split, text


def load(kind: str, path, **options) -> Source:
    return data.load_source(kind, str(path), **options)


# ----------------------------------------------------------------------------------------- files


def test_a_users_folder(tmp_path):
    source = load("folder", trees.folder(tmp_path, train=3, unlabelled=2, suffix=".jpg"))
    assert [bool(s.label) for s in source.train] == [True] * 3 + [False] * 2
    assert source.classes == ["thing 0", "thing 1", "thing 2"]
    assert source.palette == voc_palette(3)
    image, label = source.read(source.train[-1])
    assert image.shape == (3, 48, 64) and (label == IGNORE).all()
    assert np.array_equal(source.read(source.train[0])[1].numpy(), raw(source.train[0].label))


def test_a_users_palette_and_class_names(tmp_path):
    root = trees.folder(tmp_path, classes=2, palette=False)
    own = [7, 8, 9, 200, 100, 50] + [0] * 762
    for path in (root / "labels").rglob("*.png"):  # a palette of its own; one label of greys
        save(path, raw(path), own)
    grey = root / "labels/train/train_001.png"
    save(grey, raw(grey))
    (root / "classes.txt").write_text("\ufeffroad\r\n\r\n  car \r\n", encoding="utf-8")
    source = load("folder", root)
    assert source.classes == ["road", "car"] and source.palette == [(7, 8, 9), (200, 100, 50)]
    assert source.read(source.train[1])[1].unique().tolist() == [0, 1]
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


def test_files_that_are_left_out_are_reported(tmp_path, capsys):
    """Any format, in sub-folders too, and linked folders; but no hidden file."""
    root = trees.folder(tmp_path / "data")
    load("folder", root)
    assert "left out" not in capsys.readouterr().out
    (root / "images/train/deeper").mkdir()
    (root / "images/train/disk2").symlink_to(tmp_path)
    for name in ("deeper/a.png", "b.HEIC", ".c.heic", "d.svs", "._e.png"):
        (root / "images/train" / name).write_text("x")
    (root / "labels/val/val_000.npy").write_text("x")
    load("folder", root)
    images, labels_of_val = capsys.readouterr().out.splitlines()
    assert "images/train: 4 files are left out (.heic, .png, .svs, disk2;" in images
    assert "labels/val: 1 files are left out (.npy;" in labels_of_val


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


# --------------------------------------------------------------------------------------- classes
NAME = st.from_regex(r"[^\W\d_][\w .()/-]{0,9}[^\W\d_]", fullmatch=True)
CHANNEL = st.integers(0, 255)


@settings(max_examples=100, deadline=None)
@given(
    entries=st.lists(
        st.tuples(NAME, st.tuples(CHANNEL, CHANNEL, CHANNEL)),
        min_size=2,
        unique_by=(lambda e: e[0], lambda e: e[1]),
    ),
    separator=st.sampled_from([" ", ", ", "\t", "  ,"]),
    ending=st.sampled_from(["\n", "\r\n", "\n\n", "  \n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    kind=st.sampled_from(["names", "colours", "labelmap"]),
)
def test_the_classes_are_those_of_the_file(
    tmp_path_factory, entries, separator, ending, encoding, kind
):
    root = tmp_path_factory.mktemp("classes")
    entries = [entry for entry in entries if entry[0].lower() != "void"]
    lines = {
        "names": [name for name, _ in entries],
        "colours": [separator.join([name, *map(str, colour)]) for name, colour in entries],
        "labelmap": [f"{name}:{','.join(map(str, colour))}::" for name, colour in entries],
    }[kind]
    file = root / ("labelmap.txt" if kind == "labelmap" else "classes.txt")
    file.write_bytes(("".join(f"{line}{ending}" for line in lines)).encode(encoding))
    found = folder.read_classes(root)
    colours = [] if kind == "names" else [colour for _, colour in entries]
    assert found == (file, [name for name, _ in entries], colours, [])


@settings(max_examples=200, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
    )
)
def test_any_classes_file_is_read_or_refused(tmp_path_factory, content):
    root = tmp_path_factory.getbasetemp()
    (root / "classes.txt").write_bytes(content)
    try:
        _, names, colours, _ = folder.read_classes(root)
        assert len(set(names)) == len(names) and len(colours) in (0, len(names))
        assert all(name and name == name.strip() for name in names)
    except UserError as error:
        assert "classes.txt: " in str(error) and len(str(error).splitlines()) == 1


# ------------------------------------------------------------------------------- masks in palettes
def with_palette(path: Path, colours: list[tuple[int, int, int]]) -> None:
    trees.save(path, raw(path), [channel for colour in colours for channel in colour])


def test_masks_of_one_palette_may_drop_its_end(tmp_path):
    """A palette of greys is no palette, and colours beyond the classes mean nothing."""
    root = trees.folder(tmp_path, classes=3, palette=False)
    expected = [raw(sample.label) for sample in load("folder", root).train if sample.label]
    own = [(7, 8, 9), (200, 100, 50), (1, 2, 3)]
    masks = sorted((root / "labels/train").iterdir())
    for mask in masks:
        with_palette(mask, [*own, (4, 5, 6)])
    shorter = np.minimum(expected[1], 1)
    trees.save(masks[1], shorter, [*own[0], *own[1]])
    with_palette(masks[2], [*own, (9, 9, 9)])
    trees.save(masks[3], np.full_like(shorter, 1), [0, 0, 0, 2, 2, 2])  # the grey 2, by optipng
    source = load("folder", root)
    assert source.palette == own
    found = [source.read_label(sample) for sample in source.train if sample.label]
    for label, right in zip(
        found, (expected[0], shorter, expected[2], 0 * shorter + 2), strict=True
    ):
        assert np.array_equal(label, right)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_reordered_palettes_are_refused(tmp_path, part):
    """ImageMagick keeps the colours of a palette PNG, but in another order."""
    root = trees.folder(tmp_path)
    for kind in ("images", "labels"):
        shutil.copytree(root / kind / "val", root / kind / "test")
    mask = min((root / "labels" / part).iterdir())
    table = np.array([2, 0, 1], np.uint8)  # the new index of each class
    colours = voc_palette(3)
    trees.save(mask, table[raw(mask)], [c for i in (1, 2, 0) for c in colours[i]])
    with pytest.raises(UserError, match=r"another palette than .*classes\.txt"):
        load("folder", root)
    text = "".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip("abc", colours, strict=True))
    (root / "classes.txt").write_text(text)  # by colour
    right = load("folder", trees.folder(tmp_path / "right"))
    sample = getattr(load("folder", root), part)[0]
    assert np.array_equal(
        load("folder", root).read_label(sample),
        right.read_label({"train": right.train, "val": right.val, "test": right.val}[part][0]),
    )


# ------------------------------------------------------------------------------- masks in colours


TABLE = value_table({0: 0, 1: 1, 2: 2, IGNORE: IGNORE})
COLOURS = [(128, 64, 128), (220, 20, 60), (0, 0, 142)]


def in_colours(root, classes_file: str, text: str):
    """A user's folder whose labels are RGB PNGs and, of the validation images, palette PNGs."""
    trees.folder(root)
    (root / "classes.txt").unlink()
    (root / classes_file).write_text(text)
    for path in (root / "labels").rglob("*.png"):
        index = trees.raw(path)
        if path.parent.name == "train":
            trees.save(path, np.array(COLOURS, np.uint8)[index])
        else:  # its numbers are not those of the classes
            palette = [c for colour in COLOURS for c in colour]
            trees.save(path, (index + 7), [9] * 21 + palette)
    return root


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "road 128 64 128\nred  light 220 20 60\ncar 0 0 142\nvoid 0 0 0\n"),
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nroad:128,64,128::\nred  light:220,20,60::\n"
            "car:0,0,142:wheel,door:\nvoid:0,0,0::\n",
        ),
    ],
)
def test_masks_in_the_colours_of_the_classes(tmp_path, file, text):
    expected = load("folder", trees.folder(tmp_path / "index"))
    source = load("folder", in_colours(tmp_path / "colours", file, text))
    assert source.classes == ["road", "red  light", "car"] and source.palette == COLOURS
    for ours, theirs in zip(source.train + source.val, expected.train + expected.val, strict=True):
        assert torch.equal(source.read(ours)[1], expected.read(theirs)[1])
    path = source.train[0].label
    mask = trees.raw(path).copy()
    mask[3, 5] = 0  # void
    trees.save(tmp_path / "mask.png", mask)
    label = source.read_label(replace(source.train[0], label=str(tmp_path / "mask.png")))
    assert label[3, 5] == IGNORE and (label != IGNORE).sum() == label.size - 1
    mask[4, 6] = (1, 2, 3)
    trees.save(tmp_path / "mask.png", mask)
    place = rf"mask\.png: holds the colour 1 2 3 at x 6, y 4, .*{file} names 3"
    with pytest.raises(UserError, match=place):
        source.read_label(replace(source.train[0], label=str(tmp_path / "mask.png")))


@pytest.mark.parametrize("palette", [False, True])
def test_transparent_pixels_of_a_coloured_mask_are_not_labelled(tmp_path, palette):
    """Whatever colour the painting program left there, that of a class too."""
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, 0] = (220, 20, 60, 255)
    pixels[0, 1] = (0, 0, 0, 255)
    pixels[1, 2] = (7, 8, 9, 0)
    mask = Image.fromarray(pixels)
    if palette:
        mask = Image.fromarray(np.array([[1, 2, 0], [0, 0, 0]], np.uint8))
        mask.putpalette([0, 0, 0, 220, 20, 60, 0, 0, 0])
        mask.info["transparency"] = 0
    mask.save(tmp_path / "mask.png")
    colours = {0: 0, files.pack_colour(220, 20, 60): 1}
    label = files.read_label(tmp_path / "mask.png", TABLE, colours=colours)
    assert label.tolist() == [[1, 0, 255], [255, 255, 255]]


def test_a_predicted_mask_is_a_label(tmp_path):
    """predict.py writes the numbers with the colours as palette; 255 is what a user erased."""
    text = "road 128 64 128\nperson 220 20 60\ncar 0 0 142\n"
    source = load("folder", in_colours(tmp_path, "classes.txt", text))
    index = np.array([[0, 1], [2, 255]], np.uint8)
    palette = [c for colour in COLOURS for c in colour]
    trees.save(tmp_path / "mask.png", index, palette + [0] * 759)
    label = source.read_label(replace(source.train[0], label=str(tmp_path / "mask.png")))
    assert label.tolist() == index.tolist()
    trees.save(tmp_path / "mask.png", index)  # a grey PNG holds class numbers
    label = source.read_label(replace(source.train[0], label=str(tmp_path / "mask.png")))
    assert label.tolist() == index.tolist()


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("classes.txt", "road 1 2 3\ncar\n", "'car' has no name with a colour"),
        ("classes.txt", "road 1 2 3\ncar 4 5 256\n", "'car 4 5 256' has no name with a colour"),
        ("classes.txt", "road 1 2 3\ncar 1 2 3\n", "two entries the same colour"),
        ("classes.txt", "road 1 2 3\nvoid 4 5 6\n", "names 1 classes"),
        ("labelmap.txt", "road\ncar\n", "'road' has no name with a colour"),
    ],
)
def test_odd_colours_are_one_line(tmp_path, file, text, told):
    with pytest.raises(UserError, match=f"{file}: .*{told}"):
        load("folder", in_colours(tmp_path, file, text))


# ------------------------------------------------------------------------------------- bad input


def float_image(file: str, values):
    """A float TIFF in place of a PNG."""

    def change(root: Path) -> None:
        (root / f"{file}.png").unlink()
        Image.fromarray(values).save(root / f"{file}.tif")

    return change


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
    "empty folder": (empty("images/val"), "images/val", "holds no .png, .jpg"),
    "no label": (empty("labels/train"), "labels/train", "holds no .png"),
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
        *("images/train/train_001.png", "has the name of", "train_001.jpg"),
    ),
    "two labels of a name": (
        copy("labels/train/train_001.png", "train_001.PNG"),
        *("labels/train/train_001.png", "has the name of", "train_001.PNG"),
    ),
    "two images of a name, apart": (
        copy("images/train/train_001.png", "train_001.jpg", "train_001.k.png"),
        *("images/train", "train_001"),
    ),
    "class names in UTF-16": (
        lambda root: (root / "classes.txt").write_bytes("a\nb\nc\n".encode("utf-16-le")),
        *("classes.txt", "UTF-8"),
    ),
    "class names in UTF-16 with its mark": (
        lambda root: (root / "classes.txt").write_bytes("a\nb\nc\n".encode("utf-16")),
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
    "a pipe": (
        lambda root: os.mkfifo(root / "images/train/odd.png"),
        *("images/train/odd.png", "is not a regular file"),
    ),
    "a link to nothing": (
        lambda root: (root / "images/train/odd.png").symlink_to("nowhere"),
        *("images/train/odd.png", "no such file"),
    ),
    "a link to itself": (
        lambda root: (root / "labels/val/odd.png").symlink_to("odd.png"),
        *("labels/val/odd.png", "no such file"),
    ),
    "a folder called like an image": (
        lambda root: (root / "images/val/odd.png").mkdir(),
        *("images/val/odd.png", "is not a regular file"),
    ),
    "decibels": (
        float_image("images/train/train_000", np.full((48, 64), -22.5, np.float32)),
        *("train_000.tif", "values from -22.5 to -22.5", "0 .. 65535"),
    ),
    "no data": (
        float_image("images/train/train_000", np.float32(np.eye(48, 64) * 3.4e38)),
        *("train_000.tif", "to 3.4e+38"),
    ),
    "an image of a row": (
        lambda root: [
            paint(f"{k}/val/val_000.png", np.zeros((1, 64), np.uint8))(root)
            for k in ("images", "labels")
        ],
        *("images/val/val_000.png", "64x1", "one pixel"),
    ),
    "a 1-bit mask": (
        paint("labels/train/train_001.png", np.eye(48, 64) > 0),
        *("train_001.png", "1-bit mask", "8-bit grey"),
    ),
    "another palette": (
        lambda root: save(
            root / "labels/val/val_000.png",
            raw(root / "labels/val/val_000.png"),
            [9, 9, 9, 8, 7, 6],
        ),
        *("labels/val/val_000.png", "another palette", "labels/train/train_000.png"),
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
        *("val_000.png", "value 300, which is not a class", "0 to 2"),
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


@pytest.mark.parametrize("name", OWN)
def test_bad_input_is_told_in_one_line(tmp_path, name):
    """All of it before the training begins."""
    harm, *words = OWN[name]
    root = trees.folder(tmp_path / "data")
    harm(root)
    with pytest.raises(UserError) as error:
        split(load("folder", root))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
