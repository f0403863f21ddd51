"""Short real runs of both scripts through the command line."""

import contextlib
import json
import shlex
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_semi
import train_supervised
import trees
from cli import ROOT, SMALL, check, run_many, run_script
from data import RECIPES, load_source
from engine.record import batch_of_step
from engine.setup import new_optimizer, start_step
from inputs.labels import split_train
from models import DeepLabV3Plus, MeanTeacher, new_model
from runs import ACCELERATE

SHORT = ["--iterations", "4", "--val-interval", "2", "--log-interval", "2"]


def test_the_main_job_in_short(tmp_path):
    """train_semi.py --reco through accelerate launch, on the embedded data, without --out-dir."""
    settings = """--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
        --num_cpu_threads_per_process 1"""
    command = [*ACCELERATE, *settings.split(), str(ROOT / "train_semi.py"), "--reco", *SHORT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "street-classmix-reco-20-seed0"
    files = "model.safetensors config.json checkpoint labeled.txt tensorboard history.json"
    assert {p.name for p in folder.iterdir()} == set(files.split())
    for text in ("20 labelled + 980 unlabelled", "best validation mIoU", "python predict.py"):
        assert text in done.stdout
    assert len((folder / "labeled.txt").read_text().split()) == 20
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["seed"] == 0
    assert len(config["classes"]) == len(config["palette"]) == 11
    assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["step"] == 4
    tags = (
        EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload().Tags()
    )
    curves = ["loss/total", "loss/supervised", "loss/unsupervised", "loss/reco", "learning rate"]
    curves += ["images per second", "teacher/eta", "reco/classes", "validation/teacher miou"]
    curves += ["validation/student miou", "validation/teacher boundary_iou"]
    assert set(curves) <= set(tags["scalars"])
    assert any(tag.startswith("training") for tag in tags["images"])
    assert any(tag.startswith("class relation") for tag in tags["images"])
    for word in ("Warning", "warn"):
        assert word not in done.stderr, done.stderr
    out = check("train_semi.py", "--reco", "--resume", cwd=tmp_path)  # the newest of that name
    assert "resumes at step 4 of 4" in out
    # the default folder gets a number when it is taken
    for _ in range(2):
        check("train_supervised.py", "--iterations", "1", "--num-labeled", "5", cwd=tmp_path)
    names = ["street-classmix-reco-20-seed0", "street-supervised-5-seed0"]
    names.append("street-supervised-5-seed0-2")
    assert {p.name for p in (tmp_path / "runs").iterdir()} == set(names)


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
        words = shlex.split(line.replace("dataset/cityscapes", str(cityscapes)))
        words += [*SMALL, "--iterations", "2", "--log-interval", "1", "--log-with", "none"]
        commands.append([*words, "--out-dir", tmp_path / f"run{i}"])
    for i, (line, (status, out, err)) in enumerate(zip(SPECIFIED, run_many(commands), strict=True)):
        assert status == 0, (line, err)
        assert "19 classes" in out and "best validation mIoU" in out
        names = (tmp_path / f"run{i}" / "labeled.txt").read_text().split()
        assert len(names) == len(set(names)) == (150 if "--num-labeled" in line else 152)


EVERYTHING = [
    "train_supervised.py --dataset pascal --num-labeled 3 --reco",
    "train_semi.py --dataset pascal --num-labeled 3 --mixing-strategy cutmix --model deeplabv3plus",
    "train_semi.py --dataset pascal --label-ratio p25 --mixing-strategy cutout --reco "
    "--reco-num-queries 8 --reco-num-negatives 8",
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
        words = shlex.split(line.replace("CACHE", str(tmp_path / "cache")))
        tree = getattr(trees, words[2])(tmp_path / f"data{i}")
        small = SMALL[:3] + SMALL[-4:] if "street" in words else SMALL
        words += ["--data-path", tree, *small, "--batch-size", "2", "--iterations", "2"]
        words += ["--val-interval", "1", "--log-with", "none", "--out-dir", tmp_path / f"run{i}"]
        commands.append(words)
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
    words = ["--dataset", "folder", "--data-path", tree, *SMALL, "--reco", "--batch-size", "2"]
    out = check("train_semi.py", *words, "--iterations", "2", "--out-dir", tmp_path / "run")
    assert "sparse masks" in out and "predict with" in out


def test_starting_from_a_run(tmp_path):
    """--init-from: a tenth of the rate by default; the weights stay the run's model until others
    are better."""
    tree = trees.folder(tmp_path / "data", train=4, val=2, unlabelled=4)
    common = ["--dataset", "folder", "--data-path", str(tree)]
    more = ["--crop-size", "48", "--num-workers", "0", "--log-with", "none"]
    words = [*SMALL, "--lr", "0.1", "--iterations", "20", "--val-interval", "20"]
    first = tmp_path / "first"
    check("train_supervised.py", *common, *more, *words, "--out-dir", first)
    before = load_file(first / "model.safetensors")
    for script in ("train_supervised.py", "train_semi.py"):  # a rate that ruins everything
        words = [*more, "--init-from", first, "--lr", "9", "--iterations", "1"]
        check(script, *common, *words, "--out-dir", tmp_path / script)
        after = load_file(tmp_path / script / "model.safetensors")
        history = json.loads((tmp_path / script / "history.json").read_text())
        assert [entry["step"] for entry in history] == [0, 1]
        assert history[0]["miou"] > history[1]["miou"]
        assert all(torch.equal(before[key], after[key]) for key in before)
    args = train_semi.parse_options([*common, "--init-from", str(first)])
    assert args.lr == pytest.approx(RECIPES["folder"]["lr"] / 10)
    config = json.loads((first / "config.json").read_text())
    config["arguments"]["recipe"] = "street"
    (first / "config.json").write_text(json.dumps(config))
    args = train_semi.parse_options([*common, "--init-from", str(first)])
    # the recipe of the run, the network too
    assert args.crop_size == [48, 48] and args.scale == [0.5, 1.5] and args.channels == 16


WATCHED = """
import gc, os, sys
sys.path.insert(0, {root!r})
import torch
import {module} as module
from engine import processes
start_step, destroy = module.start_step, torch.distributed.destroy_process_group

def write(*words):
    with open({seeds!r} + os.environ["RANK"], "a") as file:
        print(*words, file=file)

def watched(args, optimizer, accelerator, *steps):
    rng = start_step(args, optimizer, accelerator, *steps)
    write(*steps, torch.initial_seed())
    return rng

def destroyed(*group):
    network = torch.nn.parallel.DistributedDataParallel
    write("networks at the end:", sum(type(held) is network for held in gc.get_objects()))
    destroy(*group)

module.start_step, torch.distributed.destroy_process_group = watched, destroyed
processes.launch(module.main)
"""


@pytest.mark.parametrize("module", ["train_supervised", "train_semi"])
def test_two_processes(module, tmp_path):
    tree, seeds = trees.folder(tmp_path / "data", val=3), str(tmp_path / "seeds")
    program = WATCHED.format(root=str(ROOT), module=module, seeds=seeds)
    (tmp_path / "watched.py").write_text(program)
    words = ["--reco", "--dataset", "folder", "--data-path", tree, *SMALL[:-1], "1"]
    words += ["--iterations", "3", "--val-interval", "3", "--batch-size", "2", "--seed", "4"]
    out = check(tmp_path / "watched.py", *words, "--out-dir", tmp_path / "run", processes=2)
    assert "cpu x 2" in out and "global batch 4" in out
    assert out.count("best validation mIoU") == 1  # the other process prints nothing
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]
    recipe = RECIPES["folder"]
    batch = recipe["batch_size"] * (2 if module == "train_supervised" else 1)
    assert saved["processes"] == 2
    assert saved["lr"] == pytest.approx(recipe["lr"] * 4 / batch)  # by the global batch
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    # every validation pixel once
    assert torch.tensor(history[-1]["confusion"]).sum() == 3 * 48 * 64
    lines = [(tmp_path / f"seeds{rank}").read_text().splitlines() for rank in (0, 1)]
    for rank in lines:
        assert [line.split()[0] for line in rank[:-1]] == ["0", "1", "2"]
        assert rank[-1] == "networks at the end: 0"  # see end_collectives
    assert len({line.split()[-1] for rank in lines for line in rank[:-1]}) == 6  # own draws


def test_same_command_same_weights(tmp_path):
    tree = trees.folder(tmp_path / "data")
    for name, workers in (("a", "0"), ("b", "2")):  # real processes: each has its own hash seed
        words = ["--reco", "--dataset", "folder", "--data-path", tree, *SMALL[:-1], workers]
        words += [*SHORT, "--batch-size", "4", "--log-with", "none", "--out-dir", tmp_path / name]
        done = run_script("train_semi.py", *words)
        assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_network_learns(tmp_path):
    """Both scripts fit three easy classes within seconds."""
    tree = trees.folder(tmp_path / "data", train=6, val=4, unlabelled=6)
    words = f"""--dataset folder --data-path {tree} --recipe street --crop-size 48 --iterations 60
        --batch-size 4 --lr 0.1 --val-interval 60 --log-with none""".split()
    for script, options in (("train_supervised.py", []), ("train_semi.py", ["--reco"])):
        check(script, *options, *words, "--out-dir", tmp_path / script)
        assert json.loads((tmp_path / script / "history.json").read_text())[-1]["miou"] > 0.5


def test_partial_labels_of_the_streets_are_on_every_image(tmp_path):
    """A label ratio must not meet the default number of labelled images."""
    words = ["--reco", "--reco-random-queries", "--reco-random-keys", "--label-ratio", "p0"]
    words += ["--iterations", "1", "--batch-size", "2", "--log-with", "none"]
    out = check("train_semi.py", *words, "--out-dir", tmp_path / "run")
    assert "1000 labelled with p0 partial labels + 1000 unlabelled" in out
    assert "global batch 4 + 2," in out  # as many labelled ones as in supervised training


def test_labelled_batch_is_chosen_separately(tmp_path):
    words = ["train_semi.py", "--iterations", "1", "--log-with", "none"]
    words += ["--batch-size", "2", "--labeled-batch-size", "3", "--out-dir", tmp_path / "run"]
    assert "global batch 3 + 2," in check(*words)


# ---------------------------------------------------------------------------- gradient accumulation
MICRO_BATCHES = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}


class ByHand:
    """Accelerator and optimizer of two micro-batches per step in plain torch: the gradients are
    summed over both, then halved."""

    device, num_processes, process_index, optimizer_step_was_skipped = (
        torch.device("cpu"),
        1,
        0,
        False,
    )
    gradient_accumulation_steps, autocast = 2, contextlib.nullcontext

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def backward(self, loss):
        loss.backward()

    def unwrap_model(self, model, **options):
        return model

    def step(self):
        if self.sync_gradients:
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.grad /= 2
            self.optimizer.step()

    def zero_grad(self, **options):
        if self.sync_gradients:
            self.optimizer.zero_grad()


def by_hand(script, words: list[str]) -> tuple:
    """Student and teacher after the steps of the command line."""
    args = script.parse_options(words)
    source = load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    split = split_train(source, args, quiet=True)
    single = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    student, _ = new_model(args, source, single)
    teacher = MeanTeacher(student, average_statistics=args.average_statistics)
    hand = ByHand(new_optimizer(args, student))
    loaders = script.training_loaders(args, source, split, hand, 0)
    student.train()
    for micro_step in range(2 * args.iterations):
        hand.sync_gradients = micro_step % 2 == 1
        rng = start_step(args, hand, hand, micro_step // 2, micro_step)
        batches = [batch_of_step(loader, micro_step) for loader in loaders]
        networks = (student,) if script is train_supervised else (student, teacher)
        script.train_step(*batches, *networks, hand, hand, args, rng, split.partial)
    return student, teacher


@pytest.mark.parametrize("script", [train_supervised, train_semi])
def test_two_micro_batches_are_one_step_on_their_mean_gradient(script, tmp_path):
    """Draws by micro-step; learning rate, teacher, curves and progress by step."""
    tree, name = trees.folder(tmp_path / "data"), f"{script.__name__}.py"
    words = ["--reco", "--dataset", "folder", "--data-path", str(tree), *SMALL]
    words += ["--batch-size", "2", "--iterations", "3", "--log-with", "none"]
    words += ["--gradient-accumulation-steps", "2"]
    out = check(name, *words, "--save-interval", "1", "--out-dir", tmp_path / "run")
    assert "global batch 4 " in out or "global batch 4 + 4 " in out
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 3 and [entry["step"] for entry in state["history"]] == [3]
    student, teacher = by_hand(script, words)
    for key, value in student.state_dict().items():
        assert torch.equal(state["model"][key], value), key
    if script is train_semi:
        assert state["teacher"]["step"] == teacher.step == 3
        for key, value in teacher.model.state_dict().items():
            assert torch.equal(state["teacher"]["model"][key], value), key


def test_a_resumed_run_keeps_its_micro_batches(tmp_path):
    """Stopped by a signal in the middle of a step, it ends as an uninterrupted one."""
    words = ["--reco", "--dataset", "folder", "--data-path", trees.folder(tmp_path / "data")]
    words += [*SMALL, "--batch-size", "2", "--iterations", "3", "--log-with", "none"]
    check("train_semi.py", *words, "--out-dir", tmp_path / "whole", **MICRO_BATCHES)
    (tmp_path / "stopped.py").write_text(STOPPED.format(root=str(ROOT)))
    done = run_script(
        tmp_path / "stopped.py", *words, "--out-dir", tmp_path / "cut", **MICRO_BATCHES
    )
    assert done.returncode == 143 and "stopped at step 2 of 3" in done.stdout, done.stderr
    check("train_semi.py", "--out-dir", tmp_path / "cut", "--resume")  # without the variable
    whole, cut = (
        torch.load(tmp_path / name / "checkpoint" / "state.pt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert cut["step"] == 3 and cut["teacher"]["step"] == 3
    assert all(torch.equal(value, cut["model"][key]) for key, value in whole["model"].items())


STOPPED = """
import signal, sys
sys.path.insert(0, {root!r})
import train_semi
from engine import processes
start_step = train_semi.start_step

def stopped(args, optimizer, accelerator, step, micro_step):
    if micro_step == 2:  # the first half of the second step
        signal.raise_signal(signal.SIGTERM)
    return start_step(args, optimizer, accelerator, step, micro_step)

train_semi.start_step = stopped
processes.launch(train_semi.main)
"""


# ------------------------------------------------------------------------------------- single steps
def one_step(label_l, label_u, skipped=False):
    """A step with labels [2, 32, 32] of the two batches: teacher, student, losses."""
    args = train_semi.parse_options(["--reco", "--crop-size", "32", "--scale", "1", "1"])
    torch.manual_seed(0)
    model = DeepLabV3Plus(3, "test_resnet", rep_dim=8, pretrained=False, channels=8, low_channels=8)
    teacher, optimizer = MeanTeacher(model), torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        backward=lambda loss: loss.backward(),
        sync_gradients=True,
        optimizer_step_was_skipped=skipped,
        unwrap_model=lambda model, **options: model,
    )
    batches = (images, label_l), (images, label_u)
    common = model, teacher, optimizer, accelerator, args, np.random.default_rng(0)
    losses, _ = train_semi.train_step(*batches, *common, partial=True)
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
    student must not enter the average."""
    label = torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    for skipped, steps in ((True, 0), (False, 1)):
        teacher, _, losses = one_step(label, label, skipped)
        assert teacher.step == steps and torch.isfinite(losses["loss/total"])


def test_known_pixels_of_unlabelled_images_are_sure_pseudo_labels():
    nothing = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    points = nothing.clone()
    points[:, ::8, ::8] = 1
    for labels, learned in (((points, nothing), "supervised"), ((nothing, points), "unsupervised")):
        losses = one_step(*labels)[2]
        other = {"supervised": "unsupervised", "unsupervised": "supervised"}[learned]
        assert losses[f"loss/{learned}"] > 0 and losses[f"loss/{other}"] == 0


def test_reco_keeps_known_pixels():
    """At stride 4 nearest sampling loses 15 of 16 single pixels: with one pixel per class and
    image ReCo would have hardly a label."""
    points = torch.full((2, 32, 32), 255)
    points[0, 1, 2], points[0, 11, 30], points[1, 21, 3] = 0, 1, 2  # none is nearest to a cell
    nothing = torch.full_like(points, 255)
    guess = torch.zeros(2, 32, 32, dtype=torch.int64)  # the teacher's, unsure
    for label_l, known_u in ((points, nothing), (nothing, points)):
        label_u = torch.where(known_u != 255, known_u, guess)
        confidence = (known_u != 255).float()
        maps = torch.zeros(2, 3, 32, 32), label_l, label_u, confidence, known_u
        label, valid = train_semi.reco_targets(*maps, (8, 8), weak_threshold=0.7, partial=True)
        assert sorted(label[valid].tolist()) == [0, 1, 2]
