"""The example that writes a data set of handwriting: its files, its labels, its refusals."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")
from sklearn.datasets import load_digits

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "handwriting.py"
spec = importlib.util.spec_from_file_location("handwriting", SCRIPT)
handwriting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handwriting)


def start(*args):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True
    )


def test_what_it_writes(tmp_path):
    root = tmp_path / "new" / "digits"
    done = start(root, "--train", 12, "--val", 5, "--test", 3, "--size", 48)
    assert done.returncode == 0, done.stderr
    assert "12 training, 5 validation and 3 test" in done.stdout
    command = f"train_semi.py --reco --dataset folder --data-path {root} --num-labeled 60"
    assert f"accelerate launch {command}" in done.stdout
    assert (root / "classes.txt").read_text().split() == list(handwriting.CLASSES)
    assert len(handwriting.CLASSES) == len(handwriting.PALETTE) == 11
    for split, count in (("train", 12), ("val", 5), ("test", 3)):
        names = [f"{i:04d}.png" for i in range(count)]
        for kind in ("images", "labels"):
            assert sorted(path.name for path in (root / kind / split).iterdir()) == names
        for name in names:
            image, label = (Image.open(root / kind / split / name) for kind in ("images", "labels"))
            assert (image.mode, label.mode) == ("RGB", "P") and image.size == label.size == (48, 48)
            assert label.getpalette()[:33] == [c for colour in handwriting.PALETTE for c in colour]
            classes = np.unique(np.asarray(label))
            assert classes[0] == 0 and classes[-1] <= 10 and 2 <= len(classes) <= 6


def test_scenes_use_their_own_part_of_the_digits():
    data = load_digits()
    train, val, test = parts = handwriting.split_digits(data.target, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(len(data.target)))
    assert all(set(data.target[part]) == set(range(10)) for part in parts)
    assert len(train) > 5 * len(val) and len(val) > 0.9 * len(test)
    assert not np.array_equal(train, handwriting.split_digits(data.target, seed=1)[0])
    for seed in range(20):
        given = data.images, data.target, val
        image, label, used = handwriting.draw_scene(np.random.default_rng(seed), *given)
        again = handwriting.draw_scene(np.random.default_rng(seed), *given)
        assert np.array_equal(image, again[0]) and np.array_equal(label, again[1])
        assert used == again[2]
        assert 1 <= len(used) <= 5 and set(used) <= set(val)
        assert set(np.unique(label)) == {0} | {data.target[i] + 1 for i in used}


def test_refusals(tmp_path):
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
        done = start(tmp_path / args[0], *args[1:])
        assert done.returncode == 2 and done.stdout == "", args
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("handwriting.py: "), (
            done.stderr
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]
