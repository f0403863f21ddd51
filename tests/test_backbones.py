"""Backbones: what they were trained on, and pretrained weights from a file or from the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import backbones
from backbones import DilatedDepthwise, build_backbone
from engine import options
from inputs.errors import UserError
from models import DeepLabV3Plus

ROOT = Path(__file__).resolve().parent.parent
LITE = "tf_efficientnet_lite0"


class Object:
    """Something that only unpickling would bring back."""


def network(backbone: str, **more) -> DeepLabV3Plus:
    small = dict(rep_dim=None, channels=8, low_channels=8)
    return DeepLabV3Plus(2, backbone, **{**small, "pretrained": False, **more})


def classifier(backbone: str) -> dict[str, torch.Tensor]:
    """The state dict of the whole network, every value random."""
    torch.manual_seed(0)
    state = timm.create_model(backbone).state_dict()
    return {
        key: torch.randn_like(value) if value.is_floating_point() else torch.full_like(value, 7)
        for key, value in state.items()
    }


def written(state, file: Path) -> str:
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return str(file)


def refusal(file: Path | str, backbone: str = "test_resnet") -> str:
    with pytest.raises(UserError) as error:
        build_backbone(backbone, True, 16, 4, str(file))
    line = str(error.value)
    assert "\n" not in line and f"--backbone-weights {file}" in line
    return line


# ------------------------------------------------------------------------------- normalisation
@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [
        (LITE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("resnet18", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ],
)
def test_images_are_normalised_as_the_backbone_was_trained(backbone, mean, std):
    model = network(backbone).eval()
    torch.testing.assert_close(model.mean, torch.tensor(mean).view(1, 3, 1, 1))
    torch.testing.assert_close(model.std, torch.tensor(std).view(1, 3, 1, 1))
    assert {"mean", "std"} <= dict(model.named_buffers()).keys()
    assert not {"mean", "std"} & model.state_dict().keys()
    bare = network(backbone, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()
    bare.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], bare((x - model.mean) / model.std)[0])


# ---------------------------------------------------------------------------- dilated depthwise
@pytest.mark.parametrize(
    ("kernel", "dilation", "height", "width"), [(5, 2, 14, 14), (3, 2, 15, 9), (7, 4, 9, 14)]
)
def test_dilated_depthwise_is_the_plain_convolution(kernel, dilation, height, width):
    torch.manual_seed(0)
    options = dict(padding=dilation * (kernel // 2), dilation=dilation, groups=16)
    conv = DilatedDepthwise(16, 16, kernel, **options)
    x = torch.randn(2, 16, height, width).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    results = []
    for y in (conv(x), F.conv2d(x, conv.weight, conv.bias, **options)):
        y.square().sum().backward()
        results.append((y, x.grad, conv.weight.grad, conv.bias.grad))
        x.grad = None
        conv.zero_grad()
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert results[0][0].stride()[1] == 1  # channels last stays
    with torch.no_grad():
        torch.testing.assert_close(conv.eval()(x), results[0][0])


@pytest.mark.parametrize(("backbone", "number"), [(LITE, 4), ("convnext_atto", 2), ("resnet18", 0)])
def test_dilated_depthwise_convolutions_of_a_backbone(backbone, number):
    model = network(backbone)
    convs = [m for m in model.backbone.modules() if isinstance(m, DilatedDepthwise)]
    assert len(convs) == number
    plain = timm.create_model(backbone, features_only=True).state_dict()
    assert {f"backbone.{key}" for key in plain} >= {
        key for key in model.state_dict() if key.startswith("backbone.")
    }


# -------------------------------------------------------------------------- weights from a file
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "backbone", ["test_resnet", LITE, "convnext_atto", "test_vit", "mobilenetv3_small_050"]
)
def test_weights_of_a_classifier(tmp_path, backbone, ending):
    state = classifier(backbone)
    file = written(state, tmp_path / f"weights{ending}")
    model = network(backbone, pretrained=True, backbone_weights=file)
    loaded = model.backbone.state_dict()
    # some feature extractors write stages_0 for stages.0, or hold the network as `model`
    sources = {key.replace(".", "_"): key for key in state}
    assert len(sources) == len(state) and len(loaded) > 5
    for key, value in loaded.items():
        source = sources[key.removeprefix("model.").replace(".", "_")]
        assert torch.equal(value, state[source]), key


def test_features_are_those_of_the_classifier(tmp_path):
    """The renaming of stages brings every layer to its place, not only to its shape."""
    torch.manual_seed(0)
    whole = timm.create_model("convnext_atto", output_stride=16).eval()
    file = written(whole.state_dict(), tmp_path / "weights.safetensors")
    backbone = build_backbone("convnext_atto", True, 16, 4, file)[0].eval()
    assert any("stages_" in key for key in backbone.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        low, high = backbone(x)
        _, features = whole.forward_intermediates(x, indices=[0, 3])
    torch.testing.assert_close(low, features[0])
    torch.testing.assert_close(high, features[1])


def test_a_head_of_other_classes_does_not_matter(tmp_path):
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    build_backbone("test_resnet", True, 16, 4, written(state, tmp_path / "weights.pth"))
    del state["fc.weight"], state["fc.bias"]
    build_backbone("test_resnet", True, 16, 4, written(state, tmp_path / "headless.pth"))


def test_weights_as_training_scripts_and_old_files_have_them(tmp_path):
    state = classifier("test_resnet")
    parallel = {f"module.{key}": value for key, value in state.items()}
    uncounted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(uncounted) < len(state)
    files = {
        "trained.pth": {"epoch": 3, "arch": "test_resnet", "state_dict": parallel},
        "old.pth": uncounted,
        "old.safetensors": uncounted,
    }
    for name, content in files.items():
        file = written(content, tmp_path / name)
        loaded = build_backbone("test_resnet", True, 16, 4, file)[0].state_dict()
        assert len(loaded) > 5
        for key, value in loaded.items():
            known = name == "trained.pth" or key in uncounted
            assert torch.equal(value, state[key] if known else torch.tensor(0)), key


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_that_do_not_fit(tmp_path, ending):
    state = classifier("test_resnet")
    missing = {key: value for key, value in state.items() if key != "conv1.0.weight"}
    assert len(missing) == len(state) - 1
    line = refusal(written(missing, tmp_path / f"missing{ending}"))
    assert "lacks conv1.0.weight" in line and "--backbone test_resnet" in line
    unknown = {**state, "conv9.weight": torch.zeros(1)}
    line = refusal(written(unknown, tmp_path / f"unknown{ending}"))
    assert "conv9.weight is unknown" in line
    shaped = {**state, "conv1.0.weight": torch.zeros(5, 3, 3, 3)}
    line = refusal(written(shaped, tmp_path / f"shaped{ending}"))
    assert "conv1.0.weight is (5, 3, 3, 3)" in line
    assert str(tuple(state["conv1.0.weight"].shape)) in line
    line = refusal(written(state, tmp_path / f"other{ending}"), "resnet18")
    assert "--backbone resnet18" in line and "entries differ" in line


def test_what_cannot_be_used_says_what_could():
    with pytest.raises(UserError, match=r"repvit_m0_9 at .* try --output-stride 32"):
        backbones.probe_features("repvit_m0_9", 16, 4)
    with pytest.raises(UserError, match="maxvit_nano_rw_256: takes pictures of a few sizes alone"):
        backbones.needed_multiple("maxvit_nano_rw_256", None)
    assert backbones.needed_multiple("hrnet_w18_small", None) == 32


def test_a_network_whose_code_looks_at_values(monkeypatch, tmp_path):
    """While it is built, as RegNet's did before timm 1.0.30: the meta device has none."""
    create = timm.create_model

    def looking(name, **options):
        torch.zeros(1).item()
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", looking)
    backbones.feature_widths.cache_clear()
    weights = written(classifier("test_convnext"), tmp_path / "weights.pth")
    _, low, high, multiple = backbones.build_backbone("test_convnext", True, 32, 4, weights)
    assert 0 < low < high and multiple == 0


def test_files_that_are_no_weights(tmp_path):
    for value in (Object(), {"conv1.0.weight": Object()}):
        assert "plain tensors" in refusal(written(value, tmp_path / "object.pth"))
    for value in (
        [torch.zeros(1)],
        {"weights": {"a": torch.zeros(1)}},
        {3: torch.zeros(1)},
        {"a": 1},
    ):
        assert "no dictionary of tensors" in refusal(written(value, tmp_path / "list.pth"))
    for ending in (".safetensors", ".pth"):
        assert "no such file" in refusal(tmp_path / f"nowhere{ending}")
        folder = tmp_path / f"folder{ending}"
        folder.mkdir()
        refusal(folder)
        whole = Path(written(classifier("test_resnet"), tmp_path / f"cut{ending}"))
        whole.write_bytes(whole.read_bytes()[:1000])
        refusal(whole)
        whole.write_bytes(b"")
        refusal(whole)


def test_a_file_is_used_whatever_the_recipe_says():
    """The recipe of the street scenes begins with random weights."""

    def pretrained(*words: str) -> bool:
        parser = options.training_parser("", "train_supervised.py")
        return options.parse(parser, list(words)).pretrained

    assert not pretrained()
    assert pretrained("--backbone-weights", "weights.safetensors")


# ------------------------------------------------------------------------- weights from the hub
@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_without_the_hub_an_error_comes_soon(tmp_path, environment):
    program = """
import time
from backbones import build_backbone
from inputs.errors import UserError
start = time.monotonic()
try:
    build_backbone("resnet18", True, 16, 4)
except UserError as error:
    print(error)
assert time.monotonic() - start < 10
"""
    inherited = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_ENDPOINT")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**inherited, "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("--backbone resnet18:") and not done.stderr
    assert "--backbone-weights" in line and "--no-pretrained" in line
