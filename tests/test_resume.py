"""A run that is killed at any moment and resumed ends as an uninterrupted one, to the bit."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trees
from cli import ENVIRONMENT, ROOT, fork, launcher, run_script
from engine import checkpoint, processes
from inputs.errors import UserError

# a checkpoint at every step and a validation at every third: mostly something is being written
OPTIONS = """train_semi.py --reco --dataset folder --data-path DATA --recipe street --crop-size 32
    --iterations 9 --val-interval 3 --save-interval 1 --batch-size 2 --num-workers 1
    --log-interval 1 --reco-num-queries 16 --reco-num-negatives 16"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return trees.folder(tmp_path_factory.mktemp("data") / "data", size=(32, 40))


@pytest.fixture(scope="module")
def words(tree):
    return OPTIONS.replace("DATA", str(tree)).split()


@pytest.fixture
def supervised(tree, tmp_path):
    """A tiny supervised run in tmp_path / "run", without its length."""
    return f"""train_supervised.py --dataset folder --data-path {tree} --recipe street
        --crop-size 32 --channels 8 --batch-size 2 --num-workers 0 --log-with none
        --out-dir {tmp_path / "run"}""".split()


def start(processes: int, *words) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher(processes), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # the suite itself may run under nohup, and its children would ignore it, too
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
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
def uninterrupted(words, tmp_path_factory):
    """uninterrupted(processes) -> the final state of a run that nothing stops."""

    @functools.cache
    def state(processes: int) -> tuple:
        folder = tmp_path_factory.mktemp("whole") / "run"
        done = run_script(*words, "--out-dir", folder, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        return final_state(folder)

    return state


def written(file) -> int:
    """Its time of modification in ns; 0 where it does not exist."""
    return file.stat().st_mtime_ns if file.exists() else 0


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_to_the_bit(processes, words, uninterrupted, tmp_path):
    """Killed anywhere in its steps, and again after it has resumed and saved a state."""
    expected, folder, rng = uninterrupted(processes), tmp_path / "run", random.Random(processes)
    words, kills = [*words, "--out-dir", folder], 0
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
    assert kills  # a run may have ended before
    done = run_script(*words, "--resume", processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(final_state(folder), expected)
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("processes", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGINT), (1, signal.SIGHUP), (2, signal.SIGTERM)],
)
def test_signals_save_at_the_next_step_and_print_how_to_resume(
    processes, number, words, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    words = [*words, "--save-interval", "100", "--out-dir", folder]
    run = start(processes, *words)
    while run.poll() is None and not (folder / "config.json").exists():
        time.sleep(0.02)
    os.kill(run.pid, number)  # the launcher forwards it
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + number or (processes == 2 and run.returncode)
    stopped = re.search(r"stopped at step (\d+) of 9, saved. Resume with: (.*--resume)", out)
    assert stopped, out[-2000:]
    state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == int(stopped[1])
    done = run_script(*words, "--resume", processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(final_state(folder)[0], uninterrupted(processes)[0])


def test_resuming_with_other_arguments_is_refused(tree, supervised, tmp_path):
    folder = tmp_path / "run"
    done = fork(*supervised, "--iterations", "2")
    assert done.returncode == 0, done.stderr
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def refused(words: list[str], culprit: str, **environment):
        done = fork(*words, "--out-dir", folder, "--resume", **environment)
        assert done.returncode == 2 and culprit in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1

    script = "train_supervised.py"
    refused([script, "--seed", "1"], "--seed 1 (the run: 0)")
    refused([script, "--lr", "0.5"], "--lr 0.5")
    refused([script, "--iterations", "50"], "--iterations 50")
    refused([script, "--reco"], "--reco True")
    refused([script, "--gradient-accumulation-steps", "2"], "-accumulation-steps 2 (the run: 1)")
    refused([script, "--crop-size", "48"], "--crop-size")
    refused(["train_semi.py"], "is a run of train_supervised.py")
    # as `accelerate launch` with other settings; a CPU has no fp16
    precision = "ACCELERATE_MIXED_PRECISION"
    refused([script], "mixed precision bf16 (the run: no)", **{precision: "bf16"})
    refused([script], "fp16 needs a GPU", **{precision: "fp16"})
    done = run_script(script, "--out-dir", folder, "--resume", processes=2)
    assert done.returncode != 0 and "processes 2 (the run: 1)" in done.stderr
    classes = tree / "classes.txt"
    text = classes.read_text()
    try:
        classes.write_text("".join(reversed(text.splitlines(keepends=True))))
        refused([script], "classes.txt has changed")
    finally:
        classes.write_text(text)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = fork(script, "--out-dir", folder, "--resume", "--num-workers", "1")  # harmless
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- losses that are not finite
def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(supervised, tmp_path):
    more = "--iterations 40 --lr 1e12 --save-interval 1 --val-interval 40 --log-interval 1"
    done = fork(*supervised, *more.split())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    reason = r"the (loss was not finite at|weights were not finite after) step \d+"
    assert re.search(reason, done.stderr), done.stderr
    path = tmp_path / "run" / "checkpoint" / "state.pt"  # missing if the first step went wrong
    state = torch.load(path, weights_only=True)["model"] if path.exists() else {}
    assert all(value.isfinite().all() for value in state.values())


def test_the_offending_batch_is_written(supervised, tmp_path):
    """With checkpoints far apart the logging interval finds the step, names the losses and writes
    the batch."""
    more = "--iterations 40 --lr 1e12 --val-interval 40 --log-interval 4"
    done = fork(*supervised, *more.split())
    reason = r"the loss was not finite at step (\d+) \(.*loss/supervised (nan|inf)"
    found = re.search(reason, done.stderr)
    assert done.returncode == 2 and found, done.stderr
    path = tmp_path / "run" / f"nonfinite-step{found[1]}-process0.pt"
    ((image, label, _),) = torch.load(path, weights_only=True)
    assert image.shape == (2, 3, 32, 32) and label.shape == (2, 32, 32)


def test_a_bad_step_before_the_unlabelled_images_join_is_found_in_time(words, tmp_path):
    """The logging interval ends after the warm-up, when the step has more losses."""
    more = "--num-workers 0 --warmup-iterations 6 --log-interval 9 --save-interval 9"
    more += " --val-interval 9 --lr 1e12 --log-with none"
    done = fork(*words, *more.split(), "--out-dir", tmp_path / "run")
    assert done.returncode == 2 and re.fullmatch(
        r"train_semi.py: the loss was not finite at step [1-5] "
        r"\(loss/total (nan|inf), loss/supervised (nan|inf)\);.*",
        done.stderr.splitlines()[-1],
    ), done.stderr


# ---------------------------------------------------------------------------------- the run folder
HOLD = """
import sys, time, pathlib
from engine import checkpoint
checkpoint.hold(pathlib.Path(sys.argv[1]), "a\\n")
print("held", flush=True)
time.sleep(99)
"""


def test_two_runs_do_not_share_a_folder(tmp_path):
    """Two new runs chose the same free folder, or a run is resumed while it still trains (a
    requeued SLURM job): one is refused. The end of a process, even by SIGKILL, frees the folder."""
    folder, taken = tmp_path / "run", "another process trains in this folder"
    command = [sys.executable, "-c", HOLD, folder]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        for names in ("b\n", None):  # a new run, a resumed one
            with pytest.raises(UserError, match=taken):
                checkpoint.hold(folder, names)
        first.kill()
    checkpoint.hold(folder)
    assert (folder / "labeled.txt").read_text() == "a\n"
    with pytest.raises(UserError, match=taken):  # one that began and ended meanwhile
        checkpoint.hold(folder, "b\n")


def test_a_new_run_takes_an_empty_folder_only(supervised, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "labeled.txt").write_text("mine")
    refused = fork(*supervised, "--iterations", "1")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert f"--out-dir {folder}: is not empty" in refused.stderr
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("labeled.txt", "mine")]
    (folder / "labeled.txt").unlink()
    assert fork(*supervised, "--iterations", "1").returncode == 0
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    refused = fork(*supervised, "--iterations", "1", "--out-dir", odd)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "not UTF-8" in refused.stderr and not odd.exists()


def test_the_newest_run_is_the_one_last_written_to(tmp_path):
    for i, (name, age) in enumerate([("x", 5), ("x-3", 9), ("x-2", 7), ("x-y", 0), ("xx", 0)]):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (10**9 - age - i, 10**9 - age - i))
    (tmp_path / "x-4").mkdir()  # without config.json
    assert checkpoint.newest_folder(tmp_path / "x") == tmp_path / "x"
    (tmp_path / "x-2" / "checkpoint" / "state.pt").write_text("")
    assert checkpoint.newest_folder(tmp_path / "x") == tmp_path / "x-2"
    with pytest.raises(UserError, match="there is no run"):
        checkpoint.newest_folder(tmp_path / "z")


def test_lost_and_changed_files_are_reported_and_nothing_is_spoiled(supervised, tmp_path):
    tree, run = trees.folder(tmp_path / "data", size=(32, 40)), tmp_path / "run"
    (tmp_path / "list.txt").write_text("train_001\ntrain_000\n")
    mask = tree / "labels" / "train" / "train_000.png"
    painted = trees.raw(mask)
    trees.save(mask, painted, compress_level=0)  # the file size depends on height and width only
    words = ["--data-path", tree, "--labeled-list", tmp_path / "list.txt"]
    done = fork(*supervised, *words, "--iterations", "4", "--val-interval", "2")
    assert done.returncode == 0, done.stderr
    (tmp_path / "list.txt").unlink()  # the run has its own copy
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
    assert "state.pt: missing checkpoint; restore it" in refused()
    state.write_bytes(whole[:1000])
    assert "state.pt: is damaged" in refused() and "--init-from" in refused()
    torch.save({"step": 2, "best": None, "skipped": 0}, state)
    assert "state.pt: does not fit this network or this version" in refused()
    state.write_bytes(whole)
    for image, part in zip(images, ("validation", "labelled"), strict=True):
        old = image.read_bytes()
        trees.save(image, np.zeros((32, 40, 3), np.uint8))
        assert f"other {part} images would change the result; restore" in refused()
        image.write_bytes(old)
    old = mask.read_bytes()
    trees.save(mask, 2 - painted, compress_level=0)
    assert mask.stat().st_size == len(old) and "other labels would change" in refused()
    mask.write_bytes(old)
    weights.unlink()  # validated again, though lost weights had been better
    content = checkpoint.read_torch(state)
    content["history"][0]["miou"] = content["best"]["miou"] = 0.99
    torch.save(content, state)
    done = resumed()
    assert done.returncode == 0 and "best validation" in done.stdout and weights.exists()
    history = json.loads((run / "history.json").read_text())
    assert [entry["step"] for entry in history] == [2, 4, 4] and history[0]["miou"] == 0.99
    assert checkpoint.best_miou(run) == history[2]["miou"] < 0.99


def test_a_run_killed_before_its_first_checkpoint_starts_again(supervised, tmp_path):
    """At whatever moment, and with whatever interval it is resumed."""
    run = tmp_path / "run"
    assert fork(*supervised, "--iterations", "4", "--val-interval", "2").returncode == 0
    config = json.loads((run / "config.json").read_text())
    assert config.pop("has_checkpoint")
    (run / "config.json").write_text(json.dumps(config))
    (run / "checkpoint" / "state.pt").unlink()
    half = [run / ".config.json.1.part", run / "checkpoint" / ".state.pt.1.part"]
    mine = [run / ".thesis.part", run / "checkpoint" / ".thesis.1.part"]
    for path in half + mine:
        path.write_bytes(b"half")
    done = fork("train_supervised.py", "--out-dir", run, "--resume", "--save-interval", "3")
    assert done.returncode == 0 and "resumes at step 0 of 4" in done.stdout, done.stderr
    assert all(path.exists() for path in mine) and not any(path.exists() for path in half)
    assert json.loads((run / "config.json").read_text())["has_checkpoint"]


# ---------------------------------------------------------------------------- errors of the system
def test_an_error_of_the_system_is_one_line(capsys, monkeypatch):
    def main():  # as raised by TensorBoard's writer
        raise OSError(28, "No space left on device", "runs/events")

    monkeypatch.setattr("sys.argv", ["train_semi.py"])
    monkeypatch.setattr(processes, "_own_errors", True)
    with pytest.raises(SystemExit) as end:
        processes.launch(main)
    line = "train_semi.py: [Errno 28] No space left on device: 'runs/events'\n"
    assert end.value.code == 2 and capsys.readouterr().err == line


def test_a_full_disk_is_one_line_and_leaves_the_last_good_state(supervised, tmp_path):
    folder = tmp_path / "run"
    words = [*supervised, "--channels", "64", "--iterations", "4", "--save-interval", "2"]
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6,) * 2); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
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
    """The processes of both loaders still exist then; none may keep the run from ending."""
    tree = trees.cityscapes(tmp_path / "data", size=(32, 64))
    for image in (tree / "leftImg8bit" / "train").rglob("*.png"):
        image.write_bytes(image.read_bytes()[:300])
    words = f"""train_semi.py --dataset cityscapes --data-path {tree} --recipe street
        --num-workers 1 --iterations 5 --out-dir {tmp_path / "run"}""".split()
    done = run_script(*words, timeout=90)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.count("leftImg8bit.png") == 1 and not (tmp_path / "run").exists()
