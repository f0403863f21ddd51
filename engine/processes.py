"""How the processes of a run start, wait for each other and end.

A run has one process per device (a rank), started by the user or by a launcher (torchrun,
accelerate launch). Each of its loaders has `--num-workers` processes that read images, started by a
fork server of the rank (see `start_server`); on Windows and macOS by the rank itself. A process
ends when the one that started it ends, even by SIGKILL.
"""

import atexit
import ctypes
import gc
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from inputs.errors import UserError, first_line

# Seconds that a loader may deliver nothing before the run ends. RECO_TIMEOUT overrides it: more
# for a slow file system, less for the tests
LIMIT = float(os.environ.get("RECO_TIMEOUT", 600))
# Collectives wait longer, so that the rank whose loader is silent reports it first
COLLECTIVE_LIMIT = timedelta(seconds=1.2 * LIMIT)
GRACE = 10  # seconds a launcher has to end the other ranks after one has failed

# Windows has no fork, and on macOS system libraries may crash after one
START_METHOD = "spawn" if sys.platform in ("win32", "darwin") else "forkserver"
# What engine/loaders.py imports; each loader process imports by itself what is missing here
PRELOADED = ["torch.utils.data", "PIL.Image", "tqdm"]
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]

_own_errors = False  # see speak_for_itself


# ------------------------------------------------------------------------------- loader processes
def start_server() -> None:
    """Start the process that loader processes are forked from. Call it early: it imports packages
    while this process does other work. A second call does nothing. UserError if it cannot start.

    The training process itself is not forked, because it has threads (autograd, gloo, pin memory,
    TensorBoard): a child forked while another thread holds a lock of the interpreter waits for that
    lock forever (pytorch/pytorch 130610, 138957). The server has one thread, which only imports."""
    if START_METHOD != "forkserver":
        return
    forkserver.set_forkserver_preload(PRELOADED)
    # no warning when the resource tracker frees the semaphores of a killed rank
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    atexit.unregister(end_workers)
    atexit.register(end_workers)
    # `timeout`, batch systems and terminals signal all processes of a job, but only the rank acts
    # on it. The server inherits that these signals are ignored
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        forkserver.ensure_running()
    except OSError as error:  # a path of over 100 characters, a file system without sockets
        raise UserError(
            f"the temporary folder {tempfile.gettempdir()} cannot hold the sockets of the loader "
            f"processes ({error}); set TMPDIR to another one, such as /tmp, or --num-workers 0"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_worker(_: int) -> None:
    """Runs first in each loader process: ignore signals, since the rank kills its loader processes
    (`end_workers`), and end when the rank ends, for whatever reason."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    # To the system the fork server is our parent, and it lives while we hold its pipe. `join` waits
    # for the rank, on a pipe that only the rank holds; this works even while a read is stuck
    multiprocessing.parent_process().join()
    os._exit(1)


def ignore_ends_of_workers() -> None:
    """Remove PyTorch's SIGCHLD handler: if loader processes are our own children, it raises an
    error anywhere when one ends, even if we end it. `Loader.take` notices without it."""
    if START_METHOD == "spawn" and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_workers() -> None:
    """Kill the loader processes; multiprocessing would send SIGTERM and wait for stuck ones."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# ------------------------------------------------------------------------------------------ ranks
def end_with_launcher() -> None:
    """On Linux, end this process when its launcher ends, even by SIGKILL. Without a launcher
    nothing changes: a run started with nohup outlives its shell."""
    if sys.platform != "linux":
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends after its ranks, unless it is killed
        number = signal.SIGKILL
    elif "ACCELERATE_DYNAMO_MODE" in os.environ:  # accelerate launch of one process
        number = signal.SIGTERM  # it ends at Ctrl-C while the rank still saves
    else:
        return
    parent, PR_SET_PDEATHSIG = os.getppid(), 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), number)


class Stop:
    """SIGTERM, Ctrl-C and SIGHUP (unless it is ignored, as under nohup) ask for a stop at the next
    step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal = 0
        for number in STOP_SIGNALS:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number == getattr(signal, "SIGHUP", None)):
                signal.signal(number, self.ask)

    def ask(self, number, frame) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


class Output:
    """Standard output or standard error, which may be closed (`>&-`) or lose its reader (`| tee`
    that ended, a closed terminal). Then the text is dropped, and a run that has begun its steps
    stops as by SIGTERM. Characters that the encoding lacks are written as \\x.."""

    def __init__(self, stream: "TextIO | Output | None"):
        self.stream = stream.stream if isinstance(stream, Output) else stream
        if self.stream is None:
            self.stream = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        report(f"the output cannot be written ({error.strerror})")
        if _own_errors and callable(signal.getsignal(signal.SIGTERM)):  # there is a state to save
            signal.raise_signal(signal.SIGTERM)


# ------------------------------------------------------------------------------------ ends of a run
def speak_for_itself() -> None:
    """From now on each rank reports its own errors. Before the loaders exist all ranks meet the
    same ones, and only the first rank of a machine reports them."""
    global _own_errors
    _own_errors = True


def launch(main: Callable[[], None]) -> None:
    """Run a script. Errors that users can fix, full memory, a failed torch.compile and ranks that
    lost each other are one line on standard error and exit status 2."""
    end_with_launcher()
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    noise = ".*(lr_scheduler|Detected call of|pin_memory|Grad strides|barrier|broadcast_buffers).*"
    warnings.filterwarnings("ignore", message=noise)
    try:
        code = run_to_end(main)
        end_collectives()  # main has returned, so the network is freed
        if code:
            sys.exit(code)
        return
    except (UserError, OSError) as error:  # TensorBoard's writer raises OSError on a full disk
        if _own_errors or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            report(last_line(error))
        status = 2
    except Exception as error:
        if line := explain(error):
            report(line)
            status = 2
        elif several():
            traceback.print_exc()
            status = 1
        else:
            raise
    except KeyboardInterrupt:
        status = 130
    if several():
        # End at once: other ranks may wait in a collective until the launcher ends them, and an
        # orderly end could wait forever, since the network still exists (see end_collectives)
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def several() -> bool:
    """Whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def run_to_end(main: Callable[[], None]) -> int | str | None:
    """What main exits with; None where it returns."""
    try:
        try:
            main()
        finally:
            end_workers()  # before the loaders are freed: they would wait for stuck ones
    except SystemExit as stop:  # a requested stop, or argparse
        return stop.code
    return None


def end_collectives() -> None:
    """Destroy the process group after everything else that refers to it.

    The network in DistributedDataParallel refers to it, too. If the network is freed last, the
    group waits for gloo's threads while it holds the interpreter's lock, one of them waits for that
    lock to free its tensors, and the process never ends (pytorch/pytorch 56297). `destroy` itself
    releases the lock while it waits (pytorch/pytorch 154976)."""
    from torch import distributed  # every script has imported it by now

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # the wrapped network is part of a reference cycle
        distributed.destroy_process_group()


def report(line: str) -> None:
    """Print one line on standard error, below the progress bar."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()
    if int(os.environ.get("RANK", 0)) > 0:  # the first rank's bar may be on this line
        print(file=sys.stderr)
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def last_line(error: Exception) -> str:
    """The last line of an error. That of a loader process is a traceback, whose last line begins
    with the name of the class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\w+\.)*\w*Error: ", "", lines[-1])


def explain(error: Exception) -> str | None:
    """One line for an error of the machine or of the launch; None for any other error."""
    text = str(error)
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", text):
        wanted = re.search(r"ried to allocate ([\d.]+ \w+)", text)
        more = f" ({wanted[1]} more were needed)" if wanted else ""
        return (
            f"out of memory{more}: a smaller --batch-size or --crop-size needs less, and so does "
            "bf16 (accelerate launch --mixed_precision bf16); in predict.py a smaller --tile"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({first_line(error)}); train without --compile"
    lost = r"gloo|nccl|timed? ?out|closed by peer|reset by peer|broken pipe"
    if several() and isinstance(error, RuntimeError) and re.search(lost, text, re.IGNORECASE):
        # Usually another rank has failed and has reported it, and the launcher ends us during this
        # sleep. On another machine, or without a launcher, nobody else reports it here
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE)
        return (
            "lost the other processes of the run: one has ended (see its output), hangs, or cannot "
            "be reached (with several machines set GLOO_SOCKET_IFNAME on each to the interface "
            f"that reaches the others); resume with --resume ({first_line(error)})"
        )
    return None


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
