"""The loaders: which images they read, in which order, and in which processes."""

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from engine import processes
from inputs.errors import UserError
from inputs.files import IGNORE
from inputs.labels import partial_label, shown_classes
from inputs.source import Sample, Source, is_sparse
from inputs.transforms import random_scale_crop, reflect_pad

POLL = 5  # seconds between two checks that the loader processes are alive
# PyTorch's messages (they differ by version) if a process was killed or shared memory is full
LOST = re.compile(
    r"exited unexpectedly|shared memory\(shm\)|unable to (write|mmap|resize).* file <"
)


# ------------------------------------------------------------------------------------------- images
@dataclass
class TrainingCrops(Dataset):
    """Random scale and crop of image and label at training resolution; with `label_ratio`, only a
    few pixels keep their label. An item is a pure function of its key (index, seed of its draws,
    class that the crop must show or -1), in any process."""

    source: Source
    samples: list[Sample]
    crop: tuple[int, int]
    scale: tuple[float, float]
    label_ratio: str | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, Tensor, int]:
        """Image uint8 [3, h, w], label uint8 [h, w] (255 = not labelled), index."""
        index, seed, wanted = key
        sample = self.samples[index]
        image, label = self.source.read(sample)
        if self.label_ratio:
            kept = partial_label(label.numpy(), self.label_ratio, self.seed, sample.name)
            label = torch.from_numpy(kept)
        sparse = bool(self.label_ratio) or (self.source.own_files and is_sparse(label))
        rng, around = np.random.default_rng(seed), None
        pixels = (label == wanted).nonzero() if wanted >= 0 else ()
        if len(pixels):
            around = pixels[rng.integers(len(pixels))].tolist()
        view = self.crop, self.scale, rng, around
        return *random_scale_crop(image, [(label, IGNORE, sparse)], *view), index


@dataclass
class EvaluationImages(Dataset):
    """Whole images with their labels, padded where the data set's protocol requires it."""

    source: Source
    samples: list[Sample]
    full_resolution: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image uint8 [3, H, W], label uint8 [H, W] (255 = not labelled), and [height, width]
        before padding on the right and below."""
        image, label = self.source.read(self.samples[index], self.full_resolution)
        size = torch.tensor(label.shape)
        if self.source.eval_pad and not self.full_resolution:
            height, width = self.source.eval_pad
            below, right = max(0, height - label.shape[0]), max(0, width - label.shape[1])
            image = reflect_pad(image, height, width)
            label = F.pad(label, (0, right, 0, below), value=IGNORE)
        return image, label, size


# -------------------------------------------------------------------------------------------- order
@dataclass
class StepSampler:
    """Batches of (index, seed, class or -1) for TrainingCrops, one per micro-step from `start` to
    `stop` (see `training_loader`). `length` images are drawn with replacement, as a pure function
    of (seed, stream, micro-step). Every rank draws the same global batch and takes its share, so
    the order survives a crash and does not depend on the number of loader processes.

    shown  bool [length, C], whether each label holds each class: draw a class, then an image that
           holds it, all with the same probability (not in the paper; after DAFormer, Hoyer et al.
           2022)"""

    length: int
    batch_size: int
    start: int
    stop: int
    seed: int
    stream: int
    rank: int = 0
    world: int = 1
    shown: np.ndarray | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return map(self.batch, range(self.start, self.stop))

    def batch(self, number: int) -> list[tuple[int, int, int]]:
        """(index, seed, class or -1) of each image of a micro-step."""
        rng = np.random.default_rng([self.seed, self.stream, number])
        total = self.batch_size * self.world
        index, seeds = rng.integers(self.length, size=total), rng.integers(2**63, size=total)
        classes = np.full(total, -1)
        if self.shown is not None:
            classes = rng.choice(np.flatnonzero(self.shown.any(axis=0)), size=total)
            index = np.array([rng.choice(np.flatnonzero(self.shown[:, c])) for c in classes])
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        keys = index[mine].tolist(), seeds[mine].tolist(), classes[mine].tolist()
        return list(zip(*keys, strict=True))


class PassSampler:
    """Batches of indices for EvaluationImages: every image once over all ranks, then all over
    again, endlessly. One iterator serves all validations in the same order, and the first images of
    a validation are read before it begins."""

    start = 0

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1):
        mine = list(range(rank, length, world))
        self.batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.cycle(self.batches)

    def batch(self, number: int) -> list[int]:
        """Indices of the images of a batch."""
        return self.batches[number]


# ------------------------------------------------------------------------------------------ loading
class Loader:
    """Batches of a data set in the sampler's order, read by `num_workers` processes (0: this one).

    The processes start once, in `start` or the first iteration, and live as long as the loader. An
    iteration takes len(sampler) batches; the next one continues after them. UserError if nothing
    arrives for `processes.LIMIT` seconds, a loader process was killed, or no shared memory is left
    for a batch."""

    def __init__(self, name: str, dataset: Dataset, sampler, num_workers: int, pin_memory: bool):
        self.name, self.dataset, self.sampler, self.iterator = name, dataset, sampler, None
        several = dict(
            multiprocessing_context=processes.START_METHOD,
            worker_init_fn=processes.start_worker,
            timeout=min(POLL, processes.LIMIT),
        )
        self.loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            **(several if num_workers else {}),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def start(self) -> None:
        """Start the loader processes, which begin to read at once."""
        if self.iterator is None:
            processes.speak_for_itself()
            if self.loader.num_workers:
                processes.start_server()
            with without_main_script():
                self.iterator = iter(self.loader)
            processes.ignore_ends_of_workers()

    def __iter__(self) -> Iterator:
        self.start()  # now, so that two zipped loaders start together
        return map(self.take, range(self.sampler.start, self.sampler.start + len(self)))

    def take(self, number: int):
        """The next batch, which is number `number` of the sampler."""
        begun = time.monotonic()
        while True:
            try:
                return next(self.iterator)
            except (RuntimeError, ConnectionError, EOFError) as error:
                if is_lost(error):
                    raise UserError(
                        f"a loader process was killed or has no shared memory left "
                        f"({self.describe(number)}); use a smaller --num-workers (0 needs neither "
                        "processes nor shared memory), or in a container docker run --shm-size=8g; "
                        "a training run resumes with --resume"
                    ) from None
                if "DataLoader timed out" not in str(error):
                    raise
            if time.monotonic() - begun >= processes.LIMIT:
                raise UserError(
                    f"nothing was read for {processes.LIMIT:g} s ({self.describe(number)}); check "
                    "the disk or the mount; a training run resumes with --resume"
                )

    def describe(self, number: int) -> str:
        """The loader, the number of a batch and its images."""
        keys = self.sampler.batch(number)
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        images = dict.fromkeys(self.dataset.samples[index].image for index in indices)
        return f"{self.name} loader, batch {number}, images {', '.join(images)}"


def is_lost(error: Exception) -> bool:
    """Whether a loader process was killed or found no shared memory. DataLoader has no exception
    class for this, and the connection breaks if a process dies while a batch is fetched. Errors
    that the process itself raises contain its traceback."""
    broken = isinstance(error, ConnectionError | EOFError)
    own = "in DataLoader worker process" in str(error)
    return (broken and not own) or bool(LOST.search(str(error)))


@contextlib.contextmanager
def without_main_script():
    """Hide the main script from multiprocessing. Otherwise each loader process would import it, and
    with it timm and Accelerate: seconds and 200 MB for nothing."""
    main = sys.modules["__main__"].__dict__
    file = main.pop("__file__", None)
    try:
        yield
    finally:
        if file is not None:
            main["__file__"] = file


# ------------------------------------------------------------------------------ loaders of a run
def training_loader(
    name: str,
    source: Source,
    samples: list[Sample],
    args,
    accelerator,
    start: int,
    batch_size: int,
    stream: int,
    scale: tuple[float, float],
    balanced: bool = False,
) -> Loader:
    """Batches (image uint8 [B, 3, h, w], label uint8 [B, h, w], index [B]) of `batch_size` images
    per process, one for each of the `gradient_accumulation_steps` micro-steps of every step from
    `start` on. Loaders of one run differ in `stream`, which seeds their draws. balanced: every
    class is shown equally often (see StepSampler)."""
    crop, scale = tuple(args.crop_size), tuple(scale)
    crops = TrainingCrops(source, samples, crop, scale, args.label_ratio, args.seed)
    micro_steps = accelerator.gradient_accumulation_steps
    sampler = StepSampler(
        len(samples),
        batch_size,
        start * micro_steps,
        args.iterations * micro_steps,
        args.seed,
        stream,
        accelerator.process_index,
        accelerator.num_processes,
        shown_classes(source, samples) if balanced else None,
    )
    pin_memory = accelerator.device.type == "cuda"
    return Loader(name, crops, sampler, args.num_workers, pin_memory)


def evaluation_loader(
    source: Source,
    samples: list[Sample],
    batch_size: int,
    num_workers: int,
    accelerator,
    full_resolution: bool = False,
) -> Loader:
    """Batches (image uint8 [B, 3, H, W], label uint8 [B, H, W], size [B, 2]): every image exactly
    once over all ranks. A batch has several images only if all images have the same size."""
    images = EvaluationImages(source, samples, full_resolution)
    batch_size = batch_size if source.one_size(full_resolution) else 1
    rank, world = accelerator.process_index, accelerator.num_processes
    sampler = PassSampler(len(images), batch_size, rank, world)
    pin_memory = accelerator.device.type == "cuda"
    return Loader("validation", images, sampler, num_workers, pin_memory)


def validation_loader(args, source: Source, accelerator) -> Loader:
    """The validation images of a run, read by at most two processes."""
    batch_size = 50 if source.name == "street" else 4  # images of street are small
    return evaluation_loader(source, source.val, batch_size, min(2, args.num_workers), accelerator)
