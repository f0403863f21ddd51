"""Which images are labelled: the rule of the labelled split, published lists, and the two roles of images."""

from pathlib import Path

import numpy as np
import pytest

import data
import trees
from data import Sample, Source, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def in_memory(monkeypatch, contents: list[set[int]], classes: int, min_classes: int = 1) -> Source:
    """A source of images n000, n001, ... that hold these classes; `source.read_so_far` tells how many labels were looked at."""
    samples = [
        Sample(f"n{i:03d}", f"/n{i:03d}.jpg", f"/n{i:03d}.png") for i in range(len(contents))
    ]
    source = Source(
        "made", [str(c) for c in range(classes)], [], samples, [], min_classes=min_classes
    )
    source.read_so_far = 0

    def label_index(source, samples, quiet=True):
        for sample in samples:
            source.read_so_far += 1
            yield {"classes": sorted(contents[int(sample.name[1:])]), "share": 1.0}

    monkeypatch.setattr(data, "label_index", label_index)
    return source


def contents_of(number, classes, low, high, seed=0):
    """Random class sets; class c is rarer the higher its id."""
    rng = np.random.default_rng(seed)
    rarity = 1 / (1 + np.arange(classes))
    return [
        set(
            rng.choice(
                classes, rng.integers(low, high + 1), replace=False, p=rarity / rarity.sum()
            ).tolist()
        )
        for _ in range(number)
    ]


def walk(contents, number, seed, classes, min_classes):
    """The rule of the specification, word by word, for data in which it comes to an end. The walk is over positions in the shuffle."""
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
        taken = [s.name for s in data.labelled_split(source, number, seed)]
        assert taken == walk(contents, number, seed, classes, min_classes)
        assert len(set(taken)) == number


def test_deterministic_whatever_the_order_of_the_files(monkeypatch):
    source = in_memory(monkeypatch, contents_of(100, 10, 1, 5), 10)
    first = data.labelled_split(source, 10, 3)
    source.train.reverse()
    assert data.labelled_split(source, 10, 3) == first
    assert data.labelled_split(source, 10, 4) != first


def test_labels_are_read_no_further_than_needed(monkeypatch):
    source = in_memory(monkeypatch, [{0, 1, 2} for _ in range(3000)], 3)
    data.labelled_split(source, 20, 0)
    assert source.read_so_far == 20


def test_a_class_that_is_nowhere(monkeypatch):
    contents = [s - {4} for s in contents_of(60, 8, 2, 5)]
    source = in_memory(monkeypatch, contents, 8, min_classes=2)
    for number in (1, 7, 30, 60):
        taken = data.labelled_split(source, number, 0)
        assert len({s.name for s in taken}) == number
    seen = set().union(*(contents[int(s.name[1:])] for s in data.labelled_split(source, 12, 0)))
    assert seen == set(range(8)) - {4}


def test_a_class_found_in_poor_images_alone_is_seen(monkeypatch):
    """Class 7 stands only in images with fewer classes than the rule asks for."""
    contents = [s - {7} for s in contents_of(80, 8, 4, 6)]
    contents[17] = {0, 7}
    taken = data.labelled_split(in_memory(monkeypatch, contents, 8, min_classes=3), 10, 0)
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
        assert len({s.name for s in data.labelled_split(source, number, 0)}) == number


def test_more_than_there_are(monkeypatch):
    source = in_memory(monkeypatch, [{0}] * 4, 2)
    source.train[0] = Sample("n000", "/n000.jpg", None)
    with pytest.raises(UserError, match="--num-labeled 4: .* only 3"):
        data.labelled_split(source, 4, 0)


def test_split_of_a_tree_on_disk(tmp_path):
    source = data.load_source(
        "cityscapes", str(trees.cityscapes(tmp_path / "c", train=12, val=1, size=(32, 64)))
    )
    labelled, unlabelled, partial = data.divide(source, 4, None, None, 1)
    assert len(labelled) == 4 and len(unlabelled) == 8 and not partial
    assert {s.name for s in labelled} | {s.name for s in unlabelled} == {
        s.name for s in source.train
    }
    assert all(s.label for s in labelled) and not any(s.label for s in unlabelled)
    seen = set().union(*(set(source.read(s)[1].unique().tolist()) for s in labelled)) - {
        data.IGNORE
    }
    assert seen == set(range(19))
    again = data.load_source("cityscapes", str(tmp_path / "c"))
    assert data.divide(again, 4, None, None, 1)[0] == labelled


def test_roles():
    source = data.load_source("street", None)
    everything = data.divide(source, 0, None, None, 0)
    assert everything[0] == source.train and not any(s.label for s in everything[1])
    assert [s.name for s in everything[1]] == [s.name for s in source.train]
    labelled, both, partial = data.divide(source, 0, "p1", None, 0)
    assert partial and labelled == both == source.train
    few = data.divide(source, 20, None, None, 0)
    assert len(few[0]) == 20 and len(few[1]) == len(source.train) - 20
    classes = set().union(*(set(source.read(s)[1].unique().tolist()) for s in few[0]))
    assert classes - {data.IGNORE} == set(range(len(source.classes)))


def test_roles_in_a_users_folder(tmp_path):
    source = data.load_source("folder", str(trees.folder(tmp_path / "full", train=3, unlabelled=4)))
    labelled, unlabelled, partial = data.divide(source, 0, None, None, 0)
    assert [len(labelled), len(unlabelled), partial] == [3, 4, False] and not any(
        s.label for s in unlabelled
    )
    source = data.load_source(
        "folder", str(trees.folder(tmp_path / "sparse", train=3, unlabelled=4, painted=0.2))
    )
    labelled, unlabelled, partial = data.divide(source, 0, None, None, 0)
    assert [len(labelled), len(unlabelled), partial] == [3, 7, True] and sum(
        bool(s.label) for s in unlabelled
    ) == 3  # known pixels are kept
    assert data.divide(source, 2, None, None, 0)[2]


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
            "leftImg8bit/train/{city}/{name}_leftImg8bit.png gtFine/train/{city}/{name}_gtFine_labelTrainIds.png",
        ),
        ("cityscapes", "{city}/{name}"),
        ("cityscapes", "{name}_leftImg8bit"),
        ("cityscapes", "{name}"),
        ("sun", "SUNRGBD-train_images/{name}.jpg"),
        ("folder", "images/train/{name}.png labels/train/{name}.png"),
        ("folder", "{name}"),
    ],
)
def test_published_lists(tmp_path, tree, line):
    source = data.load_source(tree, str(getattr(trees, tree)(tmp_path / "data", train=4)))
    chosen = [s for s in source.train if s.label][2:0:-1]
    text = "".join(
        line.format(name=s.name, city=s.name.partition("_")[0]) + "\n" for s in chosen + chosen[:1]
    )
    for ending, encoding in (("\n", "utf-8"), ("\r\n", "utf-8-sig")):
        (tmp_path / "list.txt").write_bytes(("\n" + text).replace("\n", ending).encode(encoding))
        labelled, unlabelled, partial = data.divide(source, 0, None, str(tmp_path / "list.txt"), 0)
        assert labelled == chosen and not partial  # each once, in the order of the list
        assert len(unlabelled) == len(source.train) - 2


def test_a_runs_own_list_can_be_given_back(tmp_path):
    """labeled.txt holds names, and a user's names may hold spaces and dots."""
    root = trees.folder(tmp_path / "data", train=2)
    for kind in ("images", "labels"):
        (root / kind / "train" / "train_000.png").rename(
            root / kind / "train" / "my photo 1.final.png"
        )
    source = data.load_source("folder", str(root))
    labelled = data.divide(source, 0, None, None, 0)[0]
    (tmp_path / "labeled.txt").write_text("".join(f"{s.name}\n" for s in labelled))
    assert data.published_split(source, str(tmp_path / "labeled.txt")) == labelled


def test_bad_lists(tmp_path):
    source = data.load_source("folder", str(trees.folder(tmp_path / "data", train=2, unlabelled=1)))
    list_file = tmp_path / "list.txt"

    def refused(text: str) -> str:
        list_file.write_text(text)
        with pytest.raises(UserError) as error:
            data.published_split(source, str(list_file))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "line 2: val_000 is no training image" in refused("train_000\nval_000\n")
    assert "train_002" in refused("train_002\n") and "has no label" in refused("train_002\n")
    assert "names no image" in refused("\n \n")
    with pytest.raises(UserError, match="no such file"):
        data.published_split(source, str(Path(tmp_path / "nowhere.txt")))
