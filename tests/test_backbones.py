"""Backbones: which ones work, what they were trained on, and pretrained weights from a file or from
the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from backbones import build_backbone
from inputs.errors import UserError
from models import DeepLabV3Plus

ROOT = Path(__file__).resolve().parent.parent
LITE = "tf_efficientnet_lite0"


class Object:
    """Something that only unpickling would bring back."""


def network(backbone: str, **more) -> DeepLabV3Plus:
    small = dict(rep_dim=8, channels=8, low_channels=8, pretrained=False)
    return DeepLabV3Plus(3, backbone, **small | more)


def classifier(backbone: str) -> dict[str, Tensor]:
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


def loaded(file: str, backbone: str = "test_resnet") -> dict[str, Tensor]:
    return build_backbone(backbone, True, 16, 4, file)[0].state_dict()


def refusal(file: Path | str, backbone: str = "test_resnet") -> str:
    with pytest.raises(UserError) as error:
        loaded(str(file), backbone)
    line = str(error.value)
    assert "\n" not in line and f"--backbone-weights {file}" in line
    return line


# ---------------------------------------------------------------------------------- which ones work
@pytest.mark.parametrize(
    ("backbone", "stride"),
    [
        ("resnet18", 16),
        ("regnety_002", 16),
        ("test_efficientnet", 16),
        ("mobilenetv3_small_050", 16),
        ("convnext_atto", 16),
        ("test_resnet", 16),
        ("densenet121", 32),  # these two cannot be dilated
        ("vgg11", 32),
        ("vit_tiny_patch16_224", 16),
        ("vit_small_patch14_dinov2", 14),
        ("vit_small_patch16_dinov3", 16),
    ],
)
def test_backbones(backbone, stride):
    """All parameters get a gradient: distributed training would wait for it."""
    model = network(backbone)
    assert model.backbone.feature_info.reduction()[-1] == stride
    logits, rep = model(torch.rand(2, 3, 65, 97))
    assert logits.shape == (2, 3, 17, 25) and rep.shape == (2, 8, 17, 25)
    (logits.sum() + rep.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "images of any size"),
        ("coatnet_0_224", "images of any size"),
        ("maxvit_nano_rw_256", "images of any size"),
        ("hrnet_w18_small", "images of any size"),
        ("resnot50", "no such model; similar names: resnet"),
        ("resnet101.nonsense", "no such model; similar names: resnet101"),
        ("convnext_atto", "has no features at --decoder-stride 2; it has [4, 8, 16]"),
    ],
)
def test_backbones_that_do_not_work_are_refused_in_one_line(backbone, reason):
    with pytest.raises(UserError) as error:
        network(backbone, decoder_stride=2 if backbone.startswith("convnext") else 4)
    line = str(error.value)
    assert f"--backbone {backbone}" in line and reason in line and "\n" not in line


def test_only_the_network_itself_draws_random_numbers():
    torch.manual_seed(0)
    built = build_backbone("test_resnet", False, 16, 4)[0].state_dict()
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", features_only=True, output_stride=16).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in built.items())


@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [
        (LITE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("resnet101", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),  # the published checkpoints'
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


# -------------------------------------------------------------------------- weights from a file
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "backbone", ["test_resnet", LITE, "convnext_atto", "test_vit", "mobilenetv3_small_050"]
)
def test_weights_of_a_classifier(tmp_path, backbone, ending):
    state = classifier(backbone)
    features = loaded(written(state, tmp_path / f"weights{ending}"), backbone)
    # some feature extractors write stages_0 for stages.0, or hold the network as `model`
    sources = {key.replace(".", "_"): key for key in state}
    assert len(sources) == len(state) and len(features) > 5
    for key, value in features.items():
        source = sources[key.removeprefix("model.").replace(".", "_")]
        assert torch.equal(value, state[source]), key


def test_features_are_those_of_the_classifier(tmp_path):
    """Every layer gets its own weights, not only weights of its shape."""
    torch.manual_seed(0)
    whole = timm.create_model("convnext_atto", output_stride=16).eval()
    file = written(whole.state_dict(), tmp_path / "weights.safetensors")
    backbone = build_backbone("convnext_atto", True, 16, 4, file)[0].eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        low, high = backbone(x)
        _, features = whole.forward_intermediates(x, indices=[0, 3])
    torch.testing.assert_close(low, features[0])
    torch.testing.assert_close(high, features[1])


def test_weights_as_training_scripts_and_old_files_have_them(tmp_path):
    state = classifier("test_resnet")
    uncounted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(uncounted) < len(state)
    parallel = {f"module.{key}": value for key, value in state.items()}
    files = {
        "trained.pth": {"epoch": 3, "arch": "test_resnet", "state_dict": parallel},
        "old.pth": uncounted,
        "old.safetensors": uncounted,
        "classes.pth": state | {"fc.weight": torch.zeros(7, 96), "fc.bias": torch.zeros(7)},
        "headless.pth": {k: v for k, v in state.items() if not k.startswith("fc.")},
    }
    for name, content in files.items():
        features = loaded(written(content, tmp_path / name))
        assert len(features) > 5
        for key, value in features.items():
            count = key.endswith("num_batches_tracked") and name.startswith("old")
            assert torch.equal(value, torch.tensor(0) if count else state[key]), (name, key)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_that_do_not_fit(tmp_path, ending):
    """timm's own loader ignores the first two."""
    state = classifier("test_resnet")
    missing = {key: value for key, value in state.items() if key != "conv1.0.weight"}
    line = refusal(written(missing, tmp_path / f"missing{ending}"))
    assert "conv1.0.weight is missing" in line and "1 entries differ" in line
    unknown = state | {"conv9.weight": torch.zeros(1)}
    line = refusal(written(unknown, tmp_path / f"unknown{ending}"))
    assert "conv9.weight is (1,), expected no such entry" in line
    shaped = state | {"conv1.0.weight": torch.zeros(5, 3, 3, 3)}
    line = refusal(written(shaped, tmp_path / f"shaped{ending}"))
    shape = tuple(state["conv1.0.weight"].shape)
    assert f"conv1.0.weight is (5, 3, 3, 3), expected {shape}" in line
    line = refusal(written(state, tmp_path / f"other{ending}"), "resnet18")
    assert "--backbone resnet18" in line and "entries differ" in line


def test_weights_of_a_deeper_network_do_not_fit(tmp_path):
    """resnet34 has all entries of resnet18, in the same shapes."""
    deeper = written(timm.create_model("resnet34").state_dict(), tmp_path / "resnet34.safetensors")
    assert "does not fit --backbone resnet18 (layer" in refusal(deeper, "resnet18")


def test_files_that_are_not_weights(tmp_path):
    for value in (
        Object(),
        {"conv1.0.weight": Object()},
        [torch.zeros(1)],
        {"weights": {"a": torch.zeros(1)}},
        {3: torch.zeros(1)},
        {"a": 1},
    ):
        assert "not a dictionary of tensors" in refusal(written(value, tmp_path / "object.pth"))
    for ending in (".safetensors", ".pth"):
        refusal(tmp_path / f"nowhere{ending}")
        folder = tmp_path / f"folder{ending}"
        folder.mkdir()
        refusal(folder)
        whole = Path(written(classifier("test_resnet"), tmp_path / f"cut{ending}"))
        whole.write_bytes(whole.read_bytes()[:1000])
        refusal(whole)
        whole.write_bytes(b"")
        refusal(whole)


# ------------------------------------------------------------------------- weights from the Hub
PROGRAM = """
import time
from backbones import build_backbone
from inputs.errors import UserError
begun = time.monotonic()
print(build_backbone("test_resnet", True, 16, 4)[0].state_dict()["conv1.0.weight"].sum().item())
try:
    build_backbone("resnet18", True, 16, 4)
except UserError as error:
    print(error)
assert time.monotonic() - begun < 10
"""


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_without_a_connection_the_hub_is_its_cache_or_one_line(tmp_path, environment):
    repository = timm.models.get_pretrained_cfg("test_resnet").hf_hub_id.replace("/", "--")
    cache, commit = tmp_path / "hub" / f"models--{repository}", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True)
    state = classifier("test_resnet")
    written(state, cache / "snapshots" / commit / "model.safetensors")
    inherited = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_ENDPOINT")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**inherited, "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    total, line = done.stdout.splitlines()
    assert float(total) == pytest.approx(state["conv1.0.weight"].sum().item(), rel=1e-5)
    assert line.startswith("--backbone resnet18: cannot download the pretrained weights")
    assert "--backbone-weights" in line and "--no-pretrained" in line
    assert "Retrying" not in done.stderr
