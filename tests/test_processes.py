"""However the processes of a run start, wait and end: none hangs, none is left."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import trees
from cli import ROOT
from engine import processes
from engine.processes import collective_failure
from runs import ACCELERATE, TWO_RANKS, Run, parent, small

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@pytest.fixture
def data(tmp_path):
    return trees.folder(tmp_path / "data", size=(32, 40))


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
        out, err = run.process.communicate(timeout=240)
        assert run.process.returncode == 0, err[-3000:]
    assert out.count(": validation mIoU") == 30 and f"cpu x {ranks}" in out


# ------------------------------------------------------------------------------ none is left behind
@pytest.mark.parametrize(
    "launcher",
    [[sys.executable], TWO_RANKS, [*ACCELERATE, "--num_processes", "1"]],
    ids=["main", "torchrun", "accelerate launch"],
)
def test_nothing_is_left_after_a_kill(launcher, data, tmp_path):
    words = small("train_supervised.py", data, tmp_path / "run")
    with Run(*words, launcher=launcher) as run:
        run.validates(tmp_path / "run")
        ranks = 2 if launcher == TWO_RANKS else 1
        assert len(run.workers()) == 4 * ranks  # two for each of two loaders
        for server in {parent(pid) for pid in run.workers()}:  # forked where there are no threads
            assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        run.until(lambda: not run.alive(), seconds=20)


def test_a_run_outlives_its_shell_but_not_its_group(data, tmp_path):
    words = small("train_supervised.py", data, tmp_path / "run")
    shell = ["sh", "-c", '"$@" & exit', "sh"]  # as `nohup ... &` and a logout
    with Run(*words, inside=shell) as run:
        assert run.process.wait() == 0
        run.until(lambda: (tmp_path / "run" / "history.json").exists())
        assert len(run.workers()) == 4
        os.killpg(run.process.pid, signal.SIGKILL)
        run.until(lambda: not run.alive(), seconds=20)


# --------------------------------------------------------------------------------- silence is told
def test_a_rank_that_stands_still_ends_the_run(data, tmp_path):
    """Two ranks without a launcher, as a batch system starts them: nobody else ends them."""
    words = small("train_supervised.py", data, tmp_path / "run")
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])

    def rank(number: int) -> Run:
        place = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RECO_TIMEOUT="8")
        return Run(*words, **address, **{key: str(value) for key, value in place.items()})

    with rank(0) as first, rank(1) as second:
        first.validates(tmp_path / "run")
        os.kill(second.process.pid, signal.SIGSTOP)
        status, lines = first.ends()
        assert status == 2 and len(lines) == 1, lines
        assert "did not answer in time (limit 9.6 s)" in lines[0]
        os.kill(second.process.pid, signal.SIGCONT)
        status, lines = second.ends()
        assert status == 2 and len(lines) == 1, lines
        # its own wait had lasted as long when it went on, or it finds the connection closed
        ended, late = "another process of the run has ended", "did not answer in time"
        assert ended in lines[0] or late in lines[0]
        second.until(lambda: not first.alive() + second.alive(), seconds=20)


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    stop = processes.Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        stop.ask(number, None)
    assert stop.signal == signal.SIGINT  # the first one counts
    with pytest.raises(SystemExit) as end:
        processes.launch(lambda: stop.ask(signal.SIGINT, None))
    assert end.value.code == 130


def test_errors_in_collectives_are_told_apart(monkeypatch):
    monkeypatch.setattr("processes.GRACE", 0)
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3")
    unmet = RuntimeError("Gloo connectFullMesh failed with [...] timed out connecting: SO_ERROR")
    late = RuntimeError("Timed out waiting 6000ms for recv operation to complete")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert "another process of the run has ended" in collective_failure(gone)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "GLOO_SOCKET_IFNAME" in collective_failure(unmet)
    assert "did not answer in time" in collective_failure(late)
    assert collective_failure(RuntimeError("shapes differ")) is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert collective_failure(late) is None


def test_memory_that_is_full_is_one_line(capsys):
    def on_a_gpu():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
        )

    for main, wanted in (
        (on_a_gpu, "2.00 GiB"),
        (lambda: torch.empty(10**15), "4000000000000000 bytes"),
    ):
        with pytest.raises(SystemExit) as end:
            processes.launch(main)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"out of memory ({wanted} more were needed): a smaller --batch-size" in line
    with pytest.raises(RuntimeError, match="must match the size"):  # any other error is shown whole
        processes.launch(lambda: torch.empty(2) + torch.empty(3))


def test_a_name_that_the_output_cannot_show_ends_no_run():
    done = subprocess.run(
        [sys.executable, "-c", "import processes; processes.launch(lambda: print('caf\u00e9'))"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},  # as of a log on Windows
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "caf\\xe9\n"), done.stderr


# ------------------------------------------------------------------------------------ in what order
class Held:
    """Tells when it goes."""

    def __init__(self, told):
        self.told = told

    def __del__(self):
        self.told.append("network")


@pytest.mark.parametrize("code", [None, 143])
def test_the_process_group_goes_last(code, monkeypatch):
    """After the network, which holds it; and a stop does not wait for loaders that are stuck."""
    told = []
    monkeypatch.setattr(processes, "end_workers", lambda: told.append("workers"))
    monkeypatch.setattr(processes, "end_collectives", lambda: told.append("group"))

    def main():
        network = Held(told)
        if code:
            sys.exit(code)
        del network

    with pytest.raises(SystemExit) if code else nullcontext() as stop:
        processes.launch(main)
    assert told == (["workers", "network", "group"] if code else ["network", "workers", "group"])
    assert not code or stop.value.code == code


def test_an_unexpected_error_of_one_of_several_processes_ends_it():
    program = """
from engine import processes

def main():
    print("started")
    raise LookupError("nobody thought of it")

processes.launch(main)
"""
    for number in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "WORLD_SIZE": number},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and done.stdout == "started\n"
        assert done.stderr.count("LookupError: nobody thought of it") == 1


# --------------------------------------------------------------------------------------- two nodes
class Network:
    """Two network namespaces joined by a cable; each has an interface and an address."""

    def __init__(self):
        tag = uuid.uuid4().hex[:6]
        self.names = [f"reco{tag}{end}" for end in "ab"]
        self.interfaces = [f"v{tag}{end}" for end in "ab"]
        self.address = "10.77.0.1"

    def __enter__(self):
        (a, b), (to_b, to_a) = self.names, self.interfaces
        try:
            self.ip(f"netns add {a}")
            self.ip(f"netns add {b}")
            self.ip(f"link add {to_b} netns {a} type veth peer name {to_a} netns {b}")
            for number, (name, cable) in enumerate(
                zip(self.names, self.interfaces, strict=True), 1
            ):
                self.ip(f"-n {name} addr add 10.77.0.{number}/24 dev {cable}")
                self.ip(f"-n {name} link set lo up")
                self.ip(f"-n {name} link set {cable} up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def ip(self, words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


def test_two_nodes(data, tmp_path):
    if not shutil.which("ip"):
        pytest.skip("no network namespaces here: iproute2 is not installed")
    port = "29511"

    def node(rank: int, network: Network) -> Run:  # as README has it, on CPUs
        launcher = [*ACCELERATE, "--config_file", "accelerate_config.yaml", "--num_machines", "2"]
        launcher += ["--num_processes", "2", "--machine_rank", str(rank)]
        launcher += ["--main_process_ip", network.address, "--main_process_port", port]
        words = small("train_supervised.py", data, tmp_path / f"node{rank}")
        return Run(
            *words,
            *("--iterations", "3"),
            launcher=launcher,
            inside=["ip", "netns", "exec", network.names[rank]],
            GLOO_SOCKET_IFNAME=network.interfaces[rank],
        )

    with Network() as network, node(0, network) as first, node(1, network) as second:
        out, err = first.process.communicate(timeout=120)
        assert first.process.returncode == 0, err[-3000:]
        assert second.process.wait(timeout=60) == 0
    assert "cpu x 2" in out and out.count(": validation mIoU") == 3
    # the first node writes, the other one does not
    assert (tmp_path / "node0" / "model.safetensors").exists()
    assert not (tmp_path / "node1").exists()
