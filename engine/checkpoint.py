"""A run folder: its name, config.json, the weights to use and the state to resume from.

All files but labeled.txt are written atomically: a killed run finds the old file or the new one.
"""

import argparse
import io
import json
import os
import re
from collections.abc import Callable, Iterator
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

_held: TextIO | None = None  # labeled.txt of this process's run: open and locked until it ends


# -------------------------------------------------------------------------------- which folder
def default_folder(args: argparse.Namespace) -> Path:
    """runs/<dataset>-<method>-<labels>-seed<seed>"""
    labels = args.label_ratio or args.num_labeled or "all"
    if args.labeled_list:  # published splits are named splits/92/labeled.txt
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
    """The run folder, the same on every process. Nothing is written yet."""
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
        except UserError as error:  # every process raises it, so that none waits for another
            choice = [error]
    broadcast_object_list(choice)
    if isinstance(choice[0], UserError):
        raise choice[0]
    return Path(choice[0])


def check_new_folder(folder: Path) -> None:
    """UserError where a new run cannot begin in the folder."""
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
    """Keep other runs out of the folder while this process lives. names: the content of labeled.txt
    in a new run; without it a run is resumed. UserError where another run has the folder."""
    global _held
    path, new = folder / "labeled.txt", names is not None
    try:
        if new:
            folder.mkdir(parents=True, exist_ok=True)
        if _held:
            _held.close()
        # "x": of two new runs one gets the folder; NFS requires a writable file for the lock
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
    """Lock an open file until it is closed; BlockingIOError where another process has locked it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return


# ------------------------------------------------------------------------------------- config
def integer(low: int, high: int) -> Callable:
    return lambda value: type(value) is int and low <= value <= high


def list_of(check: Callable, length: int | None = None) -> Callable:
    return lambda v: isinstance(v, list) and length in (None, len(v)) and all(map(check, v))


def is_text(value) -> bool:
    return isinstance(value, str)


def is_finite(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not


count = integer(1, 2**16)
# The entries of config.json that are read; those of OPTIONAL may be null or missing
FIELDS = {
    "classes": (list_of(is_text), "a list of names"),
    "palette": (list_of(list_of(integer(0, 255), 3)), "a list of colours"),
    "crop_size": (list_of(count, 2), "[height, width]"),
    "model.num_classes": (integer(1, 255), "the number of classes"),
    "arguments.dataset": (is_text, "a name"),
    "arguments.script": (is_text, "a name"),
}
OPTIONAL = {
    "size": (list_of(count, 2), "[height, width]"),
    "arguments.max_size": (count, "an integer above 0"),
    "model.backbone": (is_text, "a name"),
    "model.rep_dim": (count, "an integer above 0"),
    "model.output_stride": (count, "an integer above 0"),
    "model.decoder_stride": (count, "an integer above 0"),
    "model.channels": (count, "an integer above 0"),
    "model.low_channels": (count, "an integer above 0"),
    "model.aspp_rates": (list_of(count, 3), "three integers above 0"),
    "model.mean": (list_of(is_finite, 3), "three numbers"),
    "model.std": (list_of(lambda v: is_finite(v) and v > 0, 3), "three numbers above 0"),
}


def check_config(config) -> None:
    """ValueError that names the entry of config.json that is not what FIELDS describes."""
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
    """config.json of a run; UserError where it is missing or damaged."""
    need(folder.is_dir(), f"{folder}: no such run folder")
    path = folder / "config.json"
    need(path.exists(), f"{folder}: is not a run folder (it has no config.json)")
    return read_json(path, check_config)


def read_json(path: Path, check: Callable):
    """The content of a JSON file; UserError where it is damaged or `check` raises ValueError."""
    try:
        content = json.loads(path.read_bytes())
        check(content)
        return content
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)})") from None


def check_history(history) -> None:
    """ValueError where history.json is not a list of validations."""
    good = list_of(lambda entry: isinstance(entry, dict) and isinstance(entry.get("miou"), float))
    if not good(history):
        raise ValueError("must be a list of validations")


def best_miou(folder: Path) -> float | None:
    """The validation mIoU of a run's model.safetensors, in 0 .. 1; None where there is none."""
    path = folder / "history.json"
    history = read_json(path, check_history) if path.is_file() else []
    # the last one kept: earlier ones may have been better, but their weights were lost
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
    """The tensors of a safetensors file; UserError where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the run has not been validated yet") from None
    except (SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: is truncated or not a safetensors file ({reason})") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], origin) -> None:
    """Load all weights into the model; UserError where names or shapes differ, or a value is NaN
    or infinite; `origin` is their name in the message."""
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
    buffer = io.BytesIO()  # in memory first: torch's own writer hides what the disk says
    torch.save(content, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def read_torch(path: Path):
    """torch.load without unpickling code; UserError for a damaged file or one that holds more than
    tensors and plain values."""
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
    """Write checkpoint/state.pt: the record's entries and the state of every part (None: unused).

    It holds no random state: every draw is a function of (seed, step)."""
    state = {name: part.state_dict() if part else None for name, part in parts.items()}
    write_torch(folder / "checkpoint" / "state.pt", record.state_dict() | state)
    config = read_config(folder)
    if not config.get("has_checkpoint"):  # so that `load_state` notices when it is lost
        write_json(folder / "config.json", config | {"has_checkpoint": True})


def load_state(folder: Path) -> dict | None:
    """What save_state wrote, or None for a run that ended before its first checkpoint."""
    path, anew = folder / "checkpoint" / "state.pt", f"start a new run with --init-from {folder}"
    for name in ("config.json", "history.json", "model.safetensors", "checkpoint/state.pt"):
        file = folder / name  # a run that is killed while it writes leaves .NAME.PID.part
        for partial in file.parent.glob(f".{file.name}.[0-9]*.part"):
            partial.unlink(missing_ok=True)  # every process tries
    if path.exists():
        try:
            return read_torch(path)
        except UserError as error:
            raise UserError(f"{error}; restore it, or {anew}") from None
    lost = read_config(folder).get("has_checkpoint")
    need(not lost, f"{path}: missing checkpoint; restore it, or {anew}")
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
