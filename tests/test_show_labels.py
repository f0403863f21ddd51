"""The example that draws labels: the shares it prints, the colours it paints, its refusals."""

import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import trees

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
show_labels, own_folder = map(importlib.import_module, ("show_labels", "own_folder"))


@pytest.fixture
def show(monkeypatch, capsys, tmp_path):
    """show(arguments ...) -> status, stdout, stderr of the example on two labelled images."""
    root = trees.folder(tmp_path / "data", train=2, classes=4)
    labels = sorted((root / "labels/train").iterdir())
    holes = np.zeros((48, 64), np.uint8)
    holes[:24] = 255  # not labelled
    holes[-3:, :32] = 1
    trees.save(labels[0], holes)
    trees.save(labels[1], np.full((48, 64), 2, np.uint8))

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["show_labels.py", str(root), *map(str, arguments)])
        try:
            own_folder.launch(show_labels.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def test_shares_and_colours(show, tmp_path):
    picture = tmp_path / "labels.png"
    status, out, err = show(picture)
    assert status == 0, err
    size = 24 * 64 + 48 * 64
    for name, pixels, images in (
        ("thing 0", 24 * 64 - 96, 1),
        ("thing 1", 96, 1),
        ("thing 2", 48 * 64, 1),
        ("thing 3", 0, 0),
    ):
        share = f"{100 * pixels / size:.3g} % of the labelled pixels"
        assert f"{name}: {share}, in {images} of 2 images" in out
    drawn = {tuple(colour) for colour in trees.raw(picture)[..., :3].reshape(-1, 3).tolist()}
    assert {(128, 0, 0), (0, 128, 0), (128, 128, 0)} <= drawn  # the legend: 1, 2, 3


def test_predictions_and_one_class(show, tmp_path):
    image = tmp_path / "data/images/train/train_000.png"
    overlay = tmp_path / "predictions/train_000_overlay.png"
    trees.save(overlay, np.full_like(trees.raw(image), (1, 2, 203)))
    only = "--classes", "thing 1", "--predictions", overlay.parent
    status, _, err = show(tmp_path / "one.png", *only)
    assert status == 0, err
    assert (trees.raw(tmp_path / "one.png")[..., :3] == (1, 2, 203)).all(-1).sum() > 1000
    assert "train_001_overlay.png: no such file" in show(tmp_path / "all.png", *only[2:])[2]


def test_nothing_is_replaced(show, tmp_path):
    label = tmp_path / "data/labels/train/train_000.png"
    before = label.read_bytes()
    copy = shutil.copy(label, tmp_path / "copy.png")
    for arguments, message in (
        ([copy], "exists; name another file, or replace it with --overwrite"),
        ([label, "--overwrite"], "would overwrite the input"),
        ([tmp_path / "a.jpg"], "must end with .png"),
        ([tmp_path / "a.png", "--classes", "thing 3"], "train holds thing 3"),
        ([tmp_path / "a.png", "--split", "test"], "no labelled image"),
    ):
        status, _, err = show(*arguments)
        assert status == 2 and err.count("\n") == 1 and message in err, err
    assert label.read_bytes() == before and not (tmp_path / "a.png").exists()
    assert show(copy, "--overwrite")[0] == 0
