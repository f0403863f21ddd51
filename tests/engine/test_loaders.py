"""What the loaders deliver, from which processes, and how they fail."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import data
import trees
from engine import processes
from engine.loaders import EvaluationImages, Loader, PassSampler, StepSampler, TrainingCrops
from inputs.errors import UserError
from inputs.files import IGNORE
from runs import Run, parent, small

linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


# -------------------------------------------------------------------------------- images and order
def test_evaluation_images_are_padded_as_the_protocol_requires(tmp_path):
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
        image, label, own_size = EvaluationImages(source, source.val)[1]
        whole, inside = source.read(source.val[1])
        height, width = inside.shape
        assert image.shape == (3, *expected) and label.shape == expected
        assert own_size.tolist() == [height, width]
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
        return list(Loader("labelled", crops, sampler, workers, pin_memory=False))

    for here, there in zip(batches(0), batches(2), strict=True):
        assert here[0].shape == (4, 3, 40, 40) and here[1].shape == (4, 40, 40)
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_batches_are_a_function_of_seed_stream_and_step():
    def steps(start, stop, rank=0, world=1, seed=0, stream=0, batch=6):
        return list(StepSampler(50, batch, start, stop, seed, stream, rank, world))

    whole = steps(0, 10)
    assert steps(4, 10) == whole[4:]  # a resumed run continues in the order
    assert len(StepSampler(50, 6, 4, 10, 0, 0)) == 6
    assert whole != steps(0, 10, seed=1) and whole != steps(0, 10, stream=1)
    first, second = (steps(0, 10, rank, 2, batch=3) for rank in range(2))
    joined = [a + b for a, b in zip(first, second, strict=True)]
    assert joined == whole  # two processes share one global batch
    drawn = np.bincount([index for batch in steps(0, 500) for index, _, _ in batch], minlength=50)
    assert np.abs(drawn - 60).max() < 5 * 60**0.5
    assert len({seed for batch in whole for _, seed, _ in batch}) == 60


def test_every_class_is_shown_equally_often():
    """The rarest class is in a fifth of the crops if there are five, though one image of 50 has it;
    an absent class is never asked for."""
    shown = np.zeros((50, 6), bool)
    shown[:, 0], shown[::2, 1], shown[::5, 2], shown[7, 3], shown[:, 5] = (
        True,
        True,
        True,
        True,
        True,
    )
    sampler = StepSampler(50, 6, 0, 500, 0, 0, shown=shown)
    keys = [key for batch in sampler for key in batch]
    drawn = np.bincount([wanted for _, _, wanted in keys], minlength=6)
    assert drawn[4] == 0 and np.abs(drawn[[0, 1, 2, 3, 5]] - 600).max() < 5 * 600**0.5
    assert all(shown[index, wanted] for index, _, wanted in keys)
    images = np.bincount([index for index, _, wanted in keys if wanted == 0], minlength=50)
    assert np.abs(images - drawn[0] / 50).max() < 5 * (drawn[0] / 50) ** 0.5
    assert sampler.batch(3) == StepSampler(50, 6, 3, 4, 0, 0, shown=shown).batch(3)


def test_a_crop_shows_the_class_that_is_asked_for(tmp_path):
    root = trees.folder(tmp_path / "data", size=(96, 120))
    file = next((root / "labels" / "train").iterdir())
    label = np.zeros((96, 120), np.uint8)
    label[90:94, 3:7] = 1
    Image.fromarray(label).save(file)
    source = data.load_source("folder", root)
    sample = next(s for s in source.train if s.name == file.stem)
    crops = TrainingCrops(source, [sample], (32, 32), (0.5, 1.5))
    found = [(crops[0, seed, 1][1] == 1).nonzero() for seed in range(100)]
    assert sum(len(pixels) > 0 for pixels in found) > 95  # scaling down may lose its edge
    assert len({tuple(pixels[0].tolist()) for pixels in found if len(pixels)}) > 20
    assert sum(bool((crops[0, seed, -1][1] == 1).any()) for seed in range(100)) < 40
    absent = (crops[0, seed, 7] for seed in range(3))  # a class lost by scaling down: any crop
    assert all(image.shape == (3, 32, 32) for image, _, _ in absent)


def test_training_crops_keep_the_same_pixels():
    source = data.load_source("street", None)
    crops = TrainingCrops(source, source.train[:2], (64, 64), (1.0, 1.0), "p0", 7)
    _, label, _ = crops[0, 1, -1]
    assert torch.equal(label, crops[0, 2, -1][1])  # whatever is drawn for the crop
    full = source.read(source.train[0])[1]
    known = label != IGNORE
    assert torch.equal(label[known], full[known]) and known.sum() == len(full.unique())
    other_seed = TrainingCrops(source, source.train[:2], (64, 64), (1.0, 1.0), "p0", 8)
    assert not torch.equal(label, other_seed[0, 1, -1][1])


def test_training_crops_lose_no_known_pixel():
    """Scaled by 0.5 to 0.6, a crop holds the whole image: every class keeps its pixel."""
    source = data.load_source("street", None)
    crops = TrainingCrops(source, source.train[:2], (40, 40), (0.5, 0.6), "p0", 7)
    classes = set(source.read(source.train[0])[1].unique().tolist())
    for seed in range(10):
        _, label, _ = crops[0, seed, -1]
        assert set(label[label != IGNORE].tolist()) == classes


def test_training_crops_keep_a_users_points(tmp_path):
    root = trees.folder(tmp_path / "data", size=(32, 40))
    file = next((root / "labels" / "train").iterdir())
    points = np.full((32, 40), IGNORE, np.uint8)
    points[3::8, 5::10] = 1  # 16, far apart
    Image.fromarray(points).save(file)
    source = data.load_source("folder", root)
    sample = next(s for s in source.train if s.name == file.stem)
    crops = TrainingCrops(source, [sample], (24, 24), (0.5, 0.6))
    assert all((crops[0, seed, -1][1] == 1).sum() >= 16 for seed in range(10))


@pytest.fixture
def folder(tmp_path):
    return trees.folder(tmp_path / "data", size=(32, 40), unlabelled=3)


def validation(root: Path, num_workers: int) -> Loader:
    source = data.load_source("folder", str(root))
    images, sampler = EvaluationImages(source, source.val), PassSampler(len(source.val), 1)
    return Loader("validation", images, sampler, num_workers, pin_memory=False)


def test_every_pass_of_an_evaluation_is_the_same(folder):
    loader = validation(folder, 1)
    first, second, third = [[image.tolist() for image, _, _ in loader] for _ in range(3)]
    assert len(first) == 2 and first[0] != first[1] and first == second == third


def test_ranks_divide_a_pass():
    batches = [PassSampler(7, 2, rank, 3).batches for rank in range(3)]
    assert batches == [[[0, 3], [6]], [[1, 4]], [[2, 5]]]
    empty = PassSampler(1, 2, 1, 3)
    assert len(empty) == 0 and list(empty) == []  # no endless loop over nothing


# --------------------------------------------------------------------------------------- processes
def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@linux
def test_loader_processes_come_from_a_server_and_stay(folder):
    loader = validation(folder, 2)
    before = set(children(os.getpid()))
    list(loader)
    workers = [process.pid for process in loader.iterator._workers]
    parents = {parent(pid) for pid in workers}
    assert len(parents) == 1 and os.getpid() not in parents
    (server,) = parents
    everyone = set(children(os.getpid())), set(children(server))
    for _ in range(2):
        list(loader)
    # no validation starts any
    assert everyone == (set(children(os.getpid())), set(children(server)))
    assert server in everyone[0] | before


@linux
def test_loader_processes_that_are_our_own_as_on_a_mac(folder, monkeypatch):
    monkeypatch.setattr(processes, "START_METHOD", "spawn")
    loader = validation(folder, 1)
    assert len(list(loader)) == 2
    (worker,) = loader.iterator._workers
    assert worker.pid in children(os.getpid())
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(
        UserError, match=r"a loader process was killed or .* \(validation loader, batch 0"
    ):
        for _ in range(3):  # what it has read before is still delivered
            list(loader)


# --------------------------------------------------------------------------------------- failures
def test_a_bad_file_is_named_in_one_line(folder):
    victim = folder / "images" / "val" / "val_000.png"
    loader = validation(folder, 1)
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(UserError, match=r"val_000\.png"):
        list(loader)


def test_a_temporary_folder_with_too_long_a_name_is_one_line(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    command = "from engine import processes; processes.launch(processes.start_server)"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(cli.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert str(folder) in line and "set TMPDIR" in line


class Cramped(EvaluationImages):
    def __getitem__(self, index):
        import resource  # not on Windows

        # of files, which includes shared memory
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return super().__getitem__(index)


@linux
def test_too_little_shared_memory_is_one_line(folder):
    source = data.load_source("folder", str(folder))
    images = Cramped(source, source.val)
    loader = Loader("validation", images, PassSampler(2, 1), 1, pin_memory=False)
    with pytest.raises(UserError, match=r"no shared memory .* loader, batch 0, .*--shm-size"):
        list(loader)


DISK = """
import os, time
from PIL import Image

image_open = Image.open

def wait(*args, **options):
    while os.path.exists({gone!r}):
        time.sleep(1)
    return image_open(*args, **options)

Image.open = wait
"""


@linux
def test_killed_and_silent_loaders_are_one_line_and_the_run_resumes(folder, tmp_path):
    out_dir = tmp_path / "run"
    words = small("train_semi.py", folder, out_dir)
    with Run(*words) as run:
        run.validates(out_dir)
        os.kill(max(run.workers()), signal.SIGKILL)
        status, lines = run.ends()
        assert status == 2 and len(lines) == 1, lines
        assert "a loader process was killed" in lines[0] and " loader, batch " in lines[0]
        assert not run.alive()

    state = out_dir / "checkpoint" / "state.pt"
    written = state.stat().st_mtime_ns
    gone = tmp_path / "gone"
    (tmp_path / "sitecustomize.py").write_text(DISK.format(gone=str(gone)))
    with Run(*words, "--resume", RECO_TIMEOUT="8", PYTHONPATH=str(tmp_path)) as run:
        run.until(lambda: state.stat().st_mtime_ns > written)
        gone.touch()
        status, lines = run.ends()
        assert status == 2 and len(lines) == 1, lines
        assert "nothing was read for 8 s (" in lines[0] and " loader, batch " in lines[0]
        assert "/images/" in lines[0]
        run.until(lambda: not run.alive(), seconds=5)

    written = state.stat().st_mtime_ns
    with Run(*words, "--resume") as run:
        run.until(lambda: state.stat().st_mtime_ns > written)
        os.killpg(run.process.pid, signal.SIGTERM)  # to all of them, as `timeout` does
        out, err = run.process.communicate(timeout=120)
        assert run.process.returncode == 128 + signal.SIGTERM, err[-3000:]
        run.until(lambda: not run.alive(), seconds=5)
    assert "resumes at step" in out and "saved. Resume with: " in out
