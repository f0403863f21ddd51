"""The example that makes a folder of a clone of the magnetic tiles: which images, what labels."""

import hashlib
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import trees

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
tiles, own_folder = map(importlib.import_module, ("magnetic_tiles", "own_folder"))
PARTS = {"train": [0, 1, 2, 6], "val": [3], "test": [4, 5]}  # places among seven images


@pytest.fixture
def clone(tmp_path):
    """Seven images of each kind in the layout of the repository, each of its own grey."""
    for kind in tiles.KINDS:
        folder = tmp_path / "clone" / f"MT_{kind.capitalize()}" / "Imgs"
        for i in range(7):
            mask = np.zeros((30, 40), np.uint8)
            if kind != "free":
                mask[:, : i + 1] = 255
                mask[:, -1] = 127  # JPEG-like greys are cut
            trees.save(folder / f"exp{i}_num_{i}.jpg", np.full((30, 40), 30 * i, np.uint8))
            trees.save(folder / f"exp{i}_num_{i}.png", mask)
    return tmp_path / "clone"


def convert(monkeypatch, clone: Path, out: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["magnetic_tiles.py", str(clone), str(out)])
    own_folder.launch(tiles.main)


def test_images_and_labels(monkeypatch, capsys, clone, tmp_path):
    convert(monkeypatch, clone, tmp_path / "out")
    assert "24 train, 6 val, 12 test images" in capsys.readouterr().out
    source = data.load_source("folder", str(tmp_path / "out"))
    assert source.classes == ["background", "blowhole", "break", "crack", "fray", "uneven"]
    order = sorted(range(7), key=lambda i: hashlib.md5(f"exp{i}_num_{i}.jpg".encode()).hexdigest())
    for part, places in PARTS.items():
        samples = {sample.name: sample for sample in getattr(source, part)}
        assert {*samples} == {f"{kind}_{i:03d}" for kind in tiles.KINDS for i in places}
        for name, sample in samples.items():
            kind, _, place = name.partition("_")
            number, i = tiles.KINDS.index(kind), order[int(place)]
            image, label = source.read(sample)
            assert abs(int(image[0, 0, 0]) - 30 * i) <= 2
            expected = np.zeros((30, 40), np.uint8)
            expected[:, : i + 1] = number
            assert np.array_equal(label.numpy(), expected)


def test_the_first_images_without_a_defect(monkeypatch, clone, tmp_path):
    monkeypatch.setattr(tiles, "FREE_IMAGES", 4)
    convert(monkeypatch, clone, tmp_path / "out")
    free = sorted(path.name for path in (tmp_path / "out/images").rglob("free*"))
    assert free == [f"free_{i:03d}.png" for i in range(4)]


def test_another_folder_is_refused(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        convert(monkeypatch, tmp_path, tmp_path / "out")
    assert "MT_Free/Imgs: holds no .jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
