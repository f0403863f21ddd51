"""Whatever is wrong with the input: one line on stderr that names the culprit, exit status 2, and
no half-written run."""

import io
import itertools
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import trees
from cli import SMALL, run_many
from trees import cut

TRAIN = ["train_supervised.py", "train_semi.py"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/reco-test-owned",)


def paint(path: Path, values) -> None:
    Image.fromarray(values).save(path)


def cases(tmp: Path) -> dict[str, tuple[list, str]]:
    """name -> (command line without --out-dir for the training scripts, what its line on stderr
    must name)."""
    table, number = {}, iter(range(10_000))

    def case(name: str, command: list, culprit: str) -> None:
        table[name] = ([str(word) for word in command], culprit)

    def broken(tree, change, **options) -> Path:
        path = getattr(trees, tree)(tmp / f"data{next(number)}", **options)
        change(path)
        return path

    def on(tree: str, path: Path, *words, script: str = "train_semi.py") -> list:
        return [
            script,
            "--dataset",
            tree,
            "--data-path",
            path,
            *SMALL,
            "--batch-size",
            "2",
            "--iterations",
            "2",
            "--log-with",
            "none",
            *words,
        ]

    # ---- flags
    save_file({"a": torch.zeros(1)}, tmp / "net.safetensors")
    # both training scripts read them by the same functions, so each gets every other question
    train = itertools.cycle(TRAIN)
    case(
        "reco without head",
        [next(train), "--reco", "--model", "deeplabv3plus"],
        "--reco needs",
    )
    case(
        "ratio and number",
        [next(train), "--label-ratio", "p1", "--num-labeled", "3"],
        "--label-ratio and --num-labeled",
    )
    case(
        "ratio and list",
        [next(train), "--label-ratio", "p1", "--labeled-list", "x"],
        "--labeled-list",
    )
    case("unknown option", [next(train), "--banana"], "--banana")
    case("unknown data set", [next(train), "--dataset", "coco"], "coco")
    case("zero batch", [next(train), "--batch-size", "0"], "--batch-size")
    case("batch of one", [next(train), "--batch-size", "1"], "--batch-size 1")
    case(
        "one labelled",
        ["train_semi.py", "--labeled-batch-size", "1"],
        "--labeled-batch-size 1",
    )
    case(
        "threshold above 1",
        [next(train), "--reco", "--reco-threshold", "1.2"],
        "--reco-threshold",
    )
    case("cache of street", [next(train), "--cache-dir", tmp], "--cache-dir")
    case("negative rate", [next(train), "--lr", "-1"], "--lr")
    case("rate of letters", [next(train), "--lr", "fast"], "fast")
    case("no path", [next(train), "--dataset", "cityscapes"], "--data-path")
    case("path for street", [next(train), "--data-path", tmp], "--data-path")
    case("too many labels", [next(train), "--num-labeled", "5000"], "--num-labeled 5000")
    case(
        "no such folder",
        [next(train), "--dataset", "pascal", "--data-path", tmp / "nowhere"],
        "nowhere",
    )
    case("unknown backbone", [next(train), "--backbone", "resnot50"], "resnot50")
    case(
        "no pyramid",
        [next(train), "--backbone", "swin_tiny_patch4_window7_224"],
        "swin_tiny",
    )
    case(
        "weights offline",
        [next(train), "--backbone", "resnet18", "--pretrained"],
        "--no-pretrained",
    )
    for file in ("nofile.safetensors", "nofile.pth"):
        case(f"weights from {file}", [next(train), "--backbone-weights", tmp / file], file)
    case(
        "weights of another network",
        [next(train), "--backbone-weights", tmp / "net.safetensors"],
        "net.safetensors",
    )
    case(
        "pickle as backbone weights",
        [next(train), "--backbone-weights", tmp / "evil.pth"],
        "evil.pth",
    )
    case(
        "backbone weights and none",
        [next(train), "--backbone-weights", tmp / "net.safetensors", "--no-pretrained"],
        "--no-pretrained",
    )
    case(
        "backbone weights and a run's",
        [next(train), "--backbone-weights", "x", "--init-from", tmp / "whole"],
        "--backbone-weights",
    )
    case("resume nothing", [next(train), "--resume"], "no such run folder")
    case("idle flag", [next(train), "--reco-num-queries", "3"], "--reco-num-queries")
    case("nan", [next(train), "--reco", "--reco-temp", "nan"], "nan")
    case("tracker", [next(train), "--log-with", "paper"], "paper")
    case(
        "tracker of a resumed run",
        [next(train), "--resume", "--log-with", "paper"],
        "paper",
    )
    case("crop", [next(train), "--crop-size", "8"], "--crop-size")
    deep = ["--backbone", "vgg11_bn", "--no-pretrained", "--output-stride", "32"]
    case(
        "crop and backbone",
        ["train_semi.py", *deep, "--decoder-stride", "4", "--crop-size", "16"],
        "--crop-size 16 16",
    )
    case("scale", [next(train), "--scale", "2", "1"], "--scale")
    case("no such list", [next(train), "--labeled-list", tmp / "nolist.txt"], "nolist.txt")
    case("init from nothing", [next(train), "--init-from", tmp / "norun"], "norun")
    case(
        "warm-up as long as the run",
        ["train_semi.py", "--warmup-iterations", "10", "--iterations", "10"],
        "--warmup-iterations",
    )
    case("mixing", ["train_semi.py", "--mixing-strategy", "mixup"], "mixup")
    (tmp / "list.txt").write_text("train_0001\nno_such_image\n")
    case(
        "list with an unknown image",
        ["train_semi.py", "--labeled-list", tmp / "list.txt"],
        "no_such_image",
    )
    (tmp / "empty.txt").write_text("\n")
    case("empty list", ["train_semi.py", "--labeled-list", tmp / "empty.txt"], "empty.txt")

    # ---- data
    def folder_case(name, change, culprit, *words, **options):
        case(name, on("folder", broken("folder", change, **options), *words), culprit)

    folder_case("classes.txt missing", lambda p: (p / "classes.txt").unlink(), "classes.txt")
    folder_case("one class", lambda p: (p / "classes.txt").write_text("only\n"), "classes.txt")
    folder_case(
        "fewer classes than the labels use", lambda p: (p / "classes.txt").write_text("a\nb\n"), "2"
    )
    folder_case("no images folder", lambda p: shutil.rmtree(p / "images" / "val"), "images/val")
    folder_case(
        "empty folder",
        lambda p: [f.unlink() for f in (p / "images" / "train").iterdir()],
        "images/train",
    )
    folder_case(
        "no label at all",
        lambda p: [f.unlink() for f in (p / "labels" / "train").iterdir()],
        "labels/train",
    )
    folder_case(
        "validation image without label",
        lambda p: (p / "labels/val/val_001.png").unlink(),
        "val_001",
    )
    folder_case(
        "label without image", lambda p: (p / "images/train/train_001.png").unlink(), "train_001"
    )
    folder_case(
        "sizes differ",
        lambda p: paint(p / "labels/train/train_002.png", np.zeros((5, 7), np.uint8)),
        "train_002",
    )
    folder_case(
        "value outside",
        lambda p: paint(p / "labels/train/train_002.png", np.full((48, 64), 77, np.uint8)),
        "77",
    )
    folder_case(
        "RGB mask",
        lambda p: paint(p / "labels/train/train_002.png", np.zeros((48, 64, 3), np.uint8)),
        "train_002",
    )
    folder_case(
        "0/255 masks",
        lambda p: [
            paint(
                f,
                np.where(np.arange(64) < 30, 255, 0).astype(np.uint8) * np.ones((48, 1), np.uint8),
            )
            for f in (p / "labels").rglob("*.png")
        ],
        "255",
        classes=2,
    )
    folder_case("truncated label", lambda p: cut(p / "labels/train/train_000.png"), "train_000.png")
    folder_case("truncated image", lambda p: cut(p / "images/train/train_001.png"), "train_001.png")
    folder_case(
        "truncated unlabelled image",
        lambda p: cut(p / "images/train/train_004.png"),
        "train_004.png",
    )
    folder_case(
        "empty image file", lambda p: (p / "images/val/val_000.png").write_bytes(b""), "val_000.png"
    )
    folder_case(
        "text as image", lambda p: (p / "images/val/val_000.png").write_text("hello"), "val_000.png"
    )
    folder_case(
        "more labels asked for than there are",
        lambda p: None,
        "--num-labeled 9",
        "--num-labeled",
        "9",
    )
    folder_case(
        "two images of one name",
        lambda p: shutil.copy(p / "images/train/train_000.png", p / "images/train/train_000.jpg"),
        "train_000",
    )
    case(
        "cityscapes label missing",
        on(
            "cityscapes",
            broken(
                "cityscapes", lambda p: next((p / "gtFine/train").rglob("*labelIds.png")).unlink()
            ),
        ),
        "labelIds.png",
    )
    case(
        "cityscapes id unknown",
        on(
            "cityscapes",
            broken(
                "cityscapes",
                lambda p: [
                    paint(f, np.full((64, 128), 99, np.uint8))
                    for f in (p / "gtFine/train").rglob("*labelIds.png")
                ],
            ),
        ),
        "99",
    )
    case(
        "cityscapes image truncated",
        on(
            "cityscapes",
            broken(
                "cityscapes",
                lambda p: [cut(f) for f in (p / "leftImg8bit/train").rglob("*.png")],
            ),
        ),
        "leftImg8bit.png",
    )
    case(
        "pascal list missing",
        on("pascal", broken("pascal", lambda p: (p / "ImageSets/Segmentation/val.txt").unlink())),
        "val.txt",
    )
    case(
        "pascal image missing",
        on("pascal", broken("pascal", lambda p: (p / "JPEGImages/2007_000001.jpg").unlink())),
        "2007_000001.jpg",
    )
    case(
        "sun label missing",
        on(
            "sun",
            broken("sun", lambda p: (p / "sunrgbd_train_test_labels/img-000001.png").unlink()),
        ),
        "img-000001",
    )

    # ---- the run's folder
    whole = tmp / "whole"

    def run_case(name, change, command, culprit):
        run = tmp / f"run{next(number)}"
        shutil.copytree(whole, run)
        change(run)
        case(name, [str(run) if word == "RUN" else word for word in command], culprit)

    picture = trees.save(tmp / "picture.png", np.zeros((40, 50, 3), np.uint8))

    def other_shape(run):
        weights = load_file(run / "model.safetensors")
        weights["classifier.3.weight"] = torch.zeros(4, 64, 1, 1)
        save_file(weights, run / "model.safetensors")

    def other_network(run):
        config = json.loads((run / "config.json").read_text())
        config["model"]["backbone"] = "resnet18"
        (run / "config.json").write_text(json.dumps(config))

    for script, words in (
        ("evaluate.py", ["RUN"]),
        ("predict.py", ["RUN", picture, "--out-dir", tmp / "masks"]),
    ):
        run_case(
            f"{script} truncated weights",
            lambda r: cut(r / "model.safetensors"),
            [script, *words],
            "model.safetensors",
        )
        run_case(
            f"{script} no weights",
            lambda r: (r / "model.safetensors").unlink(),
            [script, *words],
            "model.safetensors",
        )
        run_case(
            f"{script} other class count", other_shape, [script, *words], "classifier.3.weight"
        )
        run_case(f"{script} other network", other_network, [script, *words], "model.safetensors")
        run_case(
            f"{script} damaged config",
            lambda r: cut(r / "config.json"),
            [script, *words],
            "config.json",
        )
        run_case(
            f"{script} pickle as weights",
            lambda r: (r / "model.safetensors").write_bytes(pickle.dumps(Evil())),
            [script, *words],
            "model.safetensors",
        )
        case(f"{script} no run", [script, tmp / "norun", *words[1:]], "norun")
        run_case(
            f"{script} a folder that is no run",
            lambda r: (r / "config.json").unlink(),
            [script, *words],
            "config.json",
        )
        torch.save({"a": torch.zeros(1)}, tmp / "other.pth")
        (tmp / "evil.pth").write_bytes(evil_checkpoint())
        (tmp / "cut.pth").write_bytes((tmp / "other.pth").read_bytes()[:200])
        for file in ("other.pth", "evil.pth", "cut.pth", "none.pth"):
            case(
                f"{script} checkpoint {file}",
                [
                    script,
                    "--checkpoint",
                    tmp / file,
                    "--dataset",
                    "pascal",
                    *words[1:],
                    *(["--data-path", tmp] if script == "evaluate.py" else []),
                ],
                file,
            )
    case(
        "evaluate other classes",
        [
            "evaluate.py",
            whole,
            "--dataset",
            "folder",
            "--data-path",
            broken("folder", lambda p: None),
        ],
        "classes",
    )
    case(
        "predict no picture",
        ["predict.py", whole, tmp / "nopicture.png", "--out-dir", tmp / "masks"],
        "nopicture.png",
    )
    case("predict no out-dir", ["predict.py", whole, picture], "--out-dir")
    (tmp / "nothing").mkdir()
    case(
        "predict an empty folder",
        ["predict.py", whole, tmp / "nothing", "--out-dir", tmp / "masks"],
        "nothing",
    )

    def evil_state(run):
        (run / "checkpoint" / "state.pt").write_bytes(evil_checkpoint())

    for name, change in (
        ("truncated", lambda r: cut(r / "checkpoint" / "state.pt")),
        ("pickled", evil_state),
    ):
        run_case(
            f"resume a {name} checkpoint",
            change,
            ["train_supervised.py", "--resume", "--out-dir", "RUN"],
            "state.pt",
        )
    run_case(
        "resume with another seed",
        lambda r: None,
        ["train_supervised.py", "--resume", "--seed", "5", "--out-dir", "RUN"],
        "--seed 5",
    )
    case("out-dir taken", ["train_supervised.py", "--out-dir", whole], "--resume")
    (tmp / "file").write_text("")
    case("out-dir is a file", ["train_supervised.py", "--out-dir", tmp / "file"], "is a file")
    return table


def evil_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Evil()}, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")

    def run_all(commands):
        return run_many(commands, cwd=tmp, XDG_CACHE_HOME=str(tmp / "cache"))

    good = [
        "train_supervised.py",
        "--iterations",
        "1",
        "--batch-size",
        "2",
        "--num-labeled",
        "4",
        "--log-with",
        "none",
        "--out-dir",
        str(tmp / "whole"),
    ]
    ((status, _, err),) = run_all([good])
    assert status == 0, err
    Path("/tmp/reco-test-owned").unlink(missing_ok=True)
    table = cases(tmp)
    folders = {name: tmp / f"out{i}" for i, name in enumerate(table)}
    commands = [
        command
        if "--out-dir" in command or command[0] not in TRAIN
        else [*command, "--out-dir", str(folders[name])]
        for name, (command, _) in table.items()
    ]
    before = {p: p.stat().st_mtime_ns for p in tmp.glob("run*/**/*") if p.is_file()}
    results = dict(zip(table, run_all(commands), strict=True))
    assert before == {
        p: p.stat().st_mtime_ns for p in tmp.glob("run*/**/*") if p.is_file()
    }  # no run was touched
    return table, results, folders, tmp


def test_every_bad_input_is_one_line(outcomes):
    table, results, folders, tmp = outcomes
    wrong = []
    for name, (_, culprit) in table.items():
        status, _, err = results[name]
        if status != 2 or len(err.strip().splitlines()) != 1 or culprit not in err:
            wrong.append(f"{name}: status {status}, expected {culprit!r}: {err[-600:]}")
        if folders[name].exists():
            wrong.append(f"{name}: left {sorted(p.name for p in folders[name].rglob('*'))}")
    assert not wrong, "\n".join(wrong)
    assert len(table) >= 50
    assert not (tmp / "masks").exists() or not list((tmp / "masks").iterdir())


def test_no_code_in_a_checkpoint_is_run(outcomes):
    assert not Path("/tmp/reco-test-owned").exists()
