"""A run's folder: its name, config.json, the weights to use and the state to resume from.

Everything is written atomically: a killed run always finds a whole file, the old or the new one.
labeled.txt alone is written in place, before config.json, without which a folder holds no run.
"""

import argparse
import errno
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from inputs.errors import UserError, first_line, need
from inputs.files import write, write_json

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

held = {}  # labeled.txt of the runs of this process, open and so locked until it ends: path -> file


# -------------------------------------------------------------------------------- which folder
def default_folder(args: argparse.Namespace) -> Path:
    """runs/<dataset>-<method>-<labels>-seed<seed>"""
    labels = args.label_ratio or args.num_labeled or "all"
    if args.labeled_list:  # published splits lie in splits/92/labeled.txt, splits/183/labeled.txt
        file = Path(args.labeled_list)
        labels = file.parent.name if file.stem == "labeled" and file.parent.name else file.stem
    return Path("runs") / f"{args.dataset}-{args.method}-{labels}-seed{args.seed}"


def numbered(folder: Path) -> Iterator[Path]:
    """The folder, then folder-2, folder-3, ..."""
    yield folder
    for i in range(2, 10_000):
        yield folder.with_name(f"{folder.name}-{i}")


def newest_folder(folder: Path) -> Path:
    """The run last written to of the folder and its numbered successors."""
    names = re.compile(rf"{re.escape(folder.name)}(-\d+)?")
    runs = [
        path for path in folder.parent.glob("*/config.json") if names.fullmatch(path.parent.name)
    ]
    need(runs, f"--resume: there is no run {folder}; name it with --out-dir")

    def last_written(config: Path) -> float:
        state = config.parent / "checkpoint" / "state.pt"
        return max(file.stat().st_mtime for file in (config, state) if file.exists())

    return max(runs, key=last_written).parent


def choose_folder(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """The run's folder, the same on every process. Nothing is written yet."""
    choice = [None]
    if accelerator.is_main_process:
        free = (path for path in numbered(default_folder(args)) if not path.exists())
        folder = Path(args.out_dir) if args.out_dir else next(free)
        choice = [str(folder)]
        try:
            if args.resume:
                hold(folder)
            else:
                check_new_folder(folder)
        except UserError as error:  # told by every process, so that none waits for another
            choice = [error]
    broadcast_object_list(choice)
    if isinstance(choice[0], UserError):
        raise choice[0]
    return Path(choice[0])


def check_new_folder(folder: Path) -> None:
    """UserError where a new run cannot begin in the folder."""
    need(
        not (folder / "config.json").exists(),
        f"--out-dir {folder}: holds a run already; go on with it (--resume) or choose another "
        "folder",
    )
    need(not folder.exists() or folder.is_dir(), f"--out-dir {folder}: is a file, not a folder")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    writable = os.access(parent, os.W_OK | os.X_OK)
    need(writable, f"--out-dir {folder}: {parent} is not writable")


def hold(folder: Path, text: str | None = None) -> None:
    """Keep other processes out of a run's folder while this one lives, by a lock on labeled.txt;
    in a new run the file is made, and gets `text`. UserError where another one holds it."""
    path, new = folder / "labeled.txt", text is not None
    if not new and not path.exists():
        return  # it was lost
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = held.get(path)
        if not (file and path.exists() and os.path.samestat(os.fstat(file), path.stat())):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        need(
            lock(file) and not (new and (folder / "config.json").exists()),
            f"{folder}: another process trains in this folder; wait for its end, or choose another "
            "with --out-dir",
        )
        held[path] = file
        if new:  # in place, since the lock is on this very file
            os.ftruncate(file, 0)
            os.write(file, text.encode())
            os.fsync(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def lock(file: int) -> bool:
    """Whether nobody else has the lock on a file that is open. Where the system knows no locks
    nobody has it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


# ------------------------------------------------------------------------------------- config
def read_config(folder: Path) -> dict:
    """config.json of a run; UserError where it is missing or contradicts itself."""
    path = folder / "config.json"
    need(folder.is_dir(), f"{folder}: no such run folder")
    try:
        config = json.loads(path.read_bytes())
        check_config(config)
        return config
    except FileNotFoundError:
        raise UserError(f"{folder}: is no run's folder (it has no config.json)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {error})") from None


def read_history(folder: Path) -> list[dict]:
    """The validations of a run, in history.json: "step", "miou" in 0 .. 1, and more."""
    path = folder / "history.json"
    if not path.is_file():
        return []
    try:
        history = json.loads(path.read_bytes())
        [(entry["step"], entry["miou"]) for entry in history]
        return history
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {error})") from None


def best_miou(folder: Path) -> float | None:
    """The validation mIoU of a run's model.safetensors, in 0 .. 1; None where there is none."""
    history = read_history(folder)
    # the last one that was kept: others may have been better, of weights that were lost since
    kept = [entry["miou"] for entry in history if entry.get("kept")]
    return kept[-1] if kept else max((entry["miou"] for entry in history), default=None)


def check_config(config: dict) -> None:
    """ValueError, KeyError or TypeError where an entry that others rely on is missing or odd."""
    classes, colours = config["classes"], np.asarray(config["palette"], np.uint8)
    height, width = config["crop_size"]
    names = [config["arguments"]["dataset"], config["arguments"]["script"], *classes]
    whole = (
        all(isinstance(name, str) for name in names)
        and config["model"]["num_classes"] == len(classes)
        and colours.shape == (len(classes), 3)
        and min(height, width) > 0
    )
    if not whole:
        raise ValueError("its entries contradict one another")


# ------------------------------------------------------------------------------------- weights
def write_weights(folder: Path, model: nn.Module) -> None:
    """model.safetensors, the weights to use."""
    state = model.state_dict()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write(folder / "model.safetensors", lambda file: file.write(save(tensors)))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the run has not been validated yet") from None
    except (SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: is truncated or no safetensors file ({reason})") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], origin) -> None:
    """Into the model, all of them; UserError where names or shapes do not fit. `origin` is what
    the message calls them."""
    own = model.state_dict()
    odd = [
        f"{name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    odd += [f"it lacks {name}" for name in own if name not in weights]
    odd += [f"it has {name} beyond the network" for name in weights if name not in own]
    need(
        not odd,
        f"{origin}: does not fit the network ({odd[0] if odd else ''}; {len(odd)} entries "
        "differ): another architecture or class count",
    )
    model.load_state_dict(weights)


# --------------------------------------------------------------------------- state to resume from
def write_torch(path: Path, content) -> None:
    buffer = io.BytesIO()  # in memory first: torch's own writer hides what the disk says
    torch.save(content, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def read_torch(path: Path):
    """torch.load without unpickling code; UserError for a damaged file or one with anything but
    tensors and plain values in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # the unpickler and the zip reader raise many kinds
        raise UserError(
            f"{path}: is damaged or holds more than plain tensors, so it is not loaded "
            f"({type(error).__name__})"
        ) from None


def save_state(folder: Path, record, **parts) -> None:
    """checkpoint/state.pt: the record's entries and the state of every part (None: not in use).

    Random state is no part of it: every draw is a function of (seed, step)."""
    state = {name: part.state_dict() if part else None for name, part in parts.items()}
    write_torch(folder / "checkpoint" / "state.pt", record.state_dict() | state)
    config = read_config(folder)
    if not config.get("has_checkpoint"):  # so that one that is lost later is missed
        write_json(folder / "config.json", config | {"has_checkpoint": True})


def load_state(folder: Path) -> dict | None:
    """What save_state wrote, or None for a run that was stopped before its first checkpoint."""
    # left by a run that was killed while it wrote; every process tries to remove them
    for partial in [*folder.glob(".*.part"), *folder.glob("checkpoint/.*.part")]:
        partial.unlink(missing_ok=True)
    path, anew = folder / "checkpoint" / "state.pt", f"begin a new run with --init-from {folder}"
    if path.exists():
        try:
            return read_torch(path)
        except UserError as error:
            raise UserError(f"{error}; bring back a whole one, or {anew}") from None
    need(
        not read_config(folder).get("has_checkpoint"),
        f"{path}: is gone, though the run had written it; bring it back, or {anew}",
    )
    return None


def restore(state: dict, record, **parts) -> None:
    """Give the record and every part the state that save_state wrote of it."""
    try:
        record.load_state_dict(state)
        for name, part in parts.items():
            if part and state[name]:
                part.load_state_dict(state[name])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{record.folder / 'checkpoint' / 'state.pt'}: does not fit this network or this "
            f"version ({reason}); begin a new run with --init-from {record.folder}"
        ) from None
