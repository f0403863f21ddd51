"""Whatever is wrong with the input: one line on stderr that names the culprit, exit status 2, and
no half-written run."""

import io
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import trees
from cli import SMALL, run_many
from trees import copy, cut, damage, empty, paint, remove, text

TRAIN = ("train_supervised.py", "train_semi.py")
SHORT = ["--batch-size", "2", "--iterations", "2", "--log-with", "none"]
turns = itertools.cycle(TRAIN)  # both read options by the same functions, so they take turns


class Case(NamedTuple):
    """A command line, in which TMP, DATA and RUN are folders of the case, and what its line on
    stderr must name."""

    words: str
    culprit: str
    tree: str | None = None  # the data set in DATA
    options: Mapping = MappingProxyType({})  # of the tree
    harm: Callable[[Path], object] = lambda folder: None  # what is done to DATA, or to RUN


CASES: dict[str, Case] = {}


def on_options(name: str, words: str, culprit: str, script: str | None = None) -> None:
    CASES[name] = Case(f"{script or next(turns)} {words}", culprit)


def on_data(
    name: str, harm, culprit: str, words: str = "", tree: str = "folder", **options
) -> None:
    words = f"train_semi.py --dataset {tree} --data-path DATA {words}"
    CASES[f"{tree}: {name}"] = Case(words, culprit, tree, options, harm)


def on_run(name: str, harm, words: str, culprit: str) -> None:
    CASES[name] = Case(words, culprit, harm=harm)


# ------------------------------------------------------------------------------------- options
on_options("ReCo without the head", "--reco --model deeplabv3plus", "--reco")
on_options("ratio and number", "--label-ratio p1 --num-labeled 3", "--label-ratio and --num-lab")
on_options("ratio and list", "--label-ratio p1 --labeled-list x", "--labeled-list")
on_options("unknown option", "--banana", "--banana")
on_options("unknown data set", "--dataset coco", "coco")
on_options("zero batch", "--batch-size 0", "--batch-size")
on_options("batch of one", "--batch-size 1", "--batch-size 1")
on_options("one labelled", "--labeled-batch-size 1", "--labeled-batch-size 1", "train_semi.py")
on_options("threshold above 1", "--reco --reco-threshold 1.2", "--reco-threshold")
on_options("negative rate", "--lr -1", "--lr")
on_options("rate of letters", "--lr fast", "fast")
on_options("no path", "--dataset cityscapes", "--data-path")
on_options("path for street", "--data-path TMP", "--data-path")
on_options("too many labels", "--num-labeled 5000", "--num-labeled 5000")
on_options("no such folder", "--dataset pascal --data-path TMP/nowhere", "nowhere")
on_options("unknown backbone", "--backbone resnot50", "resnot50")
on_options("no pyramid", "--backbone swin_tiny_patch4_window7_224", "swin_tiny")
on_options("weights offline", "--backbone resnet18 --pretrained", "--no-pretrained")
on_options("no safetensors weights", "--backbone-weights TMP/no.safetensors", "no.safetensors")
on_options("no weights", "--backbone-weights TMP/no.pth", "no.pth")
on_options("weights of another network", "--backbone-weights TMP/net.safetensors", "net.safetens")
on_options("pickle as backbone weights", "--backbone-weights TMP/evil.pth", "evil.pth")
on_options(
    "backbone weights and none",
    "--backbone-weights TMP/net.safetensors --no-pretrained",
    "--no-pretrained",
)
on_options(
    "backbone weights and a run's", "--backbone-weights x --init-from WHOLE", "--backbone-weights"
)
on_options("resume nothing", "--resume", "no such run folder")
on_options("temperature nan", "--reco --reco-temp nan", "nan")
on_options("unknown tracker", "--log-with paper", "paper")
on_options("unknown tracker of a resumed run", "--resume --log-with paper", "paper")
on_options("small crop", "--crop-size 8", "--crop-size")
on_options("crop and backbone", "--backbone vgg11_bn --no-pretrained --crop-size 8", "--crop-size")
on_options("scale", "--scale 2 1", "--scale")
on_options("no such list", "--labeled-list TMP/nolist.txt", "nolist.txt")
on_options("list with an unknown image", "--labeled-list TMP/list.txt", "no_such_image")
on_options("empty list", "--labeled-list TMP/empty.txt", "empty.txt")
on_options("list that is not UTF-8", "--labeled-list TMP/utf16.txt", "utf16.txt")
on_options("init from nothing", "--init-from TMP/norun", "norun")
on_options(
    "warm-up as long as the run",
    "--warmup-iterations 10 --iterations 10",
    "--warmup-iter",
    "train_semi.py",
)
on_options("mixing", "--mixing-strategy mixup", "mixup", "train_semi.py")
on_options("out-dir taken", "--out-dir WHOLE", "--resume")
on_options("out-dir is a file", "--out-dir TMP/list.txt", "list.txt")

# ---------------------------------------------------------------------------------------- data
VALUE_77 = np.full((48, 64), 77, np.uint8)
ALL_MASKS = "labels/*/*.png"


def paint_all(pattern: str, array):
    return lambda root: [trees.save(path, np.asarray(array)) for path in root.rglob(pattern)]


on_data("classes.txt missing", remove("classes.txt"), "classes.txt")
on_data("one class", text("classes.txt", "only\n"), "classes.txt")
on_data("fewer classes than the labels use", text("classes.txt", "a\nb\n"), "the value 2")
on_data("no images folder", remove("images/val"), "images/val")
on_data("empty folder", empty("images/train"), "images/train")
on_data("no label at all", empty("labels/train"), "labels/train")
on_data("validation image without label", remove("labels/val/val_001.png"), "val_001")
on_data("label without image", remove("images/train/train_001.png"), "train_001")
on_data(
    "sizes differ", paint("labels/train/train_002.png", np.zeros((5, 7), np.uint8)), "train_002"
)
on_data("value outside", paint("labels/train/train_002.png", VALUE_77), "77")
on_data(
    "RGB mask", paint("labels/train/train_002.png", np.zeros((48, 64, 3), np.uint8)), "train_002"
)
on_data("0/255 masks", paint_all(ALL_MASKS, np.eye(48, 64, dtype=np.uint8) * 255), "255", classes=2)
on_data("truncated label", damage("labels/train/train_000.png", cut), "train_000.png")
on_data("truncated image", damage("images/train/train_001.png", cut), "train_001.png")
on_data("truncated unlabelled image", damage("images/train/train_004.png", cut), "train_004.png")
on_data("empty image file", text("images/val/val_000.png", ""), "val_000.png")
on_data("text as image", text("images/val/val_000.png", "hello"), "val_000.png")
on_data("more labels than there are", lambda root: None, "--num-labeled 9", "--num-labeled 9")
on_data("two images of one name", copy("images/train/train_000.png", "train_000.jpg"), "train_000")
on_data("a pipe", lambda root: os.mkfifo(root / "images/train/odd.png"), "odd.png")
on_data("label missing", remove("gtFine/train/jena/*labelIds.png"), "jena", tree="cityscapes")
on_data(
    "id unknown",
    paint_all("*labelIds.png", np.full((64, 128), 99, np.uint8)),
    "99",
    tree="cityscapes",
)
on_data(
    "image truncated",
    lambda root: [cut(path) for path in (root / "leftImg8bit").rglob("*.png")],
    "leftImg8bit.png",
    tree="cityscapes",
)
on_data("list missing", remove("ImageSets/Segmentation/val.txt"), "val.txt", tree="pascal")
on_data(
    "list that is not UTF-8",
    lambda root: (root / "ImageSets/Segmentation/val.txt").write_bytes("1\n".encode("utf-16")),
    "val.txt",
    tree="pascal",
)
on_data("image missing", remove("JPEGImages/2007_000001.jpg"), "2007_000001.jpg", tree="pascal")
on_data("label missing", remove("sunrgbd*/img-000001.png"), "img-000001", tree="sun")


# -------------------------------------------------------------------------------- a run's folder
class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/reco-test-owned",)


def evil_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Evil()}, buffer)
    return buffer.getvalue()


def other_shape(run: Path) -> None:
    weights = load_file(run / "model.safetensors")
    weights["classifier.3.weight"] = torch.zeros(4, 64, 1, 1)
    save_file(weights, run / "model.safetensors")


def other_network(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["model"]["backbone"] = "resnet18"
    (run / "config.json").write_text(json.dumps(config))


def evil_weights(run: Path) -> None:
    (run / "model.safetensors").write_bytes(pickle.dumps(Evil()))


def evil_state(run: Path) -> None:
    (run / "checkpoint/state.pt").write_bytes(evil_checkpoint())


for script, more in (("evaluate.py", ""), ("predict.py", "TMP/image.png --out-dir TMP/masks")):
    for name, harm, culprit in (
        ("truncated weights", damage("model.safetensors", cut), "model.safetensors"),
        ("no weights", remove("model.safetensors"), "model.safetensors"),
        ("other class count", other_shape, "classifier.3.weight"),
        ("other network", other_network, "model.safetensors"),
        ("damaged config", damage("config.json", cut), "config.json"),
        ("pickle as weights", evil_weights, "model.safetensors"),
        ("a folder that is not a run", remove("config.json"), "config.json"),
    ):
        on_run(f"{script}: {name}", harm, f"{script} RUN {more}", culprit)
    CASES[f"{script}: no run"] = Case(f"{script} TMP/norun {more}", "norun")
    path = " --data-path TMP" if script == "evaluate.py" else ""
    for file in ("other.pth", "evil.pth", "cut.pth", "none.pth"):
        words = f"{script} --checkpoint TMP/{file} --dataset pascal {more}{path}"
        CASES[f"{script}: checkpoint {file}"] = Case(words, file)
CASES["evaluate other classes"] = Case(
    "evaluate.py WHOLE --dataset folder --data-path DATA", "classes", "folder"
)
CASES["predict no image"] = Case("predict.py WHOLE TMP/noimage.png --out-dir TMP/masks", "noimage")
CASES["predict no out-dir"] = Case("predict.py WHOLE TMP/image.png", "--out-dir")
CASES["predict an empty folder"] = Case("predict.py WHOLE TMP/no --out-dir TMP/masks", "TMP/no")
resume = "train_supervised.py --resume --out-dir RUN"
on_run("resume a truncated checkpoint", damage("checkpoint/state.pt", cut), resume, "state.pt")
on_run("resume a pickled checkpoint", evil_state, resume, "state.pt")
on_run("resume with another seed", lambda run: None, f"{resume} --seed 5", "--seed 5")


# ------------------------------------------------------------------------------------- all at once
def prepare(case: Case, number: int, tmp: Path) -> tuple[list[str], str]:
    """The command line of a case and its culprit, with the case's folders made."""
    places = {
        "TMP": tmp,
        "WHOLE": tmp / "whole",
        "DATA": tmp / f"data{number}",
        "RUN": tmp / f"run{number}",
    }
    if case.tree:
        getattr(trees, case.tree)(places["DATA"], **case.options)
        case.harm(places["DATA"])
    elif "RUN" in case.words:
        shutil.copytree(tmp / "whole", places["RUN"])
        case.harm(places["RUN"])

    def filled(word: str) -> str:
        head, *tail = word.split("/")
        return "/".join([str(places.get(head, head)), *tail])

    words = [filled(word) for word in case.words.split()]
    if case.tree and words[0] in TRAIN:
        words += [*SMALL, *SHORT]
    if "--out-dir" not in words and words[0] in TRAIN:
        words += ["--out-dir", str(tmp / f"out{number}")]
    return words, filled(case.culprit)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of each case status, stderr, culprit and the folder that it must not leave; TMP."""
    tmp = tmp_path_factory.mktemp("bad")

    def run_all(commands):
        return run_many(commands, cwd=tmp, XDG_CACHE_HOME=str(tmp / "cache"))

    words = "train_supervised.py --iterations 1 --batch-size 2 --num-labeled 4 --log-with none"
    ((status, _, err),) = run_all([[*words.split(), "--out-dir", str(tmp / "whole")]])
    assert status == 0, err
    trees.save(tmp / "image.png", np.zeros((40, 50, 3), np.uint8))
    (tmp / "no").mkdir()
    save_file({"a": torch.zeros(1)}, tmp / "net.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp / "other.pth")
    (tmp / "evil.pth").write_bytes(evil_checkpoint())
    (tmp / "cut.pth").write_bytes((tmp / "other.pth").read_bytes()[:200])
    (tmp / "list.txt").write_text("train_0001\nno_such_image\n")
    (tmp / "empty.txt").write_text("\n")
    (tmp / "utf16.txt").write_bytes("train_0001\n".encode("utf-16"))
    Path("/tmp/reco-test-owned").unlink(missing_ok=True)

    prepared = [prepare(case, number, tmp) for number, case in enumerate(CASES.values())]
    before = run_files(tmp)
    results = run_all([words for words, _ in prepared])
    assert run_files(tmp) == before  # no run was touched
    return tmp, {
        name: (status, err, culprit, tmp / f"out{number}")
        for number, (name, (status, _, err), (_, culprit)) in enumerate(
            zip(CASES, results, prepared, strict=True)
        )
    }


def run_files(tmp: Path) -> dict[Path, int]:
    paths = [path for path in tmp.glob("run*/**/*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in (*paths, *tmp.glob("whole/*"))}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(outcomes, name):
    status, err, culprit, folder = outcomes[1][name]
    assert status == 2 and len(err.strip().splitlines()) == 1 and culprit in err, err[-900:]
    assert not folder.exists(), sorted(path.name for path in folder.rglob("*"))


def test_nothing_else_is_left(outcomes):
    tmp, _ = outcomes
    assert not list((tmp / "masks").glob("*"))
    assert not Path("/tmp/reco-test-owned").exists()  # no code in a checkpoint is run
