"""What a loader's process reads, and in which order."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from data import Sample, Source
from labels import partial_label
from mixing import IGNORE
from transforms import random_scale_crop, reflect_pad


class TrainingCrops(Dataset):
    """Random scale and crop of image and label at training resolution, optionally with most of the label hidden.
    An item is asked for by (index, seed), the seed of its draws: a pure function of the two, in whichever worker."""

    def __init__(
        self,
        source: Source,
        samples: list[Sample],
        crop: tuple[int, int],
        scale: tuple[float, float],
        label_ratio: str | None = None,
        seed: int = 0,
    ):
        self.source, self.samples, self.crop, self.scale, self.label_ratio, self.seed = (
            source,
            samples,
            crop,
            scale,
            label_ratio,
            seed,
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Image uint8 [3, h, w], label uint8 [h, w] (255 = not labelled), index."""
        index, seed = key
        sample = self.samples[index]
        image, label = self.source.read(sample)
        if self.label_ratio:
            label = torch.from_numpy(
                partial_label(label.numpy(), self.label_ratio, self.seed, sample.name)
            )
        image, label, _ = random_scale_crop(
            image, label, None, self.crop, self.scale, np.random.default_rng(seed)
        )
        return image, label, index


class EvaluationImages(Dataset):
    """Whole images with their labels, padded where the data set's protocol asks for it."""

    def __init__(self, source: Source, samples: list[Sample], full_resolution: bool = False):
        self.source, self.samples, self.full_resolution = source, samples, full_resolution

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image, label = self.source.read(self.samples[index], self.full_resolution)
        if self.source.eval_pad and not self.full_resolution:
            missing = [
                max(0, wanted - size) for wanted, size in zip(self.source.eval_pad, label.shape)
            ]
            image, label = (
                reflect_pad(image, *self.source.eval_pad),
                F.pad(label, (0, missing[1], 0, missing[0]), value=IGNORE),
            )
        return image, label, index


class StepSampler:
    """Batches of (index, seed) for TrainingCrops: images drawn with replacement, as a pure function of (seed, stream,
    step). Every process draws the same global batch and takes its share, so order survives any crash and any
    number of workers."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        start: int,
        stop: int,
        seed: int,
        stream: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.length, self.batch_size, self.start, self.stop = length, batch_size, start, stop
        self.seed, self.stream, self.rank, self.world = seed, stream, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            rng = np.random.default_rng([self.seed, self.stream, step])
            total = self.batch_size * self.world
            index, seeds = rng.integers(self.length, size=total), rng.integers(2**63, size=total)
            mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            yield list(zip(index[mine].tolist(), seeds[mine].tolist()))
