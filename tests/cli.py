"""Run a script of the repository as a user does."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--backbone", "test_resnet", "--no-pretrained", "--channels", "16", "--low-channels", "8", "--rep-dim", "8", "--crop-size", "48", "--num-workers", "0"]


def run_script(*command, processes: int = 1, timeout: float = 300, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    """`python SCRIPT ...`, or under torchrun with several gloo processes on the CPU."""
    command = [str(part) for part in command]
    command[0] = str(ROOT / command[0])
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([*launcher, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def check(*command, **options) -> str:
    """Its standard output; the run must succeed."""
    done = run_script(*command, **options)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_many(commands: list, cwd=ROOT, **environment) -> list:
    """[status, stdout, stderr] of each command line; the libraries are imported once for all (many.py)."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    commands = [[str(word) for word in command] for command in commands]
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "many.py")], input=json.dumps(commands), capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
