"""The network and the teacher against the reference's numbers (tests/golden), the start of a run,
and a trained network: loaded from a folder, saved for the Hub, which is never asked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
import train_supervised
import trees
from data import RECIPES, load_source
from engine import setup
from engine.checkpoint import write_weights
from engine.options import parse, training_parser
from inputs.errors import UserError
from models import DeepLabV3Plus, MeanTeacher, convert_reco_checkpoint

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"


def published_weights() -> dict[str, torch.Tensor]:
    """A checkpoint under the published names, filled by the recipe of the golden file."""
    state = {}
    shapes = json.loads((GOLDEN / "upstream_deeplabv3plus_keys.json").read_text())
    for i, key in enumerate(sorted(shapes)):
        r, s = np.random.RandomState(i), shapes[key]
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(1)
            continue
        noise = r.randn(*s)
        if key.endswith("running_mean"):
            value = 0.1 * noise
        elif key.endswith("running_var"):
            value = 1 + 0.1 * np.abs(noise)
        elif len(s) == 1:
            value = 0.1 * noise + (1 if key.endswith("weight") else 0)
        else:
            value = noise * np.sqrt(1 / np.prod(s[1:]))
        state[key] = torch.from_numpy(value.astype(np.float32))
    return state


# --------------------------------------------------------------------------- network and teacher
def test_golden_forward():
    golden = np.load(GOLDEN / "deeplabv3plus_forward.npz")
    bare = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # the reference normalises elsewhere
    model = DeepLabV3Plus(19, "resnet101", rep_dim=256, pretrained=False, **bare).eval()
    model.load_state_dict(convert_reco_checkpoint(published_weights()))  # strict: all of it fits
    with torch.no_grad():
        logits, rep = model(torch.from_numpy(golden["x"]))
    assert logits.shape == (1, 19, 17, 25) and rep.shape == (1, 256, 17, 25)
    assert np.abs(logits.numpy() - golden["logits"]).max() < 1e-4
    assert np.abs(rep[:, :32].numpy() - golden["representation"]).max() < 1e-4


def test_golden_teacher_and_rate():
    golden = np.load(GOLDEN / "ema_and_lr.npz")
    student = torch.nn.Linear(1, 1, bias=False).double()
    teacher = MeanTeacher(student)
    for value, expected in zip(golden["student"], golden["teacher"], strict=True):
        student.weight.data.fill_(value)
        teacher.update(student)
        # the golden values went through float32
        assert teacher.model.weight.item() == pytest.approx(expected, rel=1e-6)
    rates = [setup.learning_rate(2.5e-3, epoch, 200) for epoch in range(200)]
    np.testing.assert_allclose(rates, golden["poly_lr_per_epoch"], rtol=1e-12)
    assert setup.learning_rate(2.5e-3, 200, 200) == 1e-6
    assert setup.learning_rate(1e-7, 100, 200) == 1e-7  # a smaller rate is not raised


def test_teacher_averages_only_parameters():
    student = torch.nn.BatchNorm1d(2)
    teacher = MeanTeacher(student)
    student.running_mean.fill_(5)
    teacher.update(student)
    assert teacher.model.running_mean.eq(0).all() and teacher.model.training
    teacher.update(student, statistics=True)
    assert teacher.model.running_mean.eq(5).all() and teacher.step == 2
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_teacher_with_averaged_statistics():
    student = torch.nn.BatchNorm1d(2)
    teacher = MeanTeacher(student, average_statistics=True)
    for value, decay in ((4.0, 0.0), (8.0, 0.5), (2.0, 2 / 3)):
        expected = decay * teacher.model.running_mean + (1 - decay) * value
        student.running_mean.fill_(value)
        student.weight.data.fill_(value)
        teacher.update(student)
        torch.testing.assert_close(teacher.model.running_mean, expected)
        torch.testing.assert_close(teacher.model.weight, expected)
    assert not teacher.model.training  # labels do not depend on the other images of a batch


def test_decoder_at_stride_2():
    shape = dict(channels=16, low_channels=8, aspp_rates=(1, 2, 3))
    model = DeepLabV3Plus(4, "test_resnet", None, False, output_stride=8, decoder_stride=2, **shape)
    logits, rep = model(torch.rand(2, 3, 64, 48))
    assert logits.shape == (2, 4, 32, 24) and rep is None
    assert model.backbone.feature_info.reduction() == [2, 8]


def test_mean_and_std_as_arrays():
    mean, std = np.zeros(3), np.full(3, 0.5)
    model = DeepLabV3Plus(2, "test_resnet", None, False, mean, std, channels=8, low_channels=8)
    assert model.mean.flatten().tolist() == [0, 0, 0] and model.std.dtype == torch.float32
    assert model.std.flatten().tolist() == [0.5] * 3
    assert model.eval()(torch.rand(1, 3, 33, 40))[0].shape == (1, 2, 9, 10)


# ------------------------------------------------------------------------------ start of a run
def start(*words: str, processes: int = 1, device: str = "cpu") -> tuple[DeepLabV3Plus, dict]:
    args = parse(training_parser("", "train_supervised.py", RECIPES), RECIPES, [*words])
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
    return models.new_model(args, load_source("street", None), accelerator)


def test_a_backbone_that_cannot_be_dilated_is_noted(capsys):
    words = ["--backbone", "vgg11", "--channels", "8", "--decoder-stride", "4"]
    model, config = start(*words)
    line = "note: --backbone vgg11 cannot be dilated: its output stride is 32\n"
    assert line in capsys.readouterr().out
    assert config["model"]["output_stride"] == 8  # what the recipe asks for
    models.Segmenter(config).load_state_dict(model.state_dict(), strict=False)
    assert capsys.readouterr().out == ""  # only at the start of a run
    with pytest.raises(UserError, match="--crop-size 31 48"):
        start(*words, "--crop-size", "31", "48")


def test_synchronised_batch_norm_keeps_the_network(monkeypatch):
    """timm's norm layers have an activation, which torch's own converter drops."""
    monkeypatch.setattr(DeepLabV3Plus, "to", lambda model, *place, **options: model)  # no GPU here
    words = ["--backbone", "test_efficientnet", "--channels", "8"]

    def synchronised(model: torch.nn.Module) -> bool:
        return any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())

    plain, converted, on_cpu = (
        start(*words, processes=processes, device=device)[0].eval()
        for processes, device in ((1, "cuda"), (2, "cuda"), (2, "cpu"))
    )
    assert synchronised(converted)
    assert not any(type(m) is torch.nn.BatchNorm2d for m in converted.modules())
    assert not synchronised(plain) and not synchronised(on_cpu)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(converted(x)[0], plain(x)[0])


@pytest.mark.parametrize("theirs", ["reconet", "deeplabv3plus"])
@pytest.mark.parametrize("ours", ["reconet", "deeplabv3plus"])
def test_init_from_takes_every_weight_that_both_have(tmp_path, ours, theirs):
    run = tmp_path / "run"
    run.mkdir()
    model, config = start("--model", theirs, "--seed", "1")
    write_weights(run, model)
    config["arguments"] |= {"mixed_precision": "no"}
    (run / "config.json").write_text(json.dumps(config))
    fresh = start("--model", ours)[0].state_dict()
    trained = start("--model", ours, "--init-from", str(run))[0].state_dict()
    given = model.state_dict()
    assert trained.keys() == fresh.keys()
    for key, value in trained.items():
        assert torch.equal(value, given.get(key, fresh[key])), key


# --------------------------------------------------------------------------- a trained network
TINY = """--dataset folder --recipe street --batch-size 2 --channels 8 --crop-size 32
    --log-with none --num-workers 0 --iterations 1"""


@pytest.fixture
def run(script, tmp_path):
    data = trees.folder(tmp_path / "data", size=(32, 40))
    words = [*TINY.split(), "--data-path", data, "--num-labeled", "4", "--out-dir"]
    status, _, err = script(train_supervised, *words, tmp_path / "run")
    assert status == 0, err
    return tmp_path / "run"


def test_a_network_is_saved_and_loaded_as_on_the_hub(run, tmp_path):
    model, image = models.load(run), np.random.randint(0, 255, (40, 50, 3), np.uint8)
    folder = tmp_path / "repository"
    model.save_pretrained(folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    for again in (models.load(folder), models.Segmenter.from_pretrained(folder)):
        assert not again.training and again.classes == model.classes
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
        assert (again.predict(image) == model.predict(image)).all()
    text = (folder / "config.json").read_text()
    assert str(tmp_path) not in text and "data_path" not in text  # nothing of this machine
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "models.load(" in card


def test_a_name_of_two_parts_is_looked_up_on_the_hub(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "fetch", lambda name: asked.append(name) or run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert models.load("somebody/streets").classes and asked == ["somebody/streets"]
    for name in ("runs/typo", "typo", "/absent/run", "a/b/c", "../absent", "./absent"):
        with pytest.raises(UserError, match="no such run folder"):
            models.load(name)
    assert len(asked) == 1


def test_without_a_connection_the_hub_is_its_cache_or_one_line(run, tmp_path):
    cache, commit = tmp_path / "hub" / "models--somebody--streets", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    models.load(run).save_pretrained(cache / "snapshots" / commit)
    program = "import models\nprint(models.load('somebody/streets').classes)\nmodels.load('a/b')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(models.load(run).classes)
    last = done.stderr.splitlines()[-1]
    assert "a/b: no such folder, and downloading it from the Hub failed" in last
