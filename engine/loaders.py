"""What the loaders read, in which order, and in which processes."""

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from engine import processes
from inputs.errors import UserError
from inputs.files import IGNORE
from inputs.labels import partial_label
from inputs.source import Sample, Source, is_sparse
from inputs.transforms import random_scale_crop, reflect_pad

POLL = 5  # seconds between two looks at whether the loader processes are alive
# what PyTorch says of it, by version
NO_SHARED_MEMORY = re.compile(r"shared memory\(shm\)|unable to (write|mmap|resize).* file <")


# ------------------------------------------------------------------------------------------- images
class TrainingCrops(Dataset):
    """Random scale and crop of image and label at training resolution, optionally with most of the
    label hidden. An item is asked for by (index, seed), the seed of its draws: a pure function of
    the two, in whichever process."""

    def __init__(
        self,
        source: Source,
        samples: list[Sample],
        crop: tuple[int, int],
        scale: tuple[float, float],
        label_ratio: str | None = None,
        seed: int = 0,
    ):
        self.source, self.samples = source, samples
        self.crop, self.scale = crop, scale
        self.label_ratio, self.seed = label_ratio, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Image uint8 [3, h, w], label uint8 [h, w] (255 = not labelled), index."""
        index, seed = key
        sample = self.samples[index]
        image, label = self.source.read(sample)
        if self.label_ratio:
            kept = partial_label(label.numpy(), self.label_ratio, self.seed, sample.name)
            label = torch.from_numpy(kept)
        sparse = bool(self.label_ratio) or (self.source.own_files and is_sparse(label))
        view = self.crop, self.scale, np.random.default_rng(seed)
        return *random_scale_crop(image, [(label, IGNORE, sparse)], *view), index


class EvaluationImages(Dataset):
    """Whole images with their labels, padded where the data set's protocol asks for it."""

    def __init__(self, source: Source, samples: list[Sample], full_resolution: bool = False):
        self.source, self.samples, self.full_resolution = source, samples, full_resolution

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image uint8 [3, H, W], label uint8 [H, W] (255 = not labelled), and their height and
        width before they were padded on the right and below."""
        image, label = self.source.read(self.samples[index], self.full_resolution)
        size = torch.tensor(label.shape)
        if self.source.eval_pad and not self.full_resolution:
            height, width = self.source.eval_pad
            below, right = max(0, height - label.shape[0]), max(0, width - label.shape[1])
            image = reflect_pad(image, height, width)
            label = F.pad(label, (0, right, 0, below), value=IGNORE)
        return image, label, size


# -------------------------------------------------------------------------------------------- order
class StepSampler:
    """Batches of (index, seed) for TrainingCrops: images drawn with replacement, as a pure function
    of (seed, stream, step). Every rank draws the same global batch and takes its share, so order
    survives any crash and any number of loader processes."""

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
        return map(self.batch, range(self.start, self.stop))

    def batch(self, step: int) -> list[tuple[int, int]]:
        rng = np.random.default_rng([self.seed, self.stream, step])
        total = self.batch_size * self.world
        index, seeds = rng.integers(self.length, size=total), rng.integers(2**63, size=total)
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return list(zip(index[mine].tolist(), seeds[mine].tolist(), strict=True))


class PassSampler:
    """Batches of indices for EvaluationImages: every image once over all ranks, then again from the
    first, without end. So one iterator serves all validations, in the same order, and the first
    images of the next one are read before it begins."""

    start = 0

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1):
        mine = list(range(rank, length, world))
        self.batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.cycle(self.batches)

    def batch(self, number: int) -> list[int]:
        return self.batches[number]


# ------------------------------------------------------------------------------------------ loading
class Loader:
    """Batches of a data set in the sampler's order, read by `num_workers` processes (0: by us).

    The processes are started once, by `start` or by the first iteration, and live as long as the
    loader. An iteration takes len(sampler) batches and leaves the iterator where it is. Raises
    UserError, one line, when nothing comes for `processes.LIMIT` seconds, when a loader process is
    gone, or when they have no shared memory left for their batches."""

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
        self.start()  # now, so that two loaders that are zipped start together
        return map(self.take, range(self.sampler.start, self.sampler.start + len(self)))

    def take(self, step: int):
        """The next batch, which is that of `step`."""
        begun = time.monotonic()
        while True:
            try:
                return next(self.iterator)
            except (RuntimeError, ConnectionError, EOFError) as error:
                if is_of_a_dead_process(error):
                    raise UserError(
                        f"a loader process was killed ({self.missing(step)}), most often by the "
                        "system for want of memory, in a container of shared memory: take a "
                        "smaller --num-workers, or docker run --shm-size=8g (a training run goes "
                        "on with --resume)"
                    ) from None
                if NO_SHARED_MEMORY.search(str(error)):
                    raise UserError(
                        f"no shared memory is left for a batch ({self.name} loader, step {step}); "
                        "a container has little: start it with more (docker run --shm-size=8g), or "
                        "take a smaller --num-workers, 0 needs none (a training run goes on with "
                        "--resume)"
                    ) from None
                if "DataLoader timed out" not in str(error):
                    raise
            if time.monotonic() - begun >= processes.LIMIT:
                raise UserError(
                    f"nothing was read for {processes.LIMIT:g} s ({self.missing(step)}): is the "
                    "disk, or the network to it, gone? (A training run goes on with --resume)"
                )

    def missing(self, step: int) -> str:
        """What a batch is made of, in words: a function of the step, so nobody need deliver it."""
        keys = self.sampler.batch(step)
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        images = dict.fromkeys(self.dataset.samples[index].image for index in indices)
        return f"{self.name} loader, step {step}, images {', '.join(images)}"


def is_of_a_dead_process(error: Exception) -> bool:
    """DataLoader has no class for it. A batch whose process dies before it is fetched altogether is
    an error of their connection; what a process itself raises arrives with its traceback."""
    broken = isinstance(error, ConnectionError | EOFError)
    told = "in DataLoader worker process" in str(error)
    return "exited unexpectedly" in str(error) or (broken and not told)


@contextlib.contextmanager
def without_main_script():
    """A process that multiprocessing starts imports the main script once more, and with it timm and
    Accelerate: 200 MB and seconds, each. Loader processes need none of it, so they are not told."""
    main = sys.modules["__main__"].__dict__
    file = main.pop("__file__", None)
    try:
        yield
    finally:
        if file is not None:
            main["__file__"] = file


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
) -> Loader:
    """Batches (image uint8 [B, 3, h, w], label uint8 [B, h, w], index [B]) of `batch_size` images a
    process for the steps from `start` on. Loaders of one run differ in `stream`, the source of
    their draws."""
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
    once over all processes; batches of several only where all images have one size."""
    images = EvaluationImages(source, samples, full_resolution)
    batch_size = batch_size if source.one_size(full_resolution) else 1
    rank, world = accelerator.process_index, accelerator.num_processes
    sampler = PassSampler(len(images), batch_size, rank, world)
    pin_memory = accelerator.device.type == "cuda"
    return Loader("validation", images, sampler, num_workers, pin_memory)


def validation_loader(args, source: Source, accelerator) -> Loader:
    """The validation images of a run, read by two processes at most."""
    batch_size = 50 if source.name == "street" else 4  # street scenes are small
    return evaluation_loader(source, source.val, batch_size, min(2, args.num_workers), accelerator)
