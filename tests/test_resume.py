"""A run that is killed at any moment and resumed ends as if nothing had happened, to the bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trees
from cli import ENVIRONMENT, ROOT, fork, launcher, run_many, run_script
from engine import checkpoint, processes
from inputs.errors import UserError

# checkpoints at every step and a validation at every third: mostly something is being written
OPTIONS = [
    "train_semi.py",
    "--reco",
    "--dataset",
    "folder",
    "--data-path",
    "DATA",
    "--recipe",
    "street",
    "--crop-size",
    "32",
    "--iterations",
    "9",
    "--val-interval",
    "3",
    "--save-interval",
    "1",
    "--batch-size",
    "2",
    "--num-workers",
    "1",
    "--log-interval",
    "1",
    "--reco-num-queries",
    "16",
    "--reco-num-negatives",
    "16",
]


@pytest.fixture(scope="module", autouse=True)
def small_data(tmp_path_factory):
    OPTIONS[OPTIONS.index("DATA")] = str(
        trees.folder(tmp_path_factory.mktemp("data") / "data", size=(32, 40))
    )


def start(processes: int, *words) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher(processes), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def final_state(folder) -> tuple:
    return (
        torch.load(folder / "checkpoint" / "state.pt", weights_only=True),
        load_file(folder / "model.safetensors"),
        json.loads((folder / "history.json").read_text()),
        (folder / "labeled.txt").read_text(),
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    states = {}

    def state(processes: int):
        if processes not in states:
            folder = tmp_path_factory.mktemp("whole") / "run"
            done = run_script(*OPTIONS, "--out-dir", folder, processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]
            states[processes] = final_state(folder)
        return states[processes]

    return state


def written(file) -> int:
    """When, in ns; 0 where it does not exist."""
    return file.stat().st_mtime_ns if file.exists() else 0


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_to_the_bit(processes, uninterrupted, tmp_path):
    """Killed anywhere in its steps, and again when it has gone on and saved a state."""
    expected, folder, rng = uninterrupted(processes), tmp_path / "run", random.Random(processes)
    words, kills = [*OPTIONS, "--out-dir", folder], 0
    for file, resume in (("config.json", []), ("checkpoint/state.pt", ["--resume"])):
        before, deadline = written(folder / file), time.monotonic() + 120
        run = start(processes, *words, *resume)
        try:
            while run.poll() is None and written(folder / file) == before:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.4))
        finally:
            if run.poll() is None:
                kills += 1
                os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
    assert kills  # a run may have come to its end before
    done = run_script(*words, "--resume", processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(final_state(folder), expected)
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    "processes,number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)]
)
def test_signals_save_at_the_next_step_and_say_how_to_go_on(
    processes, number, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    run = start(processes, *OPTIONS, "--save-interval", "100", "--out-dir", folder)
    while run.poll() is None and not (folder / "config.json").exists():
        time.sleep(0.02)
    os.kill(run.pid, number)  # the launcher passes it on
    out, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    stopped = re.search(r"stopped at step (\d+) of 9, saved. Go on with: (.*--resume)", out)
    assert stopped, out[-2000:]
    assert processes == 2 or run.returncode == 128 + number
    assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["step"] == int(
        stopped[1]
    )
    done = run_script(
        *OPTIONS, "--save-interval", "100", "--out-dir", folder, "--resume", processes=processes
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(final_state(folder)[0], uninterrupted(processes)[0])


def test_resuming_with_other_arguments_is_refused(tmp_path):
    folder = tmp_path / "run"
    done = fork(
        "train_supervised.py",
        *OPTIONS[2:10],
        "--iterations",
        "2",
        "--batch-size",
        "2",
        "--log-with",
        "none",
        "--out-dir",
        folder,
    )
    assert done.returncode == 0, done.stderr
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    refused = [
        (["train_supervised.py", "--seed", "1"], "--seed 1 (the run: 0)"),
        (["train_supervised.py", "--lr", "0.5"], "--lr 0.5"),
        (["train_supervised.py", "--iterations", "50"], "--iterations 50"),
        (["train_supervised.py", "--reco"], "--reco True"),
        (["train_supervised.py", "--crop-size", "48"], "--crop-size"),
        (["train_semi.py"], "train_supervised.py"),
    ]
    for (words, culprit), (status, _, err) in zip(
        refused,
        run_many([[*words, "--out-dir", folder, "--resume"] for words, _ in refused]),
        strict=True,
    ):
        assert status == 2 and culprit in err and len(err.splitlines()) == 1, (words, err)
    done = run_script("train_supervised.py", "--out-dir", folder, "--resume", processes=2)
    assert done.returncode != 0 and "processes 2 (the run: 1)" in done.stderr
    done = fork(
        "train_supervised.py", "--out-dir", folder, "--resume", ACCELERATE_MIXED_PRECISION="bf16"
    )  # as `accelerate launch --mixed_precision bf16`
    assert done.returncode == 2 and "mixed precision bf16 (the run: no)" in done.stderr
    done = fork(
        "train_supervised.py", "--out-dir", folder, "--resume", ACCELERATE_MIXED_PRECISION="fp16"
    )  # a CPU has none
    assert (
        done.returncode == 2
        and "fp16 needs a GPU" in done.stderr
        and "Traceback" not in done.stderr
    )
    classes = Path(OPTIONS[OPTIONS.index("--data-path") + 1]) / "classes.txt"
    text = classes.read_text()
    try:
        classes.write_text("".join(reversed(text.splitlines(keepends=True))))
        done = fork("train_supervised.py", "--out-dir", folder, "--resume")
    finally:
        classes.write_text(text)
    assert done.returncode == 2 and "classes.txt has changed" in done.stderr
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = fork(
        "train_supervised.py", "--out-dir", folder, "--resume", "--num-workers", "1"
    )  # harmless: nothing is left to do
    assert done.returncode == 0, done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(tmp_path):
    folder = tmp_path / "run"
    done = fork(
        "train_supervised.py",
        *OPTIONS[2:10],
        "--iterations",
        "40",
        "--lr",
        "1e12",
        "--save-interval",
        "1",
        "--val-interval",
        "40",
        "--log-interval",
        "1",
        "--batch-size",
        "2",
        "--log-with",
        "none",
        "--out-dir",
        folder,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(
        r"the (loss was not finite at|weights were not finite after) step \d+", done.stderr
    ), done.stderr
    path = folder / "checkpoint" / "state.pt"  # there is none where the first step went wrong
    assert not path.exists() or all(
        torch.isfinite(v).all()
        for v in torch.load(path, weights_only=True)["model"].values()
        if v.is_floating_point()
    )


def test_the_offending_batch_is_written(tmp_path):
    """With checkpoints far apart the logging interval finds the step, tells the parts and writes
    what the step had seen."""
    folder = tmp_path / "run"
    done = fork(
        "train_supervised.py",
        *OPTIONS[2:10],
        "--iterations",
        "40",
        "--lr",
        "1e12",
        "--val-interval",
        "40",
        "--log-interval",
        "4",
        "--batch-size",
        "2",
        "--log-with",
        "none",
        "--out-dir",
        folder,
    )
    found = re.search(
        r"the loss was not finite at step (\d+) \(.*loss/supervised (nan|inf)", done.stderr
    )
    assert done.returncode == 2 and found, done.stderr
    ((image, label, _),) = torch.load(
        folder / f"nonfinite-step{found[1]}-process0.pt", weights_only=True
    )
    assert image.shape == (2, 3, 32, 32) and label.shape == (2, 32, 32)


def test_a_bad_step_before_the_unlabelled_images_join_is_told_in_time(tmp_path):
    """The logging interval lies beyond the end of the warm-up, from where on the step has more
    parts."""
    done = fork(
        *OPTIONS,
        "--num-workers",
        "0",
        "--warmup-iterations",
        "6",
        "--log-interval",
        "9",
        "--save-interval",
        "9",
        "--val-interval",
        "9",
        "--lr",
        "1e12",
        "--log-with",
        "none",
        "--out-dir",
        tmp_path / "run",
    )
    assert done.returncode == 2 and re.fullmatch(
        r"train_semi.py: the loss was not finite at step [1-5] "
        r"\(loss/total (nan|inf), loss/supervised (nan|inf)\);.*",
        done.stderr.splitlines()[-1],
    ), done.stderr


def test_two_runs_do_not_share_a_folder(tmp_path):
    """Both chose it when it was free, or one is resumed while it still trains: the second to open
    it gives way. The end of a process, however it comes, frees the folder."""
    code = "import sys, time, pathlib as p, checkpoint as c; c.hold(p.Path(sys.argv[1]), 'a\\n')"
    code += "; print('held', flush=True); time.sleep(99)"
    command = [sys.executable, "-c", code, tmp_path]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        for text in ("b\n", None):  # a new run, a resumed one
            with pytest.raises(UserError, match="another process trains in this folder"):
                checkpoint.hold(tmp_path, text)
        first.kill()
    checkpoint.hold(tmp_path)
    assert (tmp_path / "labeled.txt").read_text() == "a\n"
    (tmp_path / "config.json").write_text("{}")  # one that began and ended meanwhile
    with pytest.raises(UserError, match="another process trains in this folder"):
        checkpoint.hold(tmp_path, "b\n")


def test_the_newest_run_is_the_one_last_written_to(tmp_path):
    for i, (name, age) in enumerate([("x", 5), ("x-3", 9), ("x-2", 7), ("x-y", 0), ("xx", 0)]):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (10**9 - age - i, 10**9 - age - i))
    (tmp_path / "x-4").mkdir()  # begun and ended with nothing
    assert checkpoint.newest_folder(tmp_path / "x") == tmp_path / "x"
    (tmp_path / "x-2" / "checkpoint" / "state.pt").write_text("")
    assert checkpoint.newest_folder(tmp_path / "x") == tmp_path / "x-2"
    with pytest.raises(UserError, match="there is no run"):
        checkpoint.newest_folder(tmp_path / "z")


def test_what_a_run_has_lost_is_told_and_nothing_is_spoiled(tmp_path):
    tree, run = trees.folder(tmp_path / "data", size=(32, 40)), tmp_path / "run"
    (tmp_path / "list.txt").write_text("train_001\ntrain_000\n")
    mask = tree / "labels" / "train" / "train_000.png"
    painted = trees.raw(mask)
    trees.save(mask, painted, compress_level=0)  # the size follows from height and width alone
    words = f"""train_supervised.py --dataset folder --data-path {tree} --recipe street
        --labeled-list {tmp_path / "list.txt"} --crop-size 32 --channels 8 --low-channels 8
        --rep-dim 8 --batch-size 2 --num-workers 0 --log-with none --iterations 4
        --val-interval 2 --out-dir {run}""".split()
    done = fork(*words)
    assert done.returncode == 0, done.stderr
    (tmp_path / "list.txt").unlink()  # the run has its own
    images = [min((tree / "images" / part).iterdir()) for part in ("val", "train")]
    state, weights = run / "checkpoint" / "state.pt", run / "model.safetensors"
    whole, before = state.read_bytes(), weights.read_bytes()

    def resumed():
        return fork("train_supervised.py", "--out-dir", run, "--resume")

    def refused() -> str:
        done = resumed()
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert weights.read_bytes() == before
        return done.stderr

    assert resumed().returncode == 0
    state.unlink()
    assert "state.pt: is gone, though the run had written it" in refused()
    state.write_bytes(whole[:1000])
    assert "state.pt: is damaged" in refused() and "--init-from" in refused()
    torch.save({"step": 2, "best": None, "skipped": 0}, state)
    assert "state.pt: does not fit this network or this version" in refused()
    state.write_bytes(whole)
    for image, what in zip(images, ("validation", "labelled"), strict=True):
        old = image.read_bytes()
        trees.save(image, np.zeros((32, 40, 3), np.uint8))
        assert f"other {what} images would change the result; put back" in refused()
        image.write_bytes(old)
    old = mask.read_bytes()
    trees.save(mask, 2 - painted, compress_level=0)
    assert mask.stat().st_size == len(old) and "other labels would change" in refused()
    mask.write_bytes(old)
    weights.unlink()  # they are made again, though others had been better
    content = checkpoint.read_torch(state)
    content["history"][0]["miou"] = content["best"]["miou"] = 0.99
    torch.save(content, state)
    done = resumed()
    assert done.returncode == 0 and "best validation" in done.stdout and weights.exists()
    history = checkpoint.read_history(run)
    assert [entry["step"] for entry in history] == [2, 4, 4] and history[0]["miou"] == 0.99
    assert checkpoint.best_miou(run) == history[2]["miou"] < 0.99


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    """However far it got, and with whatever interval it was resumed."""
    tree, run = trees.folder(tmp_path / "data", size=(32, 40)), tmp_path / "run"
    words = f"""train_supervised.py --dataset folder --data-path {tree} --recipe street
        --crop-size 32 --channels 8 --low-channels 8 --rep-dim 8 --batch-size 2 --num-workers 0
        --log-with none --iterations 4 --val-interval 2 --out-dir {run}""".split()
    assert fork(*words).returncode == 0
    config = json.loads((run / "config.json").read_text())
    assert config.pop("has_checkpoint")
    (run / "config.json").write_text(json.dumps(config))
    (run / "checkpoint" / "state.pt").unlink()
    for place in (run, run / "checkpoint"):  # as a kill in the middle of a write leaves them
        (place / ".state.pt.1.part").write_bytes(b"half")
    done = fork("train_supervised.py", "--out-dir", run, "--resume", "--save-interval", "3")
    assert done.returncode == 0 and "goes on at step 0 of 4" in done.stdout, done.stderr
    assert not list(run.rglob("*.part"))
    assert json.loads((run / "config.json").read_text())["has_checkpoint"]


def test_what_the_system_refuses_is_one_line(capsys, monkeypatch):
    def main():  # as TensorBoard's writer hands it on
        raise OSError(28, "No space left on device", "runs/events")

    monkeypatch.setattr("sys.argv", ["train_semi.py"])
    monkeypatch.setattr(processes, "_own_errors", True)
    with pytest.raises(SystemExit) as end:
        processes.launch(main)
    assert (
        end.value.code == 2
        and capsys.readouterr().err
        == "train_semi.py: [Errno 28] No space left on device: 'runs/events'\n"
    )


def test_a_full_disk_is_one_line_and_leaves_the_last_good_state(tmp_path):
    folder = tmp_path / "run"
    small = [
        "train_supervised.py",
        *OPTIONS[2:10],
        "--batch-size",
        "2",
        "--log-with",
        "none",
        "--out-dir",
        folder,
        "--iterations",
        "4",
        "--val-interval",
        "4",
        "--save-interval",
        "2",
    ]
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6,) * 2); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, small)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "state.pt: cannot be written" in done.stderr
    assert not list(folder.rglob("*.part")) and not (folder / "checkpoint" / "state.pt").exists()
    done = fork("train_supervised.py", "--out-dir", folder, "--resume")  # the disk has room again
    assert done.returncode == 0, done.stderr
    assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["step"] == 4


def test_an_error_in_a_loader_process_ends_the_run(tmp_path):
    """The processes of both loaders are still there when it is met; none may keep the run from
    ending."""
    tree = trees.cityscapes(tmp_path / "data", size=(32, 64))
    for image in (tree / "leftImg8bit" / "train").rglob("*.png"):
        image.write_bytes(image.read_bytes()[:300])
    done = run_script(
        "train_semi.py",
        "--dataset",
        "cityscapes",
        "--data-path",
        tree,
        "--recipe",
        "street",
        "--num-workers",
        "1",  # of more than there are cores torch would warn
        "--iterations",
        "5",
        "--out-dir",
        tmp_path / "run",
        timeout=90,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("leftImg8bit.png") == 1
        and len(done.stderr.splitlines()) == 1
    )
    assert not (tmp_path / "run").exists()
