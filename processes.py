"""How the processes of a run start, wait for each other and end.

A run has one process per device (a rank) and, for each of its loaders, `--num-workers` processes that read images. Ranks
are started by the user or by a launcher (torchrun, accelerate launch), loader processes by a fork server that the rank starts
(see `start_server`). All of them end with what started them, whatever ends it.
"""

import ctypes
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

from tqdm import tqdm

from data import UserError

# Seconds that a loader may deliver nothing before the run ends with a line. The environment may say otherwise: more for
# a file system that is known to sleep longer, less for the tests.
LIMIT = float(os.environ.get("RECO_TIMEOUT", 600))
# A collective waits a little longer: the process whose loader is silent shall speak before those that wait for it.
COLLECTIVE_LIMIT = timedelta(seconds=1.2 * LIMIT)
GRACE = 10  # seconds that a run whose launcher is gone has to save
START_METHOD = "forkserver" if hasattr(os, "fork") else "spawn"  # Windows has no fork
PRELOADED = ["torch", "torch.utils.data", "numpy", "PIL.Image", "tqdm"]

_own_errors = False
_launcher = None  # its process id, when the run shall end with it


# ------------------------------------------------------------------------------------------------------ loader processes
def start_server() -> None:
    """Start the process that loader processes are forked from; early, since its imports then take place beside our own work.

    They are not forked from the training process, because that one has threads (autograd, gloo, pin memory, TensorBoard): a
    child that is forked while another thread holds one of the interpreter's locks waits for that lock for ever
    (pytorch/pytorch 130610, 138957). The fork server has one thread and nothing but the imports."""
    if START_METHOD != "forkserver":
        return
    forkserver.set_forkserver_preload(PRELOADED)
    # `timeout` and batch systems send SIGTERM to every process of a job. What follows from it is for the rank to decide.
    # The server inherits that it ignores it (SIGINT it ignores by itself).
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


def start_worker(_: int) -> None:
    """In a new loader process: leave signals to the rank, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    # The parent in the sense of the system is the fork server, which lives as long as a loader process holds its pipe. This
    # waits for the rank, on a pipe that it alone holds, also while the loader process is stuck in reading a file.
    multiprocessing.parent_process().join()
    os._exit(1)


# ----------------------------------------------------------------------------------------------------------------- ranks
def end_with_launcher() -> None:
    """Have Linux end this process when the launcher that started it is gone, even by SIGKILL. Does nothing elsewhere, and
    when the parent is no launcher: a run that a shell started with nohup outlives the shell."""
    global _launcher
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    _launcher = parent
    # torchrun lets its ranks save before it ends, so when it is gone there is nothing to wait for. `accelerate launch` with
    # one process is gone a moment after Ctrl-C, while the run still saves: that one is asked to stop (see Stop).
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
    launchers = {"torchrun", "accelerate", "accelerate-launch"}
    modules = {"torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"}
    # the program, or what an interpreter was told to run
    return any(Path(word).name in launchers or word in modules for word in words[:4])


class Stop:
    """SIGTERM and Ctrl-C ask for a stop at the next step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        if _launcher and os.getppid() != _launcher and not self.signal:
            signal.alarm(GRACE)  # the launcher was killed; its default action ends us
        self.signal = self.signal or number


# ------------------------------------------------------------------------------------------------------------ beginning, end
def speak_for_itself() -> None:
    """From now on every process tells its own errors. Until the loaders exist all meet the same ones, and the first tells them."""
    global _own_errors
    _own_errors = True


def launch(main) -> None:
    """Run a script; what the user can mend is one line on stderr and exit status 2."""
    end_with_launcher()
    warnings.filterwarnings(
        "ignore", message=".*(lr_scheduler|Detected call of|pin_memory|Grad strides|barrier).*"
    )
    try:
        main()
        return
    except (UserError, OSError) as error:  # a full disk reaches us from TensorBoard's writer, too
        tell(last_line(error), _own_errors or int(os.environ.get("LOCAL_RANK", 0)) == 0)
        status = 2
    except RuntimeError as error:
        if not (line := collective_failure(error)):
            raise
        tell(line)
        status = 2
    except KeyboardInterrupt:
        status = 130
    finally:
        for child in multiprocessing.active_children():  # loader processes, stuck ones as well
            child.kill()
    gc.collect()  # the error held the loaders' queues in a cycle; freed now, they leave nothing for their tracker to complain of
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)  # the others may wait in a collective; the launcher ends them
    sys.exit(status)


def tell(line: str, aloud: bool = True) -> None:
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()  # the line stands by itself
    if aloud:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def last_line(error: Exception) -> str:
    """Of an error's text; one from a loader process comes with its traceback, whose last line begins with the class."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return re.sub(r"^([A-Za-z_]+\.)*[A-Za-z_]*Error: ", "", line)


def collective_failure(error: RuntimeError) -> str | None:
    """What to tell of an error in a collective, None for any other error. When another process is gone this waits first:
    its launcher ends all, and the line that counts is that of the process that failed."""
    text = str(error)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if re.search(r"[Tt]imed out|[Tt]imeout|TIMEOUT", text):
        return (
            f"waited {COLLECTIVE_LIMIT.total_seconds():g} s in vain for the other processes of the run (one hangs, or a "
            "machine or the network between them is gone); the last checkpoint is kept, go on with --resume"
        )
    if re.search(r"closed by peer|reset by peer|Broken pipe|Connection refused", text):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE)
        return (
            "another process of the run has ended (its own output says why); the last checkpoint is kept, go on with "
            "--resume"
        )
    return None
