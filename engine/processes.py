"""How the processes of a run start, wait for each other and end.

A run has one process per device (a rank) and, for each of its loaders, `--num-workers` processes
that read images. Ranks are started by the user or by a launcher (torchrun, accelerate launch),
loader processes by a fork server that the rank starts (see `start_server`), on Windows and a Mac by
the rank itself. All of them end with what started them, whatever ends it.
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

from tqdm import tqdm

from inputs.errors import UserError

# Seconds that a loader may deliver nothing before the run ends with a line. The environment may say
# otherwise: more for a file system that is known to sleep longer, less for the tests.
LIMIT = float(os.environ.get("RECO_TIMEOUT", 600))
# A collective waits a little longer: the process whose loader is silent shall speak before those
# that wait for it.
COLLECTIVE_LIMIT = timedelta(seconds=1.2 * LIMIT)
GRACE = 10  # seconds that a launcher has to end its ranks, and a rank without launcher to save

# Windows has no fork, and after one the libraries of a Mac may end the process
START_METHOD = "spawn" if sys.platform in ("win32", "darwin") else "forkserver"
# All that `loaders` imports of others: what is missing here every loader process imports itself.
PRELOADED = ["torch.utils.data", "torchvision.transforms.v2.functional", "PIL.Image", "tqdm"]
LAUNCHERS = {"torchrun", "accelerate", "accelerate-launch"}
LAUNCHER_MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate.commands.launch",
}

_own_errors = False  # see speak_for_itself
_launcher = None  # its process id, when the run shall end with it


# ------------------------------------------------------------------------------- loader processes
def start_server() -> None:
    """Start the process that loader processes are forked from; early, since its imports then take
    place beside our own work. A second call does nothing. UserError where it cannot be started.

    They are not forked from the training process, because that one has threads (autograd, gloo, pin
    memory, TensorBoard): a child that is forked while another thread holds one of the interpreter's
    locks waits for that lock for ever (pytorch/pytorch 130610, 138957). In the fork server no
    thread but one enters Python, and that one does nothing but import."""
    if START_METHOD != "forkserver":
        return
    forkserver.set_forkserver_preload(PRELOADED)
    # A process of multiprocessing frees the semaphores of a rank that was killed; in silence.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    atexit.unregister(end_workers)
    atexit.register(end_workers)
    # `timeout` and batch systems send SIGTERM to every process of a job. What follows from it is
    # for the rank to decide, so the server inherits that it is ignored (SIGINT it ignores itself).
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    except OSError as error:  # a path of over 100 characters, a file system without sockets
        raise UserError(
            f"the temporary folder {tempfile.gettempdir()} cannot hold the sockets of the loader "
            f"processes ({error}); set TMPDIR to another one, such as /tmp, or --num-workers 0"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def start_worker(_: int) -> None:
    """In a new loader process: leave signals to the rank, which kills it (`end_workers`), and end
    with the rank however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    # The system calls the fork server our parent, and that one lives as long as we hold its pipe.
    # `join` waits for the rank, on a pipe that it alone holds: also while we are stuck in a read.
    multiprocessing.parent_process().join()
    os._exit(1)


def ignore_ends_of_workers() -> None:
    """Where loader processes are our own children PyTorch would raise an error, wherever we are,
    when one of them ends, also by us; `Loader.take` sees it without that."""
    if START_METHOD == "spawn" and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_workers() -> None:
    """Before the rank ends. Multiprocessing would send SIGTERM and wait, for stuck ones as well."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# ------------------------------------------------------------------------------------------ ranks
def end_with_launcher() -> None:
    """Have Linux end this process when the launcher that started it is gone, even by SIGKILL.

    Does nothing elsewhere, and when the parent is no launcher: a run that a shell started with
    nohup outlives the shell."""
    global _launcher
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    _launcher = parent
    # torchrun lets its ranks save before it ends: when it is gone there is nothing to wait for.
    # `accelerate launch` of one process is gone a moment after Ctrl-C, while the run still saves:
    # that run is asked to stop (see Stop).
    number = signal.SIGKILL if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIGTERM
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), number)


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # gone, or another user's
        return False
    # the program itself, or what an interpreter was told to run
    return any(Path(word).name in LAUNCHERS or word in LAUNCHER_MODULES for word in words[:4])


class Stop:
    """SIGTERM and Ctrl-C ask for a stop at the next step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal and _launcher and os.getppid() != _launcher:
            signal.alarm(GRACE)  # the launcher was killed: save in that time, or SIGALRM ends us
        self.signal = self.signal or number


# ------------------------------------------------------------------------------------ ends of a run
def speak_for_itself() -> None:
    """From now on every process tells its own errors. Until the loaders exist all meet the same
    ones, and the first process of a machine tells them."""
    global _own_errors
    _own_errors = True


def launch(main: Callable[[], None]) -> None:
    """Run a script. What the user can mend, memory that is full, and what ends a run of several
    processes from outside is one line on stderr and exit status 2."""
    end_with_launcher()
    if hasattr(sys.stdout, "reconfigure"):  # a class name that a terminal or a log cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    noise = ".*(lr_scheduler|Detected call of|pin_memory|Grad strides|barrier|broadcast_buffers).*"
    warnings.filterwarnings("ignore", message=noise)
    try:
        code = run_to_end(main)
        end_collectives()  # main is gone, and with it the network
        if code:
            sys.exit(code)
        return
    except (UserError, OSError) as error:  # a full disk reaches us from TensorBoard's writer, too
        if _own_errors or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            tell(last_line(error))
        status = 2
    except Exception as error:
        if line := collective_failure(error) or out_of_memory(error):
            tell(line)
            status = 2
        elif several():
            traceback.print_exc()
            status = 1
        else:
            raise
    except KeyboardInterrupt:
        status = 130
    if several():
        # At once: the others may wait in a collective, until the launcher ends them, and an orderly
        # end could wait for ever itself, since the network is still there (see end_collectives).
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def several() -> bool:
    """Whether this process is one of several of a run."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def run_to_end(main: Callable[[], None]) -> int | str | None:
    """What main exits with; None where it returns."""
    try:
        try:
            main()
        finally:
            end_workers()  # while the loaders stand: they would wait for stuck ones as they go
    except SystemExit as stop:  # when it was asked to stop, or argparse
        return stop.code
    return None


def end_collectives() -> None:
    """Take the process group apart, once nothing else holds it.

    The network that DistributedDataParallel wraps holds it, too. Where that is the last to let go,
    the group waits for the threads of gloo with the interpreter locked, one of them waits for the
    interpreter to free its tensors, and the process never ends (pytorch/pytorch 56297). When the
    group itself is the last, the interpreter is free meanwhile (pytorch/pytorch 154976)."""
    from torch import distributed  # every script has it by now

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # the wrapped network holds itself
        distributed.destroy_process_group()


def tell(line: str) -> None:
    """One line on standard error that stands by itself, below the bar of the first rank."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()
    if int(os.environ.get("RANK", 0)) > 0:
        print(file=sys.stderr)
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def last_line(error: Exception) -> str:
    """The line that says what is wrong. An error from a loader process comes with its traceback,
    whose last line begins with the name of the class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\w+\.)*\w*Error: ", "", lines[-1])


def collective_failure(error: Exception) -> str | None:
    """What to tell of an error in a collective; None for any other error."""
    text = str(error)
    if not several() or not isinstance(error, RuntimeError):
        return None
    go_on = "the last checkpoint is kept, go on with --resume"
    if "connectFullMesh" in text:
        return (
            "the processes of the run could not connect; with several machines, set "
            "GLOO_SOCKET_IFNAME on each to the network interface that reaches the others"
        )
    if re.search(r"timed? ?out", text, re.IGNORECASE):
        limit = COLLECTIVE_LIMIT.total_seconds()
        return (
            f"the other processes of the run did not answer in time (limit {limit:g} s): "
            f"one of them hangs, or its machine or the network is gone; {go_on}"
        )
    if re.search(r"closed by peer|reset by peer|Broken pipe", text):
        # Another process is gone, and its line is the one that counts. Where its launcher is ours
        # that ends us in this time; on another machine nobody else says it here.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE)
        return f"another process of the run has ended, its own output says why; {go_on}"
    return None


def out_of_memory(error: Exception) -> str | None:
    """What to tell where the memory of a GPU, or of the machine, is full; None for any other
    error."""
    text = str(error)
    if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in text:
        return None
    wanted = re.search(r"ried to allocate ([\d.]+ \w+)", text)
    more = f" ({wanted[1]} more were needed)" if wanted else ""
    return (
        f"out of memory{more}: a smaller --batch-size or --crop-size needs less, and so does bf16 "
        "(accelerate launch --mixed_precision bf16); in predict.py a smaller --tile"
    )


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
