"""Run a script of the repository as a user does."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--backbone", "test_resnet", "--no-pretrained", "--channels", "16"]
SMALL += ["--crop-size", "48", "--num-workers", "0"]
# on one machine that need not know its own name (containers without a network)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--local-addr", "127.0.0.1", "--nproc_per_node"]
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def launcher(processes: int) -> list[str]:
    """The words before a script: python, or torchrun with several processes."""
    return [sys.executable] if processes == 1 else [*TORCHRUN, str(processes)]


def run_script(
    *command, processes: int = 1, timeout: float = 300, cwd=ROOT, **environment
) -> subprocess.CompletedProcess:
    """`python SCRIPT ...`, or under torchrun with several gloo processes on the CPU."""
    command = [str(part) for part in command]
    command[0] = str(ROOT / command[0])
    return subprocess.run(
        [*launcher(processes), *command],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@functools.cache
def forks() -> subprocess.Popen:
    # no pretrained weights, on any machine; the variable is read on import
    weights = tempfile.TemporaryDirectory()
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "many.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT, "HF_HOME": weights.name},
    )
    atexit.register(weights.cleanup)
    atexit.register(server.kill)
    return server


def run_many(commands: list, cwd=ROOT, **environment) -> list:
    """[status, stdout, stderr] of each command line. The libraries are imported once for all
    (many.py), which saves several seconds each."""
    task = {
        "commands": [[str(word) for word in command] for command in commands],
        "cwd": str(cwd),
        "environment": {**os.environ, **ENVIRONMENT, **environment},
    }
    server = forks()
    server.stdin.write(json.dumps(task) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        forks.cache_clear()
        raise RuntimeError(f"many.py ended with status {server.wait()}")
    return json.loads(answer)


def fork(*command, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    """What `run_script` returns, by `run_many`."""
    return subprocess.CompletedProcess(command, *run_many([command], cwd, **environment)[0])


def check(*command, processes: int = 1, **options) -> str:
    """Its standard output; the run must succeed."""
    done = (
        fork(*command, **options)
        if processes == 1
        else run_script(*command, processes=processes, **options)
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
