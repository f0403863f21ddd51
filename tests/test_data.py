"""The data sets at their sizes, what is remembered of them, their training-size copies."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import trees
from inputs import files, labels, transforms
from inputs.errors import UserError
from inputs.files import IGNORE
from inputs.source import Sample
from trees import CITYSCAPES_TRAIN_IDS, cut, raw


def load(kind: str, path, **options) -> data.Source:
    return data.load_source(kind, str(path), **options)


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are decoded."""
    names, original = [], files.open_image

    def open_image(path, *options):
        names.append(Path(path).name)
        return original(path, *options)

    monkeypatch.setattr(files, "open_image", open_image)
    return names


# --------------------------------------------------------------------------------------- reading
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


def test_max_size_brings_large_pictures_down(tmp_path):
    root = trees.folder(tmp_path, train=2, size=(180, 240), suffix=".jpg")
    sample = load("folder", root).train[0]
    image, label = load("folder", root, max_size=60).read(sample)
    assert image.shape == (3, 45, 60) and label.shape == (45, 60)
    full = load("folder", root).read(sample)[0]
    assert full.shape == (3, 180, 240)
    assert torch.equal(full, load("folder", root, max_size=1000).read(sample)[0])  # never up
    expected = transforms.resize_image(full, (45, 60)).int()
    assert (expected - image.int()).abs().float().mean() < 6  # decoded at a quarter


def test_single_labelled_pixels_of_large_pictures_are_kept(tmp_path):
    """At a quarter of the size nearest sampling lost 15 of 16 of them, and a stroke of one pixel's
    width in 3 cases of 4. A full mask keeps its thin unlabelled lines."""
    root = trees.folder(tmp_path, train=2, unlabelled=0, size=(180, 240))
    sparse = np.full((180, 240), 255, np.uint8)
    sparse[5, 6], sparse[40, 100:140] = 0, 1
    full = np.zeros((180, 240), np.uint8)
    full[40] = 255
    for sample, label in zip(load("folder", root).train, (sparse, full), strict=True):
        trees.save(Path(sample.label), label)
    source = load("folder", root, max_size=60)
    small, other = (source.read(sample)[1] for sample in source.train)
    assert small[1, 1] == 0 and (small[10, 25:35] == 1).all() and (small != 255).sum() == 11
    kept = transforms.resize_nearest(torch.from_numpy(full), (45, 60))
    assert torch.equal(other, kept)


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
        name: (source.one_size(), source.one_size(full_resolution=True))
        for name, source in data.SOURCES.items()
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
        labels.divide(load("folder", root), 3, None, None, 0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache-dir"):
        load("folder", root, cache_dir=str(tmp_path / "file" / "cache"))
    source = load("folder", root)
    (root / "images/train/train_000.png").unlink()  # after it was listed
    with pytest.raises(UserError, match=r"train_000\.png"):
        source.read(source.train[0])
    with pytest.raises(UserError, match=r"train_000\.png"):
        labels.divide(source, 0, None, None, 0)


# ---------------------------------------------------------------------------------------- caches
def test_labels_are_read_once(tmp_path, opened, cache):
    root = trees.folder(tmp_path / "data", train=4, val=2, unlabelled=2, suffix=".jpg")

    def entries() -> list[dict]:
        source = load("folder", root)
        return list(labels.label_index(source, [*source.train, *source.val]))

    first = entries()
    found = [entry["classes"] for entry in first]
    assert found == [[0, 1, 2]] * 4 + [[]] * 2 + [[0, 1, 2]] * 2 and first[0]["share"] == 1
    assert sum(name.endswith("jpg") for name in opened) == 8  # unlabelled images are tried as well
    opened.clear()
    assert entries() == first
    assert opened == ["train_000.png"]  # for its palette
    opened.clear()
    half = np.tile(np.where(np.arange(64) < 32, 1, 255).astype(np.uint8), (48, 1))
    trees.save(root / "labels/train/train_001.png", half)
    os.utime(root / "images/train/train_005.jpg", ns=(1, 1))
    changed = entries()
    assert changed[1]["classes"] == [1] and changed[1]["share"] == 0.5
    again = {"train_000.png", "train_001.jpg", "train_001.png", "train_005.jpg"}
    assert set(opened) == again
    assert [path.suffix for path in (cache / "reco-segmentation").iterdir()] == [".json"]


def test_one_cache_for_all_seeds(tmp_path, opened, cache):
    source = load("pascal", trees.pascal(tmp_path / "data", train=6, extra=4))
    labels.divide(source, 10, None, None, 0)
    opened.clear()
    for seed in range(1, 4):
        labels.divide(source, 5, None, None, seed)
    assert not opened and len(list((cache / "reco-segmentation").iterdir())) == 1


def test_what_was_read_before_a_bad_label_is_kept(tmp_path, opened):
    source = load("folder", trees.folder(tmp_path / "data", train=40, unlabelled=0))
    cut(Path(source.train[35].label))
    for expected in (40, 5):
        opened.clear()
        with pytest.raises(UserError, match="train_035"):
            labels.divide(source, 0, None, None, 0)
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
    right = list(labels.label_index(source, source.train))
    file = next((cache / "reco-segmentation").iterdir())
    sample = source.train[0]
    stamp = json.dumps(files.stamp(sample.image, sample.label))
    content = content.replace("LABEL", sample.label).replace("STAMP", stamp)
    file.write_bytes(content.encode("latin-1"))
    assert list(labels.label_index(source, source.train)) == right
    json.loads(file.read_text())  # and is mended


def test_a_cache_that_cannot_be_written_is_harmless(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = load("folder", trees.folder(tmp_path / "data", train=2))
    assert len(list(labels.label_index(source, source.train))) == 4
    source.cache_dir = tmp_path / "file"
    plain = load("folder", tmp_path / "data")
    assert torch.equal(source.read(source.train[0])[0], plain.read(plain.train[0])[0])


@pytest.mark.parametrize("kind", ["cityscapes", "camvid", "pascal", "sun", "folder"])
def test_training_size_copies(tmp_path, opened, kind):
    root = getattr(trees, kind)(tmp_path / "data")
    plain, cached = load(kind, root), load(kind, root, cache_dir=str(tmp_path / "copies"))
    samples = [plain.train[0], plain.train[-1], replace(plain.train[0], label=None)]

    def decoded() -> int:
        """How many files are decoded to read the samples, which must be the right ones."""
        expected = [plain.read(s) for s in samples]
        opened.clear()
        for (image, label), sample in zip(expected, samples, strict=True):
            image_copy, label_copy = cached.read(sample)
            assert torch.equal(image, image_copy) and torch.equal(label, label_copy)
            assert image_copy.dtype == torch.uint8
        return len(opened)

    assert decoded() > 0 and decoded() == 0  # made, used
    copies = sorted((tmp_path / "copies").rglob("*.npy"))
    assert len(copies) == 3 and not list((tmp_path / "copies").rglob("*.part"))
    cut(copies[0])
    copies[1].write_bytes(b"no array")
    assert decoded() > 0 and decoded() == 0  # mended
    trees.save(Path(samples[0].label), raw(samples[0].label)[::-1].copy())
    assert decoded() > 0  # another label: another copy
    full, _ = cached.read(samples[0], full_resolution=True)
    assert full.shape == plain.read(samples[0], full_resolution=True)[0].shape


# --------------------------------------------------------------------------- masks in colours
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
    label = files.read_label(tmp_path / "mask.png", None, colours=colours)
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
