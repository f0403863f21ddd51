"""A run folder: its name, config.json, the weights to use and the state to resume from.

All files except labeled.txt are written atomically: after a kill, each is the old or the new one.
"""

import argparse
import io
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from inputs.errors import UserError, first_line, need
from inputs.files import need_utf8, write, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: TextIO | None = None  # labeled.txt of this process's run, open and locked to the end


# -------------------------------------------------------------------------------- which folder
def default_folder(args: argparse.Namespace) -> Path:
    """runs/<dataset>-<method>-<labels>-seed<seed>"""
    labels = args.label_ratio or args.num_labeled or "all"
    if args.labeled_list:  # published splits are named splits/92/labeled.txt
        file = Path(args.labeled_list)
        labels = file.parent.name if file.stem == "labeled" and file.parent.name else file.stem
    return Path("runs") / f"{args.dataset}-{args.method}-{labels}-seed{args.seed}"


def free_folder(folder: Path) -> Path:
    """The first of folder, folder-2, folder-3, ... that does not exist."""
    numbers = itertools.count(2)
    path = folder
    while path.exists():
        path = folder.with_name(f"{folder.name}-{next(numbers)}")
    return path


def newest_folder(folder: Path) -> Path:
    """Of the runs in folder, folder-2, folder-3, ... the one that was last written to."""
    names = re.compile(rf"{re.escape(folder.name)}(-\d+)?")
    configs = folder.parent.glob("*/config.json")
    runs = [config.parent for config in configs if names.fullmatch(config.parent.name)]
    need(runs, f"--resume: there is no run {folder}; name it with --out-dir")

    def last_written(run: Path) -> float:
        files = run / "config.json", run / "checkpoint" / "state.pt"
        return max(file.stat().st_mtime for file in files if file.exists())

    return max(runs, key=last_written)


def choose_folder(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """The run folder, the same on every rank. Nothing is written yet."""
    choice = [None]
    if accelerator.is_main_process:
        folder = Path(args.out_dir) if args.out_dir else free_folder(default_folder(args))
        choice = [str(folder)]
        try:
            if args.resume:
                hold(folder)
            else:
                check_new_folder(folder)
        except UserError as error:  # every rank raises it, so that none waits for another
            choice = [error]
    broadcast_object_list(choice)
    if isinstance(choice[0], UserError):
        raise choice[0]
    return Path(choice[0])


def check_new_folder(folder: Path) -> None:
    """UserError if a new run cannot use the folder."""
    need_utf8(folder)
    need(not folder.exists() or folder.is_dir(), f"--out-dir {folder}: is a file, not a folder")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    writable = os.access(parent, os.R_OK | os.W_OK | os.X_OK)
    need(writable, f"--out-dir {folder}: {parent} is not writable")
    need(
        not folder.exists() or not any(folder.iterdir()),
        f"--out-dir {folder}: is not empty; resume its run with --resume, or choose another folder",
    )


def hold(folder: Path, names: str | None = None) -> None:
    """Lock the run folder for the life of this process; UserError if another process has it.
    names: the content of a new run's labeled.txt; None: the run is resumed."""
    global _held
    path, new = folder / "labeled.txt", names is not None
    try:
        if new:
            folder.mkdir(parents=True, exist_ok=True)
        if _held:
            _held.close()
        # "x": only one of two new runs gets the folder; on NFS a lock requires a writable file
        _held = open(path, "x" if new else "r+", encoding="utf-8")  # noqa: SIM115
        lock(_held)
        if new:
            _held.write(names)
            _held.flush()
            os.fsync(_held.fileno())
    except (FileExistsError, BlockingIOError):
        raise UserError(
            f"{folder}: another process trains in this folder; wait, or choose another --out-dir"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened for writing ({error.strerror})") from None


def lock(file: TextIO) -> None:
    """Lock an open file until it is closed; BlockingIOError if another process has locked it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise  # any other: a file system without locks


# ------------------------------------------------------------------------------------- config
def integer(low: int, high: int) -> Callable:
    return lambda value: type(value) is int and low <= value <= high


def list_of(check: Callable, length: int | None = None) -> Callable:
    return lambda v: isinstance(v, list) and length in (None, len(v)) and all(map(check, v))


def is_text(value) -> bool:
    return isinstance(value, str)


def is_finite(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # False for NaN


count = integer(1, 2**16)
NAME = (is_text, "a name")
SIZE = (list_of(count, 2), "[height, width]")
COUNT = (count, "an integer above 0")
# The entries of config.json that are read; those of OPTIONAL may be null or missing
FIELDS = {
    "classes": (list_of(is_text), "a list of names"),
    "palette": (list_of(list_of(integer(0, 255), 3)), "a list of colours"),
    "crop_size": SIZE,
    "model.num_classes": (integer(1, 255), "the number of classes"),
    "arguments.dataset": NAME,
    "arguments.script": NAME,
}
OPTIONAL = {
    "size": SIZE,
    "max_size": COUNT,
    "arguments.max_size": COUNT,
    "model.backbone": NAME,
    "model.rep_dim": COUNT,
    "model.output_stride": COUNT,
    "model.decoder_stride": COUNT,
    "model.channels": COUNT,
    "model.low_channels": COUNT,
    "model.aspp_rates": (list_of(count, 3), "three integers above 0"),
    "model.mean": (list_of(is_finite, 3), "three numbers"),
    "model.std": (list_of(lambda v: is_finite(v) and v > 0, 3), "three numbers above 0"),
}


def check_config(config) -> None:
    """ValueError that names the first entry of config.json that breaks FIELDS or OPTIONAL."""
    for name, (check, kind) in (FIELDS | OPTIONAL).items():
        value = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not (check(value) or (value is None and name in OPTIONAL)):
            raise ValueError(f"{name} must be {kind}")
    number = len(config["classes"])
    if not config["model"]["num_classes"] == number == len(config["palette"]):
        raise ValueError("classes, palette and model.num_classes differ in number")


def read_config(folder: Path) -> dict:
    """config.json of a run; UserError if it is missing or damaged."""
    need(folder.is_dir(), f"{folder}: no such run folder")
    path = folder / "config.json"
    need(path.exists(), f"{folder}: is not a run folder (it has no config.json)")
    return read_json(path, check_config)


def read_json(path: Path, check: Callable):
    """The content of a JSON file; UserError if it is damaged or `check` raises ValueError."""
    try:
        content = json.loads(path.read_bytes())
        check(content)
        return content
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)})") from None


def check_history(history) -> None:
    """ValueError if history.json is not a list of validations."""
    check = list_of(lambda entry: isinstance(entry, dict) and isinstance(entry.get("miou"), float))
    if not check(history):
        raise ValueError("must be a list of validations")


def best_miou(folder: Path) -> float | None:
    """The validation mIoU of a run's model.safetensors, in 0 .. 1; None where there is none."""
    path = folder / "history.json"
    history = read_json(path, check_history) if path.is_file() else []
    # the last one: earlier ones may have been better, but then their weights were lost
    kept = [entry["miou"] for entry in history if entry.get("kept")]
    return kept[-1] if kept else None


# ------------------------------------------------------------------------------------- weights
def write_weights(folder: Path, model: nn.Module) -> None:
    """model.safetensors, the weights to use."""
    state = model.state_dict()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    for name in state:  # the counts of batch norm, which training leaves out
        if name.endswith("running_mean"):
            count = name.replace("running_mean", "num_batches_tracked")
            tensors.setdefault(count, torch.tensor(0))
    write(folder / "model.safetensors", lambda file: file.write(save(tensors)))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the run has not been validated yet") from None
    except (SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: is truncated or not a safetensors file ({reason})") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], origin) -> None:
    """Load all weights into the model; UserError if names or shapes differ, or a value is NaN or
    infinite. `origin` names the weights in the message."""
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
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    need(not bad, f"{origin}: is damaged ({', '.join(bad[:1])} has values that are not finite)")


# --------------------------------------------------------------------------- state to resume from
def write_torch(path: Path, content) -> None:
    """Write a file of torch.save atomically."""
    buffer = io.BytesIO()  # in memory first: torch's own writer hides the disk's error
    torch.save(content, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def read_torch(path: Path):
    """torch.load that runs no code of the file; UserError if it is damaged or holds more than
    tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # the unpickler and the zip reader raise many types
        raise UserError(
            f"{path}: is damaged or holds more than plain tensors, so it is not loaded "
            f"({type(error).__name__})"
        ) from None


def save_state(folder: Path, record, **parts) -> None:
    """Write checkpoint/state.pt: the state of the record and of every part (None: not in use).

    It holds no random state: every draw is a function of (seed, step)."""
    state = {name: part.state_dict() if part else None for name, part in parts.items()}
    write_torch(folder / "checkpoint" / "state.pt", record.state_dict() | state)
    config = read_config(folder)
    if not config.get("has_checkpoint"):  # so that `load_state` notices when it is lost
        write_json(folder / "config.json", config | {"has_checkpoint": True})


def load_state(folder: Path) -> dict | None:
    """What save_state wrote, or None for a run that ended before its first checkpoint."""
    path = folder / "checkpoint" / "state.pt"
    for name in ("config.json", "history.json", "model.safetensors", "checkpoint/state.pt"):
        file = folder / name  # a run that was killed while writing leaves .NAME.PID.part
        for partial in file.parent.glob(f".{file.name}.[0-9]*.part"):
            partial.unlink(missing_ok=True)  # another rank may be first
    has_checkpoint = read_config(folder).get("has_checkpoint")
    try:
        if path.exists():
            return read_torch(path)
        need(not has_checkpoint, f"{path}: missing checkpoint")
    except UserError as error:
        raise UserError(
            f"{error}; restore it, or start a new run with --init-from {folder}"
        ) from None
    return None


def restore(state: dict, record, **parts) -> None:
    """Load what save_state wrote into the record and every part."""
    try:
        record.load_state_dict(state)
        for name, part in parts.items():
            if part and state[name]:
                part.load_state_dict(state[name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{record.folder / 'checkpoint' / 'state.pt'}: does not fit this network or this "
            f"version ({reason}); start a new run with --init-from {record.folder}"
        ) from None
