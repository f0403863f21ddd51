"""The optimiser of a run: rates, a frozen backbone, AdamW through a stop and --resume."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import cli
import train_semi
import train_supervised
import trees
from engine import checkpoint, setup
from engine.processes import cores
from models import DeepLabV3Plus, MeanTeacher

TINY = """--dataset folder --recipe street --batch-size 2 --channels 8
    --crop-size 32 --log-with none --num-workers 0 --val-interval 1"""


@pytest.fixture
def words(tmp_path):
    return [*TINY.split(), "--data-path", str(trees.folder(tmp_path / "data", size=(32, 40)))]


def network() -> DeepLabV3Plus:
    return DeepLabV3Plus(3, "test_resnet", 8, False, channels=8, low_channels=8)


def options(**changed):
    args = train_supervised.parse_options([])
    vars(args).update(changed)
    return args


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        # what `accelerate launch` sets where nobody asked for a CPU
        ({"ACCELERATE_USE_CPU": "False", "WORLD_SIZE": "1"}, "python x.py --out-dir r --resume"),
        (
            {"ACCELERATE_USE_CPU": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 x.py --out-dir r --resume",
        ),
        (
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},
            "the command of every machine, with --out-dir r --resume",
        ),
    ],
)
def test_the_command_that_resumes_a_run(environment, command, monkeypatch):
    for name in ("ACCELERATE_USE_CPU", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert setup.resume_command(SimpleNamespace(script="x.py"), Path("r")) == command


@pytest.mark.parametrize("option", ["--labeled-list", "--backbone-weights"])
def test_a_missing_file_is_reported_before_the_data_are_read(option, script):
    words = "--dataset", "camvid", "--data-path", "x", option, "nowhere"
    status, _, told = script(train_semi, *words)
    assert status == 2 and told.endswith(f"{option} nowhere: no such file\n")


def test_heads_and_backbone_have_their_rates():
    model = network()
    optimizer = setup.new_optimizer(options(optimizer="adamw", backbone_lr_scale=0.025), model)
    heads, backbone = optimizer.param_groups
    assert heads["betas"] == (0.9, 0.999)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}
    assert len(heads["params"]) + len(backbone["params"]) == len(list(model.parameters()))
    whole = setup.new_optimizer(options(), model)
    assert isinstance(whole, torch.optim.SGD) and len(whole.param_groups) == 1

    accelerator = SimpleNamespace(process_index=0)
    setup.start_step(options(lr=1e-3, iterations=10), optimizer, accelerator, 0, 0)
    assert (heads["lr"], backbone["lr"]) == (1e-3, pytest.approx(2.5e-5))


def test_draws_follow_seed_step_and_process():
    keys = list(itertools.product((0, 1), repeat=3))
    optimizer = SimpleNamespace(param_groups=[])

    def draw(seed, micro_step, rank):
        accelerator = SimpleNamespace(process_index=rank)
        args = options(seed=seed, iterations=10)
        rng = setup.start_step(args, optimizer, accelerator, 0, micro_step)
        return rng.random(), float(torch.rand(()))

    first, again = ([draw(*k) for k in keys] for _ in "12")
    assert first == again
    assert all(len(set(values)) == len(keys) for values in zip(*first, strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_optimiser_is_that_of_the_options(kind):
    (group,) = setup.new_optimizer(
        options(weight_decay=0.003, optimizer=kind), network()
    ).param_groups
    assert group["weight_decay"] == 0.003
    if kind == "sgd":
        assert group["momentum"] == 0.9 and group["nesterov"]


THREADS = """
import torch
import train_supervised
from engine import setup
torch.set_num_threads = lambda number: print("threads set to", number)
words = ["--num-workers", "0", "--log-with", "none"]
setup.start_accelerator(train_supervised.parse_options(words))
print("started")
"""


@pytest.mark.parametrize("given", [None, "3"])
def test_accelerate_launch_uses_all_cores_or_the_threads_it_is_told(tmp_path, given):
    script = tmp_path / "script.py"
    script.write_text(THREADS)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(cli.ROOT)}
    if given:
        environment["OMP_NUM_THREADS"] = given
    command = [sys.executable, "-m", "accelerate.commands.launch", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = "" if given else f"threads set to {cores()}\n"
    assert done.stdout == f"{expected}started\n", done.stderr


def test_a_frozen_backbone_has_no_gradient_and_keeps_its_statistics():
    model = network()
    model.freeze_backbone()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    teacher = MeanTeacher(model.train())
    seen = []
    for network_ in (model, teacher.model):
        network_.backbone.register_forward_hook(lambda *call: seen.extend(call[-1]))
        network_.train()
        logits, rep = network_(torch.rand(2, 3, 32, 32))
    logits, rep = model(torch.rand(2, 3, 32, 32))
    (logits.sum() + rep.sum()).backward()
    assert seen and not any(features.requires_grad for features in seen)  # no graph is kept
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.aspp.parameters())
    after = model.eval().train().backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    optimizer = setup.new_optimizer(options(backbone_lr_scale=0.0), model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_run_with_a_frozen_backbone_keeps_its_weights(script, words, tmp_path):
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    words += [
        "--backbone",
        "vit_tiny_patch16_224",
        "--backbone-weights",
        str(tmp_path / "vit.safetensors"),
    ]
    words += ["--iterations", "2", "--out-dir", str(tmp_path / "run")]
    status, out, err = script(train_semi, "--reco", *words, "--backbone-lr-scale", "0")
    assert status == 0, err
    assert "learning rate 0.0001 = 0.0002 x 2/4" in out and "backbone frozen" in out
    trained = load_file(tmp_path / "run" / "model.safetensors")
    own = {k.removeprefix("backbone.model."): v for k, v in trained.items() if "backbone." in k}
    assert own and all(torch.equal(value, state[key]) for key, value in own.items())


def test_adamw_resumes_to_the_bit(script, words, tmp_path, monkeypatch):
    words += ["--optimizer", "adamw", "--backbone-lr-scale", "0.5", "--iterations", "4"]
    assert script(train_supervised, *words, "--out-dir", tmp_path / "whole")[0] == 0
    step, taken = train_supervised.train_step, []

    def stopped_at_2(*args, **options):
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **options)

    monkeypatch.setattr(train_supervised, "train_step", stopped_at_2)
    status, out, _ = script(train_supervised, *words, "--out-dir", tmp_path / "cut")
    assert status == 128 + signal.SIGTERM and "stopped at step 2 of 4" in out
    status, out, _ = script(train_supervised, "--out-dir", tmp_path / "cut", "--resume")
    assert status == 0 and "backbone 2.5e-05" in out and len(taken) == 4
    states = [checkpoint.load_state(tmp_path / name) for name in ("whole", "cut")]
    whole, cut = (dict(state["optimizer"]["state"]) for state in states)
    assert whole.keys() == cut.keys() and len(whole) > 10
    for key, entries in whole.items():
        assert all(torch.equal(value, cut[key][name]) for name, value in entries.items())
    whole, cut = (state["model"] for state in states)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("file", "labels"),
    [("splits/92/labeled.txt", "92"), ("mine.txt", "mine"), ("labeled.txt", "labeled")],
)
def test_a_published_split_names_the_folder(file, labels):
    args = SimpleNamespace(dataset="pascal", method="supervised", seed=0, labeled_list=file)
    args.label_ratio = args.num_labeled = None
    assert checkpoint.default_folder(args).name == f"pascal-supervised-{labels}-seed0"
