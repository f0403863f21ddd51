"""The street scenes: what the repository relies on, and what makes them a useful data set."""

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inputs import street

ROOT = Path(__file__).resolve().parents[2]
SHARES = dict(  # of the pixels of the training split
    road=0.31,
    sidewalk=0.16,
    building=0.16,
    pole=0.009,
    sign=0.005,
    vegetation=0.052,
    sky=0.23,
    person=0.014,
    rider=0.006,
    car=0.042,
    truck=0.015,
)


@pytest.fixture(scope="module")
def scenes():
    """The first scenes of each split: {split: [(image, label), ...]}."""
    counts = {"train": 200, "val": 40, "test": 40}
    return {
        split: [street.scene(split, i) for i in range(count)] for split, count in counts.items()
    }


def test_shapes_types_and_constants(scenes):
    assert len(street.CLASSES) == len(street.PALETTE) == len(set(street.PALETTE)) == 11
    assert street.SPLITS == {"train": 1000, "val": 300, "test": 500}
    for image, label in scenes["val"]:
        assert image.dtype == label.dtype == np.uint8
        assert image.shape == (64, 64, 3) and label.shape == (64, 64)
        for array in (image, label):
            assert array.flags.c_contiguous and array.flags.writeable
        assert label.max() < 11 and image.std() > 5


def test_the_same_bits_in_any_order_and_in_another_process(scenes):
    for index in (7, 3, 7):
        image, label = street.scene("train", index)
        assert np.array_equal(image, scenes["train"][index][0])
        assert np.array_equal(label, scenes["train"][index][1])
    program = (
        "import zlib; from inputs import street; a, b = street.scene('test', 5);"
        "print(zlib.crc32(a), zlib.crc32(b))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(zlib.crc32(part)) for part in scenes["test"][5]]


def test_a_known_scene():
    """Pixels per class of two scenes, with room for the way another Pillow rounds edges."""
    for split, index, counts in (
        ("val", 0, [761, 446, 344, 64, 0, 423, 1327, 79, 132, 520, 0]),
        ("test", 499, [1505, 526, 452, 18, 26, 78, 1118, 35, 0, 338, 0]),
    ):
        found = np.bincount(street.scene(split, index)[1].ravel(), minlength=11)
        assert np.abs(found - counts).max() <= 15


def test_no_scene_occurs_twice(scenes):
    labels = {label.tobytes() for pairs in scenes.values() for _, label in pairs}
    images = {image.tobytes() for pairs in scenes.values() for image, _ in pairs}
    assert len(labels) == len(images) == 280


def test_every_class_has_its_share(scenes):
    labels = np.stack([label for _, label in scenes["train"]])
    for index, name in enumerate(street.CLASSES):
        share, present = (labels == index).mean(), (labels == index).any((1, 2)).mean()
        assert SHARES[name] / 1.6 < share < SHARES[name] * 1.6, name
        assert present > 0.15, name  # a rare class is still in every few scenes


def test_size_changes_the_resolution_only(scenes):
    image, label = street.scene("train", 0, size=128)
    assert image.shape == (128, 128, 3) and label.shape == (128, 128)
    assert (label[::2, ::2] == scenes["train"][0][1]).mean() > 0.9


@pytest.mark.parametrize(
    "split, index", [("training", 0), ("train", 1000), ("val", 300), ("test", -1)]
)
def test_what_does_not_exist_is_refused(split, index):
    with pytest.raises(ValueError, match="street") as error:
        street.scene(split, index)
    assert "\n" not in str(error.value)


def test_contact_sheet(tmp_path):
    street.contact_sheet(tmp_path / "sheet.png", rows=1, columns=2, zoom=2)
    assert Image.open(tmp_path / "sheet.png").size == (4 * 64 * 2, 64 * 2)
