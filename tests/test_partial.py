"""Partial labels against the growth loop they replace, their distribution, their speed."""

import hashlib
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import loaders
from data import IGNORE, partial_label


def blobs(
    height: int, width: int, classes: int, cell: int, seed: int = 0, ignored: float = 0.05
) -> np.ndarray:
    """A label map of curved regions, some of several parts, and ignored pixels: like an annotation."""
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
                expected[grown(label, cls, y, x, data.RATIOS[ratio])] = cls
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
    for ratio in data.RATIOS:
        assert np.array_equal(partial_label(void, ratio, 0, "x"), void)
        assert np.array_equal(
            partial_label(label, ratio, 0, "x"), label
        )  # never fewer than the start pixel


def test_a_function_of_seed_and_name_alone():
    label = blobs(64, 96, 8, 12)
    for ratio in data.RATIOS:
        first = partial_label(label, ratio, 3, "aachen_000000_000019")
        assert np.array_equal(
            first, partial_label(label.copy(order="F"), ratio, 3, "aachen_000000_000019")
        )
        assert not np.array_equal(first, partial_label(label, ratio, 4, "aachen_000000_000019"))
        assert not np.array_equal(first, partial_label(label, ratio, 3, "aachen_000001_000019"))
    # another class that appears does not move the pixels of the others
    other = label.copy()
    other[:3, :3] = 200
    a, b = (partial_label(x, "p0", 0, "x") for x in (label, other))
    assert (
        sum(np.array_equal(a == cls, b == cls) for cls in range(8)) >= 7
    )  # but for the class that lost pixels
    # the same on every machine: bits of one result, kept here
    tile = np.add.outer(np.arange(90) // 7, np.arange(120) // 9).astype(np.uint8) % 11
    digest = hashlib.sha256(
        b"".join(partial_label(tile, ratio, 1, "name").tobytes() for ratio in data.RATIOS)
    ).hexdigest()
    assert digest[:16] == "fa27320f9a8ac75c"


def test_fast_enough_for_a_loader():
    label = blobs(512, 1024, 19, 40)
    for ratio in data.RATIOS:
        times = []
        for seed in range(9):
            start = time.thread_time()
            partial_label(label, ratio, seed, "x")
            times.append(time.thread_time() - start)
        assert min(times) < 0.015


def test_training_crops_keep_the_same_pixels(tmp_path):
    source = data.load_source("street", None)
    crops = loaders.TrainingCrops(source, source.train[:2], (64, 64), (1.0, 1.0), "p0", 7)
    _, label, _ = crops[0, 1]
    assert torch.equal(label, crops[0, 2][1])  # whatever is drawn for the crop
    full = source.read(source.train[0])[1]
    known = label != IGNORE
    assert torch.equal(label[known], full[known]) and known.sum() == len(full.unique())
    assert not torch.equal(
        label,
        loaders.TrainingCrops(source, source.train[:2], (64, 64), (1.0, 1.0), "p0", 8)[0, 1][1],
    )
