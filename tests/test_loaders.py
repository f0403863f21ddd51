"""What a loader's process reads, and in which order."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
import trees
from loaders import EvaluationImages, StepSampler, TrainingCrops
from mixing import IGNORE


def test_evaluation_images_are_padded_as_the_protocol_says(tmp_path):
    for kind, size, expected in (
        ("pascal", (375, 500), (513, 513)),
        ("pascal", (500, 30), (513, 513)),
        ("sun", (53, 73), (385, 513)),
        ("camvid", (45, 60), (360, 480)),
        ("cityscapes", (8, 16), (512, 1024)),
        ("folder", (48, 64), (48, 64)),
    ):
        root = getattr(trees, kind)(tmp_path / f"{kind}{size[0]}", size=size)
        source = data.load_source(kind, str(root))
        image, label, index = EvaluationImages(source, source.val)[1]
        whole, inside = source.read(source.val[1])
        height, width = inside.shape
        assert image.shape == (3, *expected) and label.shape == expected and index == 1
        assert image.dtype == label.dtype == torch.uint8
        assert torch.equal(image[:, :height, :width], whole)
        assert torch.equal(label[:height, :width], inside)
        assert (label[height:] == IGNORE).all() and (label[:, width:] == IGNORE).all()
        if width < expected[1]:  # reflected
            assert torch.equal(image[:, :height, width], whole[:, :, width - 2])
        original = Image.open(source.val[1].image)
        full, _, _ = EvaluationImages(source, source.val, full_resolution=True)[1]
        assert full.shape == (3, original.height, original.width)


def test_a_crop_is_a_function_of_index_and_seed_in_whichever_worker(tmp_path):
    source = data.load_source("pascal", str(trees.pascal(tmp_path)))
    crops = TrainingCrops(source, source.train, (40, 40), (0.5, 1.5), "p5", 3)

    def batches(workers: int):
        sampler = StepSampler(len(crops), 4, 2, 6, seed=1, stream=0)
        return list(DataLoader(crops, batch_sampler=sampler, num_workers=workers))

    for here, there in zip(batches(0), batches(2), strict=True):
        assert here[0].shape == (4, 3, 40, 40) and here[1].shape == (4, 40, 40)
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_batches_are_a_function_of_seed_stream_and_step():
    def steps(start, stop, rank=0, world=1, seed=0, stream=0, batch=6):
        return list(StepSampler(50, batch, start, stop, seed, stream, rank, world))

    whole = steps(0, 10)
    assert steps(4, 10) == whole[4:]  # a resumed run goes on in the order
    assert len(StepSampler(50, 6, 4, 10, 0, 0)) == 6
    assert whole != steps(0, 10, seed=1) and whole != steps(0, 10, stream=1)
    first, second = (steps(0, 10, rank, 2, batch=3) for rank in range(2))
    joined = [a + b for a, b in zip(first, second, strict=True)]
    assert joined == whole  # two processes share one global batch
    drawn = np.bincount([index for batch in steps(0, 500) for index, _ in batch], minlength=50)
    assert np.abs(drawn - 60).max() < 5 * 60**0.5
    assert len({seed for batch in whole for _, seed in batch}) == 60


def test_training_crops_keep_the_same_pixels():
    source = data.load_source("street", None)
    crops = TrainingCrops(source, source.train[:2], (64, 64), (1.0, 1.0), "p0", 7)
    _, label, _ = crops[0, 1]
    assert torch.equal(label, crops[0, 2][1])  # whatever is drawn for the crop
    full = source.read(source.train[0])[1]
    known = label != IGNORE
    assert torch.equal(label[known], full[known]) and known.sum() == len(full.unique())
    other_seed = TrainingCrops(source, source.train[:2], (64, 64), (1.0, 1.0), "p0", 8)
    assert not torch.equal(label, other_seed[0, 1][1])
