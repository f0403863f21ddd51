"""The training steps on a GPU that does not exist, and at the end on a real one, if there is one.

The first use tensors that say "cuda" and have no values. An operation on tensors of two devices
raises, and so does whatever makes the CPU wait for a GPU: reading a value (.item(), nonzero, a
boolean mask, an if) and a copy between CPU and GPU that is not `non_blocking`. Only backward is
left out; it needs the real device."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backbones
import train_semi
import train_supervised
from data import load_source
from inputs import transforms
from models import DeepLabV3Plus, MeanTeacher, new_model

SIZE, CLASSES = 32, 5
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # the deep copy does


@pytest.fixture(autouse=True)
def probed_backbone(monkeypatch):
    """The meta device, on which a backbone is probed, does not work within a fake mode."""
    found = backbones.choose_features("test_resnet", 16, 4)
    monkeypatch.setattr(backbones, "choose_features", lambda *_: found)


class NoGPU(FakeTensorMode):
    # Also where there is a GPU: torch.tensor would put a real tensor on it, which this mode does
    # not see and cannot copy with the network.
    avoid_device_init = True


def no_values():
    mode = NoGPU()
    mode.__deepcopy__ = lambda memo: mode  # the teacher's tensors, copied, have the same mode
    return mode


class NoBlockingCopies(TorchDispatchMode):
    """Refuses copies between CPU and GPU that make the CPU wait, also those of lists and indices; a
    single number is passed with the kernel."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [x for x in tree_leaves([args, out]) if isinstance(x, torch.Tensor) and x.dim()]
        if len({x.device.type for x in tensors}) > 1:
            # copy_ takes it as its third argument
            assert any(x is True for x in [kwargs.get("non_blocking"), *args[2:3]]), function
        return out


def accelerator(device="cuda"):
    return SimpleNamespace(
        device=torch.device(device),
        autocast=nullcontext,
        backward=lambda loss: None,
        unwrap_model=lambda model, keep_torch_compile: model,
        sync_gradients=True,
        optimizer_step_was_skipped=False,
    )


def batch(size=SIZE):
    """On the CPU, as a loader returns it."""
    images = torch.empty(2, 3, size, size, dtype=torch.uint8)
    return images, torch.empty(2, size, size, dtype=torch.uint8)


def network(args, device="cuda"):
    rep_dim = 8 if args.reco else None
    with torch.device(device):
        return DeepLabV3Plus(CLASSES, "test_resnet", rep_dim, False, channels=8, low_channels=8)


def options(script, *words):
    args = script.parse_options(["--crop-size", str(SIZE), *words])
    return args, args.label_ratio is not None


def draws():
    return np.random.default_rng(0)


def on_the_device(curves, to_plot):
    leaves = tree_leaves(to_plot) + list(curves.values())
    assert {x.device.type for x in leaves if isinstance(x, torch.Tensor)} == {"cuda"}
    assert all(value.shape == () for value in curves.values())


OPTIONS = {
    "classmix": [],
    "classmix + ReCo": ["--reco"],
    "cutmix": ["--mixing-strategy", "cutmix", "--reco"],
    "cutout": ["--mixing-strategy", "cutout", "--reco"],
    "not mixed": ["--mixing-strategy", "none", "--reco"],
    "random queries and keys": ["--reco", "--reco-random-queries", "--reco-random-keys"],
    "partial labels": ["--reco", "--label-ratio", "p0"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_semi_supervised_step_waits_for_nothing(name):
    args, partial = options(train_semi, *OPTIONS[name])
    with no_values():
        student = network(args)
        teacher = MeanTeacher(student)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        parts = student, teacher, optimizer, accelerator(), args, draws(), partial
        with NoBlockingCopies():
            curves, to_plot = train_semi.train_step(batch(), batch(2 * SIZE), *parts)
        on_the_device(curves, to_plot)
        with pytest.raises(DataDependentOutputException):
            curves["loss/total"].item()  # the mode does what it is used for
    assert teacher.step == 1
    assert [tuple(x.shape) for x in to_plot["images"]] == [(2, 3, SIZE, SIZE)] * 2


@pytest.mark.parametrize("words", [[], ["--reco"], ["--reco", "--label-ratio", "p1"]])
def test_a_supervised_step_waits_for_nothing(words):
    args, partial = options(train_supervised, *words)
    with no_values():
        student = network(args)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        parts = student, optimizer, accelerator(), args, draws(), partial
        with NoBlockingCopies():
            on_the_device(*train_supervised.train_step(batch(), *parts))


def test_a_mistake_is_found():
    """What these tests are for: images that stayed on the CPU."""
    args, _ = options(train_supervised)
    with no_values(), pytest.raises(RuntimeError, match="cuda"):
        train_supervised.train_step(batch(), network(args), None, accelerator("cpu"), args, draws())


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x[[0, 1]],
        lambda x: x + torch.tensor([1.0, 2, 3], device="cuda"),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.cpu(),
    ],
)
def test_a_copy_that_waits_is_found(mistake):
    with no_values(), NoBlockingCopies(), pytest.raises(AssertionError):
        mistake(torch.zeros(3, device="cuda"))


# ------------------------------------------------------------------------- PyTorch bugs on MPS
class OnMPS(torch.Tensor):
    """Says that it is on MPS until it is copied elsewhere."""

    place = "mps"

    @property
    def device(self):
        return torch.device(self.place)

    def to(self, device, **options):
        if isinstance(device, torch.dtype):
            return super().to(device)
        copied = self.clone()
        copied.place, copied.options = torch.device(device).type, options
        return copied


def test_copies_to_mps_block():
    on_cpu = torch.arange(4).as_subclass(OnMPS)
    for device, waits in (("mps", True), ("cuda", False), ("cpu", False)):
        sent = transforms.to_device(on_cpu, device)
        assert sent.place == device and sent.options == {"non_blocking": not waits}


def test_known_pixels_on_mps_are_pooled_on_the_cpu(monkeypatch):
    known = torch.full((1, 5, 7), 255)
    known[0, 1, 1] = 3
    expected = transforms.shrink_known(known, (3, 4))
    places, pool = set(), F.adaptive_max_pool2d

    def pooled(x, size, **options):
        places.add(x.device.type)
        return pool(x, size, **options)

    monkeypatch.setattr(transforms.F, "adaptive_max_pool2d", pooled)
    assert torch.equal(transforms.shrink_known(known.as_subclass(OnMPS), (3, 4)), expected)
    assert places == {"cpu"}
    assert transforms.cpu_for_mps(torch.device("cuda")) == torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "expected"), [("mps", torch.contiguous_format), ("cuda", torch.channels_last)]
)
def test_networks_on_mps_are_contiguous(device, expected, monkeypatch):
    formats = []

    def to(self, device, memory_format):
        formats.append(memory_format)
        return self

    monkeypatch.setattr(DeepLabV3Plus, "to", to)
    args, _ = options(train_supervised)
    single = SimpleNamespace(device=torch.device(device), num_processes=1)
    new_model(args, load_source("street", None), single)
    assert formats == [expected]


# ------------------------------------------------------------------------------------ with values
@pytest.fixture
def no_state():
    """Accelerate's state is global; another test may have used another device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=["no", "bf16"])
def real_accelerator(request, device, no_state):
    return Accelerator(cpu=device == "cpu", mixed_precision=request.param)


@contextmanager
def no_waiting(device):
    """On a GPU, an error where the CPU waits for it."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def real_batch(device, size=SIZE):
    images, label = batch(size)
    images.random_(256)
    label.random_(CLASSES)
    return (images.pin_memory(), label.pin_memory()) if device == "cuda" else (images, label)


@pytest.mark.parametrize("name", ["supervised", "supervised + ReCo", *OPTIONS])
def test_a_real_step_learns_and_waits_for_nothing(name, device, real_accelerator):
    semi, words = name in OPTIONS, OPTIONS.get(name, ["--reco"] if "ReCo" in name else [])
    args, partial = options(train_semi if semi else train_supervised, *words)
    torch.manual_seed(0)
    model = network(args, "cpu").to(device)
    teacher = MeanTeacher(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    student, optimizer = real_accelerator.prepare(model, sgd)
    labelled, unlabelled = real_batch(device), real_batch(device, 2 * SIZE)
    if not partial:
        unlabelled[1].fill_(255)

    def step():
        common = optimizer, real_accelerator, args, draws(), partial
        if semi:
            return train_semi.train_step(labelled, unlabelled, student, teacher, *common)
        return train_supervised.train_step(labelled, student, *common)

    step()  # the first one may wait: memory is taken, algorithms are chosen
    with no_waiting(device):
        curves, to_plot = step()
    assert all(value.isfinite() and value.device.type == device for value in curves.values())
    assert {images.device.type for images in to_plot["images"]} == {device}
    for parameter in model.parameters():
        gradient = sgd.state[parameter]["momentum_buffer"]
        assert gradient.any() and gradient.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_skips_a_step_that_overflows(no_state):
    too_much = GradScalerKwargs(init_scale=2.0**100)
    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[too_much])
    args, _ = options(train_semi, "--reco")
    model = network(args, "cpu").cuda()
    teacher = MeanTeacher(model)
    student, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = real_batch("cuda"), real_batch("cuda", 2 * SIZE)

    def step():
        parts = *batches, student, teacher, optimizer, accelerator, args, draws()
        return train_semi.train_step(*parts)[0]["loss/total"]

    before = [p.clone() for p in model.parameters()]
    assert step().isfinite()
    assert accelerator.optimizer_step_was_skipped and teacher.step == 0
    assert all(map(torch.equal, before, model.parameters()))

    accelerator.scaler.update(256.0)
    assert step().isfinite()
    assert not accelerator.optimizer_step_was_skipped and teacher.step == 1
    assert not all(map(torch.equal, before, model.parameters()))
