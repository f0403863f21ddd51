"""However the processes of a run start, wait and end: none hangs, none is left."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import trees
from cli import ENVIRONMENT, ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO_RANKS = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@pytest.fixture
def data(tmp_path):
    return trees.folder(tmp_path / "data", size=(32, 40))


def small(script: str, data: Path, folder: Path) -> list[str]:
    """A run of a tiny network, two loader processes for each loader, a validation at every step."""
    return f"""{script} --dataset folder --data-path {data} --recipe street --crop-size 32
        --batch-size 2 --channels 8 --low-channels 8 --rep-dim 8 --log-with none --num-workers 2
        --val-interval 1 --save-interval 1 --iterations 2000 --out-dir {folder}""".split()


class Run:
    """A command line in a session of its own, and every process that it leads to."""

    def __init__(self, *command, launcher=(sys.executable,), inside=(), **environment):
        self.mark = f"RECO_TEST={uuid.uuid4()}"
        marked = dict([self.mark.split("=")], **environment)
        self.process = subprocess.Popen(
            [*inside, *launcher, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **marked},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def alive(self, *words: str) -> list[int]:
        """Its processes; those whose environment or command line contains all the words."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                text = (folder / "environ").read_bytes() + b"\0" + (folder / "cmdline").read_bytes()
            except OSError:  # just gone
                continue
            if all(word.encode() in text.split(b"\0") for word in (self.mark, *words)):
                found.append(int(folder.name))
        return found

    def until(self, condition, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.05)

    def validates(self, folder: Path) -> None:
        """Wait until it is in its steps."""
        self.until(lambda: (folder / "history.json").exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.told()

    def told(self) -> str:
        self.process.kill()
        return "\n".join(self.process.communicate())

    def ends(self, seconds: float = 60) -> tuple[int, list[str]]:
        """Exit status and what the script itself said on standard error."""
        _, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, [line for line in err.splitlines() if ".py: " in line]


# ------------------------------------------------------------------------------------ no deadlock
THREADS = """
import ctypes, os, sys, threading

words = sys.orig_argv[1:4]
if "-m" not in words and any(os.path.basename(word) == "train_supervised.py" for word in words):
    libc = ctypes.CDLL(None)
    enter_python = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: None)

    def keep_starting():
        threads = (ctypes.c_ulong * 8)()
        while True:
            for i in range(8):
                place = ctypes.byref(threads, i * ctypes.sizeof(ctypes.c_ulong))
                libc.pthread_create(place, None, enter_python, None)
            for thread in threads:
                libc.pthread_join(ctypes.c_ulong(thread), None)

    for _ in range(3):
        threading.Thread(target=keep_starting, daemon=True).start()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_native_threads_that_enter_python_stop_no_loader(ranks, data, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(THREADS)
    words = [*small("train_supervised.py", data, tmp_path / "run"), "--iterations", "30"]
    launcher = [sys.executable] if ranks == 1 else TWO_RANKS
    with Run(*words, launcher=launcher, PYTHONPATH=str(tmp_path)) as run:
        out, err = run.process.communicate(timeout=120)
        assert run.process.returncode == 0, err[-3000:]
    assert out.count(": validation mIoU") == 30 and f"cpu x {ranks}" in out


# ------------------------------------------------------------------------------ none is left behind
@pytest.mark.parametrize(
    "launcher, whole_group",
    [([sys.executable], False), ([sys.executable], True), (TWO_RANKS, False), (ACCELERATE, False)],
    ids=["main", "its group", "torchrun", "accelerate launch"],
)
def test_nothing_is_left_after_a_kill(launcher, whole_group, data, tmp_path):
    words = small("train_supervised.py", data, tmp_path / "run")
    with Run(*words, launcher=launcher) as run:
        run.validates(tmp_path / "run")
        assert len(run.alive()) >= 6  # it, a fork server, and two processes for each of two loaders
        (os.killpg if whole_group else os.kill)(run.process.pid, signal.SIGKILL)
        run.process.wait()
        run.until(lambda: not run.alive(), seconds=12)


def test_a_run_outlives_the_shell_that_started_it(data, tmp_path):
    words = [*small("train_supervised.py", data, tmp_path / "run"), "--iterations", "3"]
    shell = ["sh", "-c", '"$@" & sleep 1', "sh"]
    with Run(*words, inside=shell) as run:
        run.process.wait()
        assert run.alive()
        run.until(lambda: not run.alive())
    assert (tmp_path / "run" / "history.json").read_text().count('"step"') == 3


# --------------------------------------------------------------------------------- silence is told
def test_a_rank_that_stands_still_ends_the_run(data, tmp_path):
    words = small("train_supervised.py", data, tmp_path / "run")
    environment = dict(RECO_TIMEOUT="5", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    with Run(*words, launcher=TWO_RANKS, **environment) as run:
        run.validates(tmp_path / "run")
        (second,) = run.alive("RANK=1", "--data-path", "-u")
        os.kill(second, signal.SIGSTOP)
        status, lines = run.ends()
        assert status != 0
        assert len(lines) == 1 and "waited 6 s in vain for the other processes" in lines[0], lines
        run.until(lambda: not run.alive(), seconds=12)
