"""How samples are read: at training size, and from training-size copies."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import trees
from inputs import transforms
from inputs.source import Source
from trees import cut, raw, watch_decoding


def load(kind: str, path, **options) -> Source:
    return data.load_source(kind, str(path), **options)


@pytest.fixture
def opened(monkeypatch):
    return watch_decoding(monkeypatch)


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
