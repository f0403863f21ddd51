"""However the processes of a run end: none hangs, none survives, the state is saved."""

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
from cli import ENVIRONMENT, ROOT, SMALL, fork, run_script
from engine import processes
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


def test_native_threads_that_enter_python_stop_no_loader(data, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(THREADS)
    words = [*small("train_supervised.py", data, tmp_path / "run"), "--iterations", "30"]
    with Run(*words, launcher=TWO_RANKS, PYTHONPATH=str(tmp_path)) as run:
        out, err = run.process.communicate(timeout=240)
        assert run.process.returncode == 0, err[-3000:]
    assert out.count(": validation mIoU") == 30 and "cpu x 2" in out


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


def test_a_run_under_nohup_outlives_its_shell_and_terminal_but_not_its_group(data, tmp_path):
    words, history = small("train_supervised.py", data, tmp_path / "run"), tmp_path / "run"
    history = tmp_path / "run" / "history.json"
    with Run(*words, inside=["sh", "-c", 'nohup "$@" & exit', "sh"]) as run:
        assert run.process.wait() == 0
        run.until(history.exists)
        os.killpg(run.process.pid, signal.SIGHUP)
        validations = history.read_text().count("confusion")
        run.until(lambda: history.read_text().count("confusion") > validations + 1)
        assert len(run.workers()) == 4
        os.killpg(run.process.pid, signal.SIGKILL)
        run.until(lambda: not run.alive(), seconds=20)


# --------------------------------------------------------------------------------------- silence
def test_a_rank_that_stops_responding_ends_the_run(data, tmp_path):
    """Two ranks without a launcher, as a batch system starts them: nothing else ends them."""
    words = small("train_supervised.py", data, tmp_path / "run")
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])

    def rank(number: int) -> Run:
        ranks = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RECO_TIMEOUT="8")
        return Run(*words, **address, **{key: str(value) for key, value in ranks.items()})

    with rank(0) as first, rank(1) as second:
        first.validates(tmp_path / "run")
        os.kill(second.process.pid, signal.SIGSTOP)
        for run in (first, second):
            status, lines = run.ends()
            assert status == 2 and len(lines) == 1, lines
            assert "lost the other processes of the run" in lines[0] and "--resume" in lines[0]
            if run is first:
                os.kill(second.process.pid, signal.SIGCONT)
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


def test_errors_of_the_machine_are_one_line(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0)
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3")
    assert processes.explain(gone) is None  # not in a run of several processes
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert "lost the other processes of the run" in processes.explain(gone)
        late = RuntimeError("Timed out waiting 6000ms for recv operation to complete")
        assert "Timed out waiting 6000ms" in processes.explain(late)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert processes.explain(RuntimeError("shapes differ")) is None
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert processes.explain(full).startswith(
        "out of memory (2.00 GiB more were needed): a smaller"
    )
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert "4000000000000000 bytes more" in processes.explain(error.value)


def test_compile_without_a_compiler_is_one_line(data, tmp_path):
    words = ["--dataset", "folder", "--data-path", data, *SMALL, "--batch-size", "2", "--compile"]
    environment = dict(CXX="/nonexistent/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = run_script("train_supervised.py", *words, "--out-dir", tmp_path / "run", **environment)
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and "torch.compile failed (InvalidCxxCompiler: No working" in line


# ---------------------------------------------------------------------------------- launch settings
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not installed"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron is not installed"),
        ({"ACCELERATE_DYNAMO_BACKEND": "bogus"}, "BOGUS"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "maybe"),
    ],
)
def test_settings_that_cannot_work_are_one_line(settings, reason, tmp_path):
    done = fork("train_supervised.py", "--out-dir", tmp_path / "run", **settings)
    assert done.returncode == 2 and reason in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_processes_that_accelerate_does_not_join_are_refused(tmp_path):
    """For GPUs on a machine without one: each would be a run of its own, in one folder."""
    words = ["train_supervised.py", "--out-dir", tmp_path / "run"]
    done = run_script(*words, processes=2, ACCELERATE_USE_CPU="0")
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("train_supervised.py: ")]
    assert "2 processes were launched, but Accelerate sees 1: without GPUs set ACCELERATE" in line
    assert done.returncode and not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------- the output
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", ""])
def test_closed_and_ascii_outputs_end_no_run(closed, data, tmp_path):
    (data / "classes.txt").write_text("Stra\u00dfe\nb\nc\n", "utf-8")
    words = ["--dataset", "folder", "--data-path", data, *SMALL, "--batch-size", "2"]
    words += ["--iterations", "1", "--log-with", "none", "--out-dir", tmp_path / "run"]
    done = subprocess.run(
        [
            "sh",
            "-c",
            f'"$@" {closed}',
            "sh",
            sys.executable,
            "train_supervised.py",
            *map(str, words),
        ],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert ("Stra\\xdfe" in done.stdout) == (not closed)


def test_a_run_whose_reader_is_gone_saves_and_stops(data, tmp_path):
    """`| tee log`, and tee is killed."""
    with Run(*small("train_supervised.py", data, tmp_path / "run")) as run:
        while ": validation mIoU" not in run.process.stdout.readline():
            pass
        run.process.stdout.close()
        status, lines = run.ends()
    assert status == 128 + signal.SIGTERM and len(lines) == 1
    assert lines[0].endswith("the output cannot be written (Broken pipe)")
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] >= 2


# ------------------------------------------------------------------------------------ in what order
class Network:
    """Records when it is freed."""

    def __init__(self, order):
        self.order = order

    def __del__(self):
        self.order.append("network")


@pytest.mark.parametrize("code", [None, 143])
def test_the_process_group_goes_last(code, monkeypatch):
    """After the network, which holds it; and a stop does not wait for stuck loaders."""
    order = []
    monkeypatch.setattr(processes, "end_workers", lambda: order.append("workers"))
    monkeypatch.setattr(processes, "end_collectives", lambda: order.append("group"))

    def main():
        network = Network(order)
        if code:
            sys.exit(code)
        del network

    with pytest.raises(SystemExit) if code else nullcontext() as stop:
        processes.launch(main)
    assert order == (["workers", "network", "group"] if code else ["network", "workers", "group"])
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
class TwoNodes:
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

    def node(rank: int, network: TwoNodes) -> Run:  # as README has it, on CPUs
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

    with TwoNodes() as network, node(0, network) as first, node(1, network) as second:
        out, err = first.process.communicate(timeout=120)
        assert first.process.returncode == 0, err[-3000:]
        assert second.process.wait(timeout=60) == 0
    assert "cpu x 2" in out and out.count(": validation mIoU") == 3
    # the first node writes, the other one does not
    assert (tmp_path / "node0" / "model.safetensors").exists()
    assert not (tmp_path / "node1").exists()
