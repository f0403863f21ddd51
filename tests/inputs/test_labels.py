"""Which images and pixels are labelled: the labelled split, published lists, partial labels."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data
import trees
from inputs import files, labels
from inputs.errors import UserError
from inputs.files import IGNORE
from inputs.labels import partial_label
from inputs.source import Sample, Source
from trees import cut, split, watch_decoding


def load(kind: str, path, **options) -> Source:
    return data.load_source(kind, str(path), **options)


@pytest.fixture
def opened(monkeypatch):
    return watch_decoding(monkeypatch)


def in_memory(monkeypatch, contents: list[set[int]], classes: int, min_classes: int = 1) -> Source:
    """A source of images n000, n001, ... that hold these classes.

    `source.read_so_far` tells how many labels were read."""
    names = [f"n{i:03d}" for i in range(len(contents))]
    samples = [Sample(name, f"/{name}.jpg", f"/{name}.png") for name in names]
    class_names = [str(c) for c in range(classes)]
    source = Source("made", class_names, [], samples, min_classes=min_classes)
    source.read_so_far = 0

    def label_index(source, samples, quiet=True):
        for sample in samples:
            source.read_so_far += 1
            yield {"classes": sorted(contents[int(sample.name[1:])]), "share": 1.0}

    monkeypatch.setattr(labels, "label_index", label_index)
    return source


def contents_of(number, classes, low, high, seed=0):
    """Random class sets; class c is rarer the higher its id."""
    rng = np.random.default_rng(seed)
    rarity = 1 / (1 + np.arange(classes))
    rarity /= rarity.sum()
    sizes = rng.integers(low, high + 1, number)
    return [set(rng.choice(classes, n, replace=False, p=rarity).tolist()) for n in sizes]


def walk(contents, number, seed, classes, min_classes):
    """The rule of the specification, word by word, for data in which it comes to an end."""
    order = np.random.default_rng([seed, 1]).permutation(len(contents)).tolist()
    taken, times = [], [0] * classes
    while len(taken) < number:
        passed_over = []
        for i in order:
            least = [c for c in range(classes) if times[c] == min(times)]
            if (
                len(taken) < number
                and len(contents[i]) >= min_classes
                and any(c in contents[i] for c in least)
            ):
                taken.append(i)
                for c in contents[i]:
                    times[c] += 1
            else:
                passed_over.append(i)
        order = passed_over
    return [f"n{i:03d}" for i in taken]


@pytest.mark.parametrize(
    "number, classes, low, high, min_classes",
    [(5, 8, 1, 5, 1), (20, 19, 8, 16, 12), (12, 21, 1, 6, 3), (30, 37, 2, 9, 1)],
)
def test_the_rule(monkeypatch, number, classes, low, high, min_classes):
    for seed in range(5):
        contents = contents_of(400, classes, low, high, seed)
        source = in_memory(monkeypatch, contents, classes, min_classes)
        taken = [s.name for s in labels.labelled_split(source, number, seed)]
        assert taken == walk(contents, number, seed, classes, min_classes)
        assert len(set(taken)) == number


def test_deterministic_whatever_the_order_of_the_files(monkeypatch):
    source = in_memory(monkeypatch, contents_of(100, 10, 1, 5), 10)
    first = labels.labelled_split(source, 10, 3)
    source.train.reverse()
    assert labels.labelled_split(source, 10, 3) == first
    assert labels.labelled_split(source, 10, 4) != first


def test_labels_are_read_no_further_than_needed(monkeypatch):
    source = in_memory(monkeypatch, [{0, 1, 2} for _ in range(3000)], 3)
    labels.labelled_split(source, 20, 0)
    assert source.read_so_far == 20


def test_a_class_that_is_nowhere(monkeypatch):
    contents = [s - {4} for s in contents_of(60, 8, 2, 5)]
    source = in_memory(monkeypatch, contents, 8, min_classes=2)
    for number in (1, 7, 30, 60):
        taken = labels.labelled_split(source, number, 0)
        assert len({s.name for s in taken}) == number
    seen = set().union(*(contents[int(s.name[1:])] for s in labels.labelled_split(source, 12, 0)))
    assert seen == set(range(8)) - {4}


def test_a_class_found_in_poor_images_alone_is_seen(monkeypatch):
    """Class 7 stands only in images with fewer classes than the rule asks for."""
    contents = [s - {7} for s in contents_of(80, 8, 4, 6)]
    contents[17] = {0, 7}
    taken = labels.labelled_split(in_memory(monkeypatch, contents, 8, min_classes=3), 10, 0)
    assert "n017" in [s.name for s in taken]
    assert set().union(*(contents[int(s.name[1:])] for s in taken)) == set(range(8))


@pytest.mark.parametrize(
    "contents, min_classes",
    [
        ([{0}] * 12, 3),
        ([set()] * 12, 1),
        ([{0, 1, 2}] * 3 + [{0}] * 9, 3),
        ([{i % 3} for i in range(12)], 12),
    ],
)
def test_always_ends_with_the_number_asked_for(monkeypatch, contents, min_classes):
    source = in_memory(monkeypatch, contents, 5, min_classes)
    for number in range(1, 13):
        assert len({s.name for s in labels.labelled_split(source, number, 0)}) == number


def test_more_than_there_are(monkeypatch):
    source = in_memory(monkeypatch, [{0}] * 4, 2)
    source.train[0] = Sample("n000", "/n000.jpg", None)
    with pytest.raises(UserError, match=r"--num-labeled 4: .* only 3"):
        labels.labelled_split(source, 4, 0)


def classes_in(source: Source, samples: list[Sample]) -> set[int]:
    return set().union(*(source.read(s)[1].unique().tolist() for s in samples)) - {IGNORE}


@pytest.mark.parametrize("kind", ["cityscapes", "camvid"])
def test_split_of_a_tree_on_disk(tmp_path, kind):
    root = getattr(trees, kind)(tmp_path / "data", train=12, val=1, size=(32, 64))
    source = load(kind, root)
    labelled, unlabelled, partial = split(source, num_labeled=4, seed=1)
    assert len(labelled) == 4 and len(unlabelled) == 8 and not partial
    names = {s.name for s in labelled} | {s.name for s in unlabelled}
    assert names == {s.name for s in source.train}
    assert all(s.label for s in labelled) and not any(s.label for s in unlabelled)
    assert classes_in(source, labelled) == set(range(len(source.classes)))
    assert split(load(kind, root), num_labeled=4, seed=1)[0] == labelled


def test_roles():
    source = data.load_source("street", None)
    labelled, unlabelled, partial = split(source)
    assert labelled == source.train and not partial and not any(s.label for s in unlabelled)
    assert [s.name for s in unlabelled] == [s.name for s in source.train]
    labelled, both, partial = split(source, label_ratio="p1")
    assert partial and labelled == both == source.train
    labelled, unlabelled, _ = split(source, num_labeled=20)
    assert len(labelled) == 20 and len(unlabelled) == len(source.train) - 20
    assert classes_in(source, labelled) == set(range(len(source.classes)))


def test_roles_in_a_users_folder(tmp_path):
    full = load("folder", trees.folder(tmp_path / "full", train=3, unlabelled=4))
    labelled, unlabelled, partial = split(full)
    assert [len(labelled), len(unlabelled), partial] == [3, 4, False]
    assert not any(s.label for s in unlabelled)
    root = trees.folder(tmp_path / "sparse", train=3, unlabelled=4, painted=0.2)
    sparse = load("folder", root)
    labelled, both, partial = split(sparse)
    assert [len(labelled), len(both), partial] == [3, 7, True]
    assert sum(bool(s.label) for s in both) == 3  # known pixels are kept
    assert split(sparse, num_labeled=2)[2]


@pytest.mark.parametrize("more", [0, 2])
def test_a_scribble_among_full_masks_plays_both_roles(tmp_path, more):
    """What is not painted in it is as unlabelled as an image without a mask."""
    root = trees.folder(tmp_path / "data", train=5, unlabelled=more, palette=False)
    path = root / "labels" / "train" / "train_002.png"
    label = np.array(Image.open(path))
    label[5:] = 255
    Image.fromarray(label).save(path)
    source = load("folder", root)
    labelled, unlabelled, partial = split(source)
    assert [len(labelled), partial] == [5, False]
    names = [s.name for s in unlabelled]
    if more:
        assert names == ["train_002", "train_005", "train_006"]
    else:  # every image labelled: all play both roles
        assert names == [s.name for s in source.train]
    assert [s.name for s in unlabelled if s.label] == ["train_002"]  # known pixels are kept


@pytest.mark.parametrize(
    "tree, line",
    [
        ("pascal", "JPEGImages/{name}.jpg SegmentationClass/{name}.png"),
        ("pascal", "/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png"),
        ("pascal", "{name}"),
        ("pascal", "{name}.jpg"),
        ("pascal", "  {name}.png  "),
        (
            "cityscapes",
            "leftImg8bit/train/{city}/{name}_leftImg8bit.png "
            "gtFine/train/{city}/{name}_gtFine_labelTrainIds.png",
        ),
        ("camvid", "/SegNet/CamVid/train/{name}.png /SegNet/CamVid/trainannot/{name}.png"),
        ("cityscapes", "{city}/{name}"),
        ("cityscapes", "{name}_leftImg8bit"),
        ("cityscapes", "{name}"),
        ("sun", "SUNRGBD-train_images/{name}.jpg"),
        ("folder", "images/train/{name}.png labels/train/{name}.png"),
        ("folder", "{name}"),
    ],
)
def test_published_lists(tmp_path, tree, line):
    source = load(tree, getattr(trees, tree)(tmp_path / "data", train=4))
    chosen = [s for s in source.train if s.label][2:0:-1]
    listed = [*chosen, chosen[0]]
    lines = [line.format(name=s.name, city=s.name.partition("_")[0]) for s in listed]
    file = tmp_path / "list.txt"
    for ending, encoding in (("\n", "utf-8"), ("\r\n", "utf-8-sig")):
        file.write_bytes(ending.join(["", *lines, ""]).encode(encoding))
        labelled, unlabelled, partial = split(source, labeled_list=str(file))
        assert labelled == chosen and not partial  # each once, in the order of the list
        assert len(unlabelled) == len(source.train) - 2


def test_a_label_in_a_list_is_no_image(tmp_path):
    """SUN's first training image has label 5051, and there is a training image 5051."""
    samples = [Sample(f"img-{n:06d}", "image", "label") for n in (1, 235, 5051, 5285)]
    source = replace(data.DATASETS["sun"].source, train=samples)
    lines = [f"SUN/img-{n:06d}.jpg labels/img-{n + 5050:06d}.png\n" for n in (1, 235)]
    (tmp_path / "list.txt").write_text("".join(lines))
    assert labels.published_split(source, tmp_path / "list.txt") == samples[:2]


def test_a_runs_own_list_can_be_given_back(tmp_path):
    """labeled.txt holds names, and a user's names may hold spaces and dots."""
    root = trees.folder(tmp_path / "data", train=2)
    for kind in ("images", "labels"):
        file = root / kind / "train" / "train_000.png"
        file.rename(file.with_name("my photo 1.final.png"))
    source = load("folder", root)
    labelled = split(source)[0]
    (tmp_path / "labeled.txt").write_text("".join(f"{s.name}\n" for s in labelled))
    assert labels.published_split(source, str(tmp_path / "labeled.txt")) == labelled


def test_bad_lists(tmp_path):
    source = load("folder", trees.folder(tmp_path / "data", train=2, unlabelled=1))
    list_file = tmp_path / "list.txt"

    def refused(text: str) -> str:
        list_file.write_text(text)
        with pytest.raises(UserError) as error:
            labels.published_split(source, str(list_file))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "line 2: val_000 is not a training image" in refused("train_000\nval_000\n")
    assert "train_002" in refused("train_002\n") and "has no label" in refused("train_002\n")
    assert "names no image" in refused("\n \n")
    with pytest.raises(UserError, match="no such file"):
        labels.published_split(source, str(tmp_path / "nowhere.txt"))


def test_a_mask_of_0_and_255_among_others_is_told(tmp_path, capsys):
    source = load("folder", trees.folder(tmp_path))
    labels.check_folder(source, quiet=False)
    assert "0/255" not in capsys.readouterr().out
    mask = trees.raw(source.train[0].label) // 2 * 255
    mask[:30] = 0
    trees.save(Path(source.train[0].label), mask)
    labels.check_folder(source, quiet=False)
    assert f"{source.train[0].label}: holds only 0 and 255" in capsys.readouterr().out


def test_images_without_contrast_are_reported(tmp_path, capsys):
    source = load("folder", trees.folder(tmp_path))
    labels.check_folder(source, quiet=False)
    assert "contrast" not in capsys.readouterr().out
    twelve_bits = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)  # of 65535
    trees.save(Path(source.train[1].image), twelve_bits)
    labels.check_folder(source, quiet=False)
    assert f"1 images have next to no contrast ({source.train[1].image}" in capsys.readouterr().out


def test_classes_that_no_label_holds_are_told(tmp_path, capsys):
    root = trees.folder(tmp_path, classes=3)
    (root / "classes.txt").write_text("a\nb\nc\nnever\nagain\n")
    assert split(load("folder", root), quiet=False)
    assert "no label holds never, again" in capsys.readouterr().out


# -------------------------------------------------------------------------------- partial labels
def blobs(
    height: int, width: int, classes: int, cell: int, seed: int = 0, ignored: float = 0.05
) -> np.ndarray:
    """A label map like an annotation: curved regions, some of several parts, ignored pixels."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(size=(1, 2, height // 16 + 2, width // 16 + 2)))
    warp = F.interpolate(coarse, size=(height, width), mode="bicubic")[0].numpy()
    y, x = np.mgrid[:height, :width] + 4 * warp
    ids = rng.integers(0, classes, (height // cell + 20, width // cell + 20))
    label = ids[(y / cell).astype(int).clip(0), (x / cell).astype(int).clip(0)].astype(np.uint8)
    label[rng.random(label.shape) < ignored] = IGNORE
    return label


def grown(label: np.ndarray, cls: int, y: int, x: int, percent: int) -> np.ndarray:
    """The definition: dilate by 5x5 from the start pixel until enough of the class is covered."""
    member = torch.from_numpy(label == cls)
    wanted = int(member.sum()) * percent // 100
    square = torch.zeros(member.shape)
    square[y, x] = 1
    while int((square.bool() & member).sum()) < wanted:
        square = F.max_pool2d(square[None, None], 5, stride=1, padding=2)[0, 0]
    return (square.bool() & member).numpy()


@pytest.mark.parametrize(
    "height, width, classes, cell",
    [(40, 56, 5, 8), (31, 17, 3, 5), (24, 24, 19, 2), (9, 1, 2, 2), (1, 30, 4, 3), (64, 48, 1, 64)],
)
def test_equals_the_growth_loop(height, width, classes, cell):
    for seed in range(4):
        label = blobs(height, width, classes, cell, seed)
        start = partial_label(label, "p0", seed, "image")
        for ratio in ("p1", "p5", "p25"):
            kept = partial_label(label, ratio, seed, "image")
            expected = np.full_like(label, IGNORE)
            for cls in np.unique(label[label != IGNORE]):
                (y,), (x,) = np.nonzero(start == cls)
                expected[grown(label, cls, y, x, labels.RATIOS[ratio])] = cls
            assert np.array_equal(kept, expected)


def test_p0_is_one_pixel_of_every_class():
    for seed in range(20):
        label = blobs(37, 53, 12, 7, seed, ignored=0.3)
        kept = partial_label(label, "p0", seed, "x")
        known = kept != IGNORE
        assert np.array_equal(kept[known], label[known])
        assert sorted(kept[known].tolist()) == sorted(set(label[label != IGNORE].tolist()))


def test_p0_is_uniform_over_the_class():
    label = np.full((6, 7), IGNORE, np.uint8)
    label[0, 1:6] = label[3:5, ::2] = 2  # 13 pixels in two places
    label[5] = 9
    draws = sum((partial_label(label, "p0", seed, "x") == 2).astype(int) for seed in range(4000))
    assert draws.sum() == 4000 and (draws[label != 2] == 0).all()
    assert np.abs(draws[label == 2] - 4000 / 13).max() < 5 * (4000 / 13) ** 0.5


def test_all_ignored_and_single_pixels():
    void = np.full((5, 8), IGNORE, np.uint8)
    label = void.copy()
    label[2, 3], label[4, 7] = 0, 254 - 1
    for ratio in labels.RATIOS:
        assert np.array_equal(partial_label(void, ratio, 0, "x"), void)
        kept = partial_label(label, ratio, 0, "x")
        assert np.array_equal(kept, label)  # never fewer than the start pixel


def test_a_function_of_seed_and_name_alone():
    label = blobs(64, 96, 8, 12)
    for ratio in labels.RATIOS:

        def kept(seed, name, label=label, ratio=ratio):
            return partial_label(label, ratio, seed, name)

        first = kept(3, "aachen_000000_000019")
        assert np.array_equal(first, kept(3, "aachen_000000_000019", label.copy(order="F")))
        assert not np.array_equal(first, kept(4, "aachen_000000_000019"))
        assert not np.array_equal(first, kept(3, "aachen_000001_000019"))


def test_another_class_does_not_move_the_pixels_of_the_others():
    label = blobs(64, 96, 8, 12)
    other = label.copy()
    other[:3, :3] = 200
    a, b = (partial_label(x, "p0", 0, "x") for x in (label, other))
    same = sum(np.array_equal(a == cls, b == cls) for cls in range(8))
    assert same >= 7  # but for the class that lost pixels


def test_the_same_pixels_on_every_machine():
    tile = np.add.outer(np.arange(90) // 7, np.arange(120) // 9).astype(np.uint8) % 11
    kept = [partial_label(tile, ratio, 1, "name").tobytes() for ratio in labels.RATIOS]
    assert hashlib.sha256(b"".join(kept)).hexdigest()[:16] == "fa27320f9a8ac75c"


def test_fast_enough_for_a_loader():
    label = blobs(512, 1024, 19, 40)
    for ratio in labels.RATIOS:
        times = []
        for seed in range(9):
            start = time.thread_time()
            partial_label(label, ratio, seed, "x")
            times.append(time.thread_time() - start)
        assert min(times) < 0.05  # a loop that grows the squares takes seconds


# --------------------------------------------------------------------- what is remembered of labels
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
    assert opened == []
    opened.clear()
    half = np.tile(np.where(np.arange(64) < 32, 1, 255).astype(np.uint8), (48, 1))
    trees.save(root / "labels/train/train_001.png", half)
    os.utime(root / "images/train/train_005.jpg", ns=(1, 1))
    changed = entries()
    assert changed[1]["classes"] == [1] and changed[1]["share"] == 0.5
    again = {"train_001.jpg", "train_001.png", "train_005.jpg"}
    assert set(opened) == again
    assert [path.suffix for path in (cache / "reco-segmentation").iterdir()] == [".json"]


def test_one_cache_for_all_seeds(tmp_path, opened, cache):
    source = load("pascal", trees.pascal(tmp_path / "data", train=6, extra=4))
    split(source, num_labeled=10)
    opened.clear()
    for seed in range(1, 4):
        split(source, num_labeled=5, seed=seed)
    assert not opened and len(list((cache / "reco-segmentation").iterdir())) == 1


def test_what_was_read_before_a_bad_label_is_kept(tmp_path, opened):
    source = load("folder", trees.folder(tmp_path / "data", train=40, unlabelled=0))
    cut(Path(source.train[35].label))
    for expected in (40, 5):
        opened.clear()
        with pytest.raises(UserError, match="train_035"):
            split(source)
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
        pytest.param("[" * 100_000, id="brackets"),
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
