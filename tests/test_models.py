"""The network, the teacher and the losses against the reference's numbers (tests/golden) and on
every family of backbones."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_semi
import train_supervised
from engine import options, setup
from inputs.errors import UserError
from models import DeepLabV3Plus, MeanTeacher, convert_reco_checkpoint

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
    assert setup.learning_rate(1e-7, 100, 200) == 1e-7  # an explicit one is never raised


def test_teacher_averages_parameters_only():
    student = torch.nn.BatchNorm1d(2)
    teacher = MeanTeacher(student)
    student.running_mean.fill_(5)
    teacher.update(student)
    assert teacher.model.running_mean.eq(0).all() and teacher.model.training
    teacher.copy_statistics(student)
    assert teacher.model.running_mean.eq(5).all()
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_golden_unsupervised_loss():
    golden = np.load(GOLDEN / "unsupervised_loss.npz")
    target = torch.from_numpy(golden["target"])
    target[target < 0] = 255
    loss, eta = train_semi.unsupervised_loss(
        torch.from_numpy(golden["logits"]),
        target,
        torch.from_numpy(golden["confidence"]),
        float(golden["strong_threshold"]),
    )
    assert abs(loss.item() - float(golden["loss"])) < 1e-6 and eta.shape == (3,)


def test_losses_of_an_ignored_batch_are_zero_and_connected():
    logits = torch.randn(2, 3, 5, 5, requires_grad=True)
    label = torch.full((2, 5, 5), 255)
    loss = train_semi.unsupervised_loss(logits, label, torch.zeros(2, 5, 5), 0.97)[
        0
    ] + train_supervised.supervised_loss(logits, label)
    loss.backward()
    assert loss.item() == 0 and logits.grad.eq(0).all()


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "regnety_002",
        "test_efficientnet",
        "mobilenetv3_small_050",
        "convnext_atto",
        "test_vit",
        "vit_tiny_patch16_224",
        "test_resnet",
    ],
)
def test_backbones(backbone):
    model = DeepLabV3Plus(3, backbone, rep_dim=8, pretrained=False, channels=16, low_channels=8)
    logits, rep = model(torch.randn(2, 3, 65, 97))
    assert logits.shape == (2, 3, 17, 25) and rep.shape == (2, 8, 17, 25)
    (logits.sum() + rep.sum()).backward()
    assert all(
        p.grad is not None
        for name, p in model.named_parameters()
        if not name.startswith("backbone.")
    )


@pytest.mark.parametrize("backbone", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_dino(backbone):
    with torch.no_grad():
        logits, rep = DeepLabV3Plus(
            2, backbone, rep_dim=None, pretrained=False, channels=8, low_channels=8
        ).eval()(torch.randn(1, 3, 50, 65))
    assert logits.shape == (1, 2, 13, 17) and rep is None


@pytest.mark.parametrize(
    "backbone",
    ["swin_tiny_patch4_window7_224", "coatnet_0_224", "resnot50", "resnet101.nonsense"],
)
def test_backbones_that_cannot_work_are_refused_in_one_line(backbone):
    with pytest.raises(UserError) as error:
        DeepLabV3Plus(2, backbone, pretrained=False)
    assert backbone in str(error.value) and "\n" not in str(error.value)
    assert "resnet" in str(error.value)


@pytest.mark.parametrize("backbone", ["densenet121", "vgg11", "hrnet_w18_small", "dla34"])
def test_backbones_without_an_output_stride_take_32(backbone):
    """The last two put their stages together, which only fit where 32 divides the sides. A part of
    HRNet leads to no feature; distributed training would wait for its gradient."""
    shape = dict(rep_dim=8, pretrained=False, channels=8, low_channels=8)
    model = DeepLabV3Plus(4, backbone, **shape).eval()
    logits, rep = model(torch.rand(1, 3, 65, 97))
    assert logits.shape == (1, 4, 17, 25) and rep.shape == (1, 8, 17, 25)
    with pytest.raises(UserError, match="at output stride 16"):
        DeepLabV3Plus(4, backbone, output_stride=16, **shape)
    (logits.sum() + rep.sum()).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert (len(trained) < len(list(model.parameters()))) == backbone.startswith("hrnet")


def test_pretrained_weights_offline_are_one_line():
    with pytest.raises(UserError) as error:
        DeepLabV3Plus(2, "resnet18")
    assert "--no-pretrained" in str(error.value) and "\n" not in str(error.value)


def test_decoder_at_stride_2():
    logits, _ = DeepLabV3Plus(
        4,
        "test_resnet",
        rep_dim=8,
        pretrained=False,
        output_stride=8,
        decoder_stride=2,
        channels=16,
        low_channels=8,
        aspp_rates=(1, 2, 3),
    )(torch.randn(2, 3, 64, 48))
    assert logits.shape == (2, 4, 32, 24)


def test_synchronised_batch_norm_keeps_the_network(monkeypatch):
    """timm's norm layers hold an activation, which torch's own converter drops."""
    monkeypatch.setattr(DeepLabV3Plus, "to", lambda model, *place, **options: model)  # no GPU here
    words = ["--backbone", "test_efficientnet", "--channels", "8", "--low-channels", "8"]
    args = options.parse(options.training_parser("", "train_supervised.py"), words)
    source = SimpleNamespace(classes=["a", "b", "c"], palette=[(0, 0, 0)] * 3, size=None)

    def network(processes: int, device: str) -> torch.nn.Module:
        accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
        return setup.new_model(args, source, accelerator)[0].eval()

    def synchronised(model: torch.nn.Module) -> bool:
        return any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())

    plain, converted = network(1, "cuda"), network(2, "cuda")
    assert synchronised(converted)
    assert not any(type(m) is torch.nn.BatchNorm2d for m in converted.modules())
    assert not synchronised(plain) and not synchronised(network(2, "cpu"))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(converted(x)[0], plain(x)[0])


def test_mean_and_std_follow_pretrained():
    """As positions, and as arrays of any kind."""
    mean, std = np.zeros(3), np.full(3, 0.5)
    model = DeepLabV3Plus(2, "test_resnet", None, False, mean, std, channels=8, low_channels=8)
    plain = DeepLabV3Plus(2, "test_resnet", None, False, (0, 0, 0), (1, 1, 1), channels=8)
    assert model.mean.flatten().tolist() == [0, 0, 0] and model.std.dtype == torch.float32
    assert model.std.flatten().tolist() == [0.5] * 3 and plain.std.flatten().tolist() == [1] * 3
    assert model.eval()(torch.rand(1, 3, 33, 40))[0].shape == (1, 2, 9, 10)
