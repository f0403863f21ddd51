"""Runs that a test watches and kills, with every process that a command line starts."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from cli import ENVIRONMENT, ROOT, launcher

TWO_RANKS = launcher(2)
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def small(script: str, data: Path, folder: Path) -> list[str]:
    """A run of a tiny network, two processes per loader, a validation at every step."""
    return f"""{script} --dataset folder --data-path {data} --recipe street --crop-size 32
        --batch-size 2 --channels 8 --log-with none --num-workers 2
        --val-interval 1 --save-interval 1 --iterations 2000 --out-dir {folder}""".split()


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # just gone
        return b""


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().split()[3])
    except OSError:
        return None


class Run:
    """A command line in a session of its own, and every process that it starts."""

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

    def workers(self) -> list[int]:
        """Its loader processes: children of a fork server, which have its command line."""
        servers = [pid for pid in self.alive() if b"forkserver" in command_line(pid)]
        return [pid for pid in servers if parent(pid) in servers]

    def until(self, condition, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def validates(self, folder: Path) -> None:
        """Wait for the first validation."""
        self.until(lambda: (folder / "history.json").exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.output()

    def output(self) -> str:
        self.process.kill()
        return "\n".join(self.process.communicate())

    def ends(self, seconds: float = 120) -> tuple[int, list[str]]:
        """Exit status, and the lines of the script itself on standard error."""
        _, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, [line for line in err.splitlines() if ".py: " in line]
