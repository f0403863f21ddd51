"""The example that writes a data set of handwriting: its files, its labels, its refusals."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
load_digits = pytest.importorskip("sklearn.datasets").load_digits
handwriting, own_folder = map(importlib.import_module, ("handwriting", "own_folder"))


@pytest.fixture
def start(monkeypatch, capsys):
    """start(arguments ...) -> status, stdout, stderr of the example, run in this process."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["handwriting.py", *map(str, arguments)])
        try:
            own_folder.launch(handwriting.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def test_what_it_writes(tmp_path, start):
    root = tmp_path / "new" / "digits"
    status, out, err = start(root, "--train", 12, "--val", 5, "--test", 3, "--size", 48)
    assert status == 0, err
    assert "12 training, 5 validation and 3 test" in out
    command = f"train_semi.py --reco --dataset folder --data-path {root} --num-labeled 60"
    assert f"accelerate launch {command}" in out
    assert (root / "classes.txt").read_text().split() == list(handwriting.CLASSES)
    palette = [channel for colour in handwriting.CLASSES.values() for channel in colour]
    for split, count in (("train", 12), ("val", 5), ("test", 3)):
        names = [f"{i:04d}.png" for i in range(count)]
        for kind in ("images", "labels"):
            assert sorted(path.name for path in (root / kind / split).iterdir()) == names
        for name in names:
            image, label = (Image.open(root / kind / split / name) for kind in ("images", "labels"))
            assert (image.mode, label.mode) == ("RGB", "P") and image.size == label.size == (48, 48)
            assert label.getpalette()[:33] == palette
            classes = np.unique(np.asarray(label))
            assert classes[0] == 0 and classes[-1] <= 10 and 2 <= len(classes) <= 6


def test_images_use_their_own_part_of_the_digits():
    data = load_digits()
    train, val, test = parts = handwriting.split_digits(data.target, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(len(data.target)))
    assert all(set(data.target[part]) == set(range(10)) for part in parts)
    assert len(train) > 5 * len(val) and len(val) > 0.9 * len(test)
    assert not np.array_equal(train, handwriting.split_digits(data.target, seed=1)[0])
    for seed in range(20):
        given = data.images, data.target, val
        image, label, used = handwriting.draw_image(np.random.default_rng(seed), *given)
        again = handwriting.draw_image(np.random.default_rng(seed), *given)
        assert np.array_equal(image, again[0]) and np.array_equal(label, again[1])
        assert used == again[2]
        assert 1 <= len(used) <= 5 and set(used) <= set(val)
        assert set(np.unique(label)) == {0} | {data.target[i] + 1 for i in used}


def test_refusals(tmp_path, start):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for args in (
        ["taken"],
        ["file"],
        ["file/below"],
        ["new", "--train", 0],
        ["new", "--val", -3],
        ["new", "--test", 0],
        ["new", "--size", 8],
        ["new", "--seed", -1],
    ):
        status, out, err = start(tmp_path / args[0], *args[1:])
        assert status == 2 and out == "", args
        assert err.count("\n") == 1 and err.startswith("error: "), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]
