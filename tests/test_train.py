"""Short real runs of both scripts through the command line."""

import contextlib
import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_semi
import trees
from cli import ROOT, SMALL, check, run_many, run_script
from data import RECIPES
from models import DeepLabV3Plus, MeanTeacher

SHORT = ["--iterations", "4", "--val-interval", "2", "--log-interval", "2"]


def test_the_main_job_in_short(tmp_path):
    """train_semi.py --reco through accelerate launch, on the embedded data, without --out-dir."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
        str(ROOT / "train_semi.py"),
        "--reco",
        *SHORT,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "street-classmix-reco-20-seed0"
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "checkpoint",
        "labeled.txt",
        "tensorboard",
        "history.json",
    }
    assert (
        "20 labelled + 980 unlabelled" in done.stdout
        and "best validation mIoU" in done.stdout
        and "python predict.py" in done.stdout
    )
    assert len((folder / "labeled.txt").read_text().split()) == 20
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["arguments"]["seed"] == 0 and len(config["classes"]) == len(config["palette"]) == 11
    )
    assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["step"] == 4
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert {
        "loss/total",
        "loss/supervised",
        "loss/unsupervised",
        "loss/reco",
        "learning rate",
        "images per second",
        "teacher/eta",
        "reco/classes",
        "validation/teacher miou",
        "validation/student miou",
        "validation/teacher boundary_iou",
    } <= set(events.Tags()["scalars"])
    assert any(tag.startswith("training") for tag in events.Tags()["images"])
    assert any(tag.startswith("class relation") for tag in events.Tags()["images"])
    for word in ("Warning", "warn"):
        assert word not in done.stderr, done.stderr
    told = check("train_semi.py", "--reco", "--resume", cwd=tmp_path)  # the newest of that name
    assert "goes on at step 4 of 4" in told
    # the default folder gets a number when it is taken
    for _ in range(2):
        check("train_supervised.py", "--iterations", "1", "--num-labeled", "5", cwd=tmp_path)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        "street-classmix-reco-20-seed0",
        "street-supervised-5-seed0",
        "street-supervised-5-seed0-2",
    }


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    return trees.cityscapes(tmp_path_factory.mktemp("cityscapes"), train=152, val=2, size=(32, 64))


CITYSCAPES = "--dataset cityscapes --data-path dataset/cityscapes"
SPECIFIED = [
    f"train_supervised.py {CITYSCAPES} --num-labeled 150 --val-interval 500 --model reconet",
    f"train_semi.py {CITYSCAPES} --num-labeled 150 --val-interval 500 --model reconet "
    "--mixing-strategy classmix",
    f"train_semi.py {CITYSCAPES} --num-labeled 150 --val-interval 500 --model reconet "
    "--mixing-strategy classmix --reco --reco-weight 1.0 --reco-temp 0.5 --reco-num-queries 256 "
    "--reco-num-negatives 256 --reco-threshold 0.97",
    f"train_supervised.py {CITYSCAPES} --label-ratio p1 --seed 0 --val-interval 500 "
    "--model reconet",
    f"train_semi.py {CITYSCAPES} --label-ratio p0 --seed 0 --val-interval 500 --model reconet "
    "--mixing-strategy classmix --reco",
]


def test_published_command_lines(cityscapes, tmp_path):
    """As written, but for a small network and two steps."""
    commands = []
    for i, line in enumerate(SPECIFIED):
        words = [
            str(cityscapes) if word == "dataset/cityscapes" else word for word in shlex.split(line)
        ]
        commands.append(
            [
                *words,
                *SMALL,
                "--iterations",
                "2",
                "--log-interval",
                "1",
                "--log-with",
                "none",
                "--out-dir",
                tmp_path / f"run{i}",
            ]
        )
    for i, (line, (status, out, err)) in enumerate(zip(SPECIFIED, run_many(commands), strict=True)):
        assert status == 0, (line, err)
        assert "19 classes" in out and "best validation mIoU" in out
        names = (tmp_path / f"run{i}" / "labeled.txt").read_text().split()
        assert len(names) == len(set(names)) == (150 if "--num-labeled" in line else 152)


EVERYTHING = [
    "train_supervised.py --dataset pascal --num-labeled 3 --reco",
    "train_semi.py --dataset pascal --num-labeled 3 --mixing-strategy cutmix --model deeplabv3plus",
    "train_semi.py --dataset pascal --label-ratio p25 --mixing-strategy cutout --reco "
    "--reco-sampling independent --reco-num-queries 8 --reco-num-negatives 8",
    "train_semi.py --dataset sun --num-labeled 0 --reco --warmup-iterations 1 "
    "--mixing-strategy none",
    "train_semi.py --dataset camvid --num-labeled 2 --reco --mixing-strategy cutmix",
    "train_supervised.py --dataset sun --label-ratio p5 --reco --cache-dir CACHE",
    "train_semi.py --dataset folder --recipe street --num-labeled 2 --reco",
    "train_supervised.py --dataset folder --model deeplabv3plus",
]


def test_every_data_set_and_option(tmp_path):
    commands = []
    for i, line in enumerate(EVERYTHING):
        script, *words = shlex.split(line.replace("CACHE", str(tmp_path / "cache")))
        tree = getattr(trees, words[1])(tmp_path / f"data{i}")
        small = SMALL[:3] + SMALL[-4:] if "street" in words else SMALL
        if "deeplabv3plus" in words and "--rep-dim" in small:  # has no meaning there
            small = small[: small.index("--rep-dim")] + small[small.index("--rep-dim") + 2 :]
        commands.append(
            [
                script,
                *words,
                "--data-path",
                tree,
                *small,
                "--batch-size",
                "2",
                "--iterations",
                "2",
                "--val-interval",
                "1",
                "--log-with",
                "none",
                "--out-dir",
                tmp_path / f"run{i}",
            ]
        )
    for i, (line, (status, _, err)) in enumerate(zip(EVERYTHING, run_many(commands), strict=True)):
        assert status == 0, (line, err)
        assert load_file(tmp_path / f"run{i}" / "model.safetensors")
        assert len(json.loads((tmp_path / f"run{i}" / "history.json").read_text())) == 2
    assert len(list((tmp_path / "cache").rglob("*.npy"))) > 0  # --cache-dir was used


def test_sparse_masks_switch_partial_labels_on(tmp_path):
    """Also where no labelled pixel of the validation is left at the representation's size."""
    tree = trees.folder(tmp_path / "data", painted=0.2, palette=False)
    for path in (tree / "labels" / "val").iterdir():
        label = np.full_like(np.array(Image.open(path)), 255)
        label[1, 1:4] = 0, 1, 2
        Image.fromarray(label).save(path)
    out = check(
        "train_semi.py",
        "--dataset",
        "folder",
        "--data-path",
        tree,
        *SMALL,
        "--reco",
        "--batch-size",
        "2",
        "--iterations",
        "2",
        "--out-dir",
        tmp_path / "run",
    )
    assert "sparse masks" in out and "predict with" in out


def test_going_on_from_a_run(tmp_path):
    """--init-from: a tenth of the rate by default; the weights stay the run's model until others
    are better."""
    tree = trees.folder(tmp_path / "data", train=4, val=2, unlabelled=4)
    common = [
        "--dataset",
        "folder",
        "--data-path",
        tree,
        "--crop-size",
        "48",
        "--num-workers",
        "0",
        "--log-with",
        "none",
    ]
    check(
        "train_supervised.py",
        *common,
        *SMALL,
        "--lr",
        "0.1",
        "--iterations",
        "20",
        "--val-interval",
        "20",
        "--out-dir",
        tmp_path / "first",
    )
    first = load_file(tmp_path / "first" / "model.safetensors")
    for script in ("train_supervised.py", "train_semi.py"):  # a rate that ruins everything
        check(
            script,
            *common,
            "--init-from",
            tmp_path / "first",
            "--lr",
            "9",
            "--iterations",
            "1",
            "--out-dir",
            tmp_path / script,
        )
        second, history = (
            load_file(tmp_path / script / "model.safetensors"),
            json.loads((tmp_path / script / "history.json").read_text()),
        )
        assert [entry["step"] for entry in history] == [0, 1] and history[0]["miou"] > history[1][
            "miou"
        ]
        assert all(torch.equal(first[key], second[key]) for key in first)
    args = train_semi.parse_options(["--init-from", str(tmp_path / "first")])
    assert args.lr == pytest.approx(RECIPES["street"]["lr"] / 10)
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    config["arguments"]["recipe"] = "street"
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    args = train_semi.parse_options([*map(str, common[:4]), "--init-from", str(tmp_path / "first")])
    # the recipe of the run, the network too
    assert args.crop_size == [48, 48] and args.scale == [0.5, 1.5] and args.channels == 16


TOLD = """
import gc, os, sys
sys.path.insert(0, {root!r})
import torch
import processes, run
import {module} as module
seed_step, destroy = run.seed_step, torch.distributed.destroy_process_group

def tell(*words):
    with open({seeds!r} + os.environ["RANK"], "a") as file:
        print(*words, file=file)

def told(*key):
    tell(*key)
    return seed_step(*key)

def destroyed(*group):
    network = torch.nn.parallel.DistributedDataParallel
    tell("networks at the end:", sum(type(held) is network for held in gc.get_objects()))
    destroy(*group)

run.seed_step, torch.distributed.destroy_process_group = told, destroyed
processes.launch(module.main)
"""


@pytest.mark.parametrize("module", ["train_supervised", "train_semi"])
def test_two_processes(module, tmp_path):
    tree, seeds = trees.folder(tmp_path / "data", val=3), str(tmp_path / "seeds")
    (tmp_path / "told.py").write_text(TOLD.format(root=str(ROOT), module=module, seeds=seeds))
    words = ["--reco", "--dataset", "folder", "--data-path", tree, *SMALL[:-1], "1"]
    words += ["--iterations", "3", "--val-interval", "3", "--batch-size", "2", "--seed", "4"]
    out = check(
        tmp_path / "told.py",
        *words,
        "--out-dir",
        tmp_path / "run",
        processes=2,
    )
    assert (
        "cpu x 2" in out and "global batch 4" in out and out.count("best validation mIoU") == 1
    )  # the other process is quiet
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]
    assert saved["processes"] == 2 and saved["recipe_batch"] != 4
    assert saved["base_lr"] == saved["lr"] * 4 / saved["recipe_batch"]  # by the global batch
    confusion = torch.tensor(
        json.loads((tmp_path / "run" / "history.json").read_text())[-1]["confusion"]
    )
    assert confusion.sum() == 3 * 48 * 64  # every validation pixel once
    for rank in (0, 1):  # each draws its own
        drawn = (tmp_path / f"seeds{rank}").read_text().splitlines()
        assert drawn[:-1] == [f"4 {step} {rank}" for step in range(3)]
        # the process group must go last: see end_collectives
        assert drawn[-1] == "networks at the end: 0"


def test_same_command_same_weights(tmp_path):
    tree = trees.folder(tmp_path / "data")
    for name, workers in (("a", "0"), ("b", "2")):  # real processes: each has its own hash seed
        done = run_script(
            "train_semi.py",
            "--reco",
            "--dataset",
            "folder",
            "--data-path",
            tree,
            *SMALL[:-1],
            workers,
            *SHORT,
            "--batch-size",
            "4",
            "--log-with",
            "none",
            "--out-dir",
            tmp_path / name,
        )
        assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_network_learns(tmp_path):
    """Both scripts fit three easy classes within seconds."""
    tree = trees.folder(tmp_path / "data", train=6, val=4, unlabelled=6)
    for script, options in (("train_supervised.py", []), ("train_semi.py", ["--reco"])):
        check(
            script,
            *options,
            "--dataset",
            "folder",
            "--data-path",
            tree,
            "--recipe",
            "street",
            "--crop-size",
            "48",
            "--iterations",
            "60",
            "--batch-size",
            "4",
            "--lr",
            "0.1",
            "--val-interval",
            "60",
            "--log-with",
            "none",
            "--out-dir",
            tmp_path / script,
        )
        assert json.loads((tmp_path / script / "history.json").read_text())[-1]["miou"] > 0.5


def test_partial_labels_of_the_streets_are_on_every_image(tmp_path):
    """A label ratio must not meet the default number of labelled scenes."""
    words = ["--iterations", "1", "--batch-size", "2", "--log-with", "none"]
    ((status, out, err),) = run_many(
        [
            [
                "train_semi.py",
                "--reco",
                "--reco-random-queries",
                "--reco-random-keys",
                "--label-ratio",
                "p0",
                *words,
                "--out-dir",
                tmp_path / "run",
            ]
        ]
    )
    assert status == 0, err
    assert "1000 labelled with p0 partial labels + 1000 unlabelled" in out
    assert "global batch 4 + 2," in out  # as many labelled ones as in supervised training


def test_labelled_batch_is_chosen_apart(tmp_path):
    words = ["train_semi.py", "--iterations", "1", "--log-with", "none"]
    words += ["--batch-size", "2", "--labeled-batch-size", "3", "--out-dir", tmp_path / "run"]
    ((status, out, err),) = run_many([words])
    assert status == 0, err
    assert "global batch 3 + 2," in out


def test_independent_sampling_of_several_processes_is_refused(tmp_path):
    done = run_script(
        "train_semi.py",
        "--reco",
        "--reco-sampling",
        "independent",
        "--iterations",
        "1",
        "--out-dir",
        tmp_path / "run",
        processes=2,
    )
    assert (
        done.returncode != 0
        and done.stderr.count("--reco-sampling independent runs on one process only") == 1
    )
    assert not (tmp_path / "run").exists()


def one_step(label_l, label_u, skipped=False):
    """A step with labels [2, 32, 32] of the two batches: teacher, student, losses."""
    args = train_semi.parse_options(["--reco", "--crop-size", "32", "--scale", "1", "1"])
    args.partial = True
    torch.manual_seed(0)
    model = DeepLabV3Plus(3, "test_resnet", rep_dim=8, pretrained=False, channels=8, low_channels=8)
    teacher, optimizer = MeanTeacher(model), torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        reduce=lambda x, how: x,
        backward=lambda loss: loss.backward(),
        optimizer_step_was_skipped=skipped,
        unwrap_model=lambda model, **options: model,
    )
    losses, _ = train_semi.train_step(
        (images, label_l),
        (images, label_u),
        model,
        teacher,
        optimizer,
        accelerator,
        args,
        np.random.default_rng(0),
    )
    return teacher, model, losses


def test_each_batch_has_its_own_statistics():
    label = torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    teacher, student, _ = one_step(label, label)
    assert student.aspp.project[1].num_batches_tracked == 2
    assert teacher.model.aspp.project[1].num_batches_tracked == 1
    # the first average is the student, as it is after the optimiser's step
    assert all(map(torch.equal, teacher.model.parameters(), student.parameters()))


def test_a_skipped_step_leaves_the_teacher_alone():
    """fp16: where the gradient scaler finds an overflow it skips the optimiser's step, and the
    average must not take the student in."""
    label = torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    for skipped, steps in ((True, 0), (False, 1)):
        teacher, _, losses = one_step(label, label, skipped)
        assert teacher.step == steps and torch.isfinite(losses["loss/total"])


def test_known_pixels_of_unlabelled_images_are_sure_pseudo_labels():
    """Of labels with these few pixels the labelled batch brings twice as many images."""
    nothing = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    points = nothing.clone()
    points[:, ::8, ::8] = 1
    for labels, learned in (((points, nothing), "supervised"), ((nothing, points), "unsupervised")):
        losses = one_step(*labels)[2]
        other = {"supervised": "unsupervised", "unsupervised": "supervised"}[learned]
        assert losses[f"loss/{learned}"] > 0 and losses[f"loss/{other}"] == 0


def test_contrast_keeps_known_pixels():
    """At stride 4 nearest sampling loses 15 of 16 single pixels: with one pixel per class and
    image ReCo had hardly a label."""
    args = train_semi.parse_options(["--reco"])
    points = torch.full((2, 32, 32), 255)
    points[0, 1, 2], points[0, 11, 30], points[1, 21, 3] = 0, 1, 2  # none is nearest to a cell
    nothing = torch.full_like(points, 255)
    logits, rep = torch.zeros(4, 3, 8, 8), torch.randn(4, 5, 8, 8)
    guess = torch.zeros(2, 32, 32, dtype=torch.int64)  # the teacher's, unsure
    for label_l, known in ((points, nothing), (nothing, points)):
        label_u = torch.where(known != 255, known, guess)
        confidence = (known != 255).float()
        _, stats = train_semi.contrast(
            logits, rep, torch.zeros(2, 3, 32, 32), label_l, label_u, confidence, True, args
        )
        assert stats["num_classes"] == 3 and stats["num_hard"].tolist() == [1, 1, 1]
