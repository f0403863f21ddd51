"""The training steps on a GPU: on one that is not there, and at the end on a real one, if any; and
what Apple's GPUs are spared.

The first are given tensors that say "cuda" and hold no values.

An operation that brings tensors of two devices together raises, and so does whatever would read a
value (.item(), nonzero, a boolean mask, an if) and a copy between host and device that is not
`non_blocking`: on a GPU those make the host wait. Only backward is left out; it needs the real
device."""

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

import train_semi
import train_supervised
from data import load_source
from engine import setup
from inputs import transforms
from models import DeepLabV3Plus, MeanTeacher

SIZE, CLASSES = 32, 5
SMALL = ["--channels", "8", "--low-channels", "8", "--rep-dim", "8"]
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # the copy does


@pytest.fixture(autouse=True, scope="module")
def probed_backbone():
    """What building it finds out with real tensors, which a fake mode refuses, is cached."""
    DeepLabV3Plus(CLASSES, "test_resnet", pretrained=False)


class NoGPU(FakeTensorMode):
    # Also where there is one: torch.tensor would make a real tensor on it, which is not seen here
    # and cannot be copied with the network.
    avoid_device_init = True


def no_values():
    mode = NoGPU()
    mode.__deepcopy__ = lambda memo: mode  # a copied tensor, the teacher's, is of the same mode
    return mode


class NoBlockingCopies(TorchDispatchMode):
    """Refuses copies between host and device for which the host waits, those of lists and indices
    included; a number alone is handed over with the kernel."""

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
        reduce=lambda count, how: count,
        unwrap_model=lambda model, keep_torch_compile: model,
        optimizer_step_was_skipped=False,
    )


def batch(size=SIZE):
    """On the host, as a loader gives it."""
    images = torch.empty(2, 3, size, size, dtype=torch.uint8)
    return images, torch.empty(2, size, size, dtype=torch.uint8)


def network(args, device="cuda"):
    with torch.device(device):
        return DeepLabV3Plus(
            CLASSES,
            args.backbone,
            args.rep_dim if args.reco else None,
            pretrained=False,
            channels=args.channels,
            low_channels=args.low_channels,
            aspp_rates=args.aspp_rates,
        )


def on_the_device(losses, shown):
    for value in (*losses.values(), *shown.values()):
        assert not isinstance(value, torch.Tensor) or value.device.type == "cuda"
    assert all(loss.shape == () for loss in losses.values())


OPTIONS = {
    "classmix": [],
    "classmix + ReCo": ["--reco"],
    "cutmix": ["--mixing-strategy", "cutmix", "--reco"],
    "cutout": ["--mixing-strategy", "cutout", "--reco"],
    "not mixed": ["--mixing-strategy", "none", "--reco"],
    "independent draws": ["--reco", "--reco-sampling", "independent"],
    "random queries and keys": ["--reco", "--reco-random-queries", "--reco-random-keys"],
    "partial labels": ["--reco", "--label-ratio", "p0"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_semi_supervised_step_waits_for_nothing(name):
    args = train_semi.parse_options([*SMALL, *OPTIONS[name]])
    args.partial, args.crop_size = args.label_ratio is not None, [SIZE, SIZE]
    with no_values():
        student = network(args)
        teacher = MeanTeacher(student)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        parts = student, teacher, optimizer, accelerator(), args, draws()
        with NoBlockingCopies():
            losses, shown = train_semi.train_step(batch(), batch(2 * SIZE), *parts)
        on_the_device(losses, shown)
        with pytest.raises(DataDependentOutputException):
            losses["loss/total"].item()  # the mode does what it is used for
    assert teacher.step == 1 and shown["images"].shape == (4, 3, SIZE, SIZE)


@pytest.mark.parametrize("options", [[], ["--reco"], ["--reco", "--label-ratio", "p1"]])
def test_a_supervised_step_waits_for_nothing(options):
    args = train_supervised.parse_options([*SMALL, *options])
    args.partial = args.label_ratio is not None
    with no_values():
        student = network(args)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        with NoBlockingCopies():
            step = train_supervised.train_step(
                batch(), student, optimizer, accelerator(), args, draws()
            )
        on_the_device(*step)


def test_a_mistake_is_found():
    """What these tests are for: images that stayed on the host."""
    args = train_supervised.parse_options(SMALL)
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


def draws():
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------- Apple's GPUs
class OnApple(torch.Tensor):
    """Says that it lies on one until it is brought elsewhere."""

    place = "mps"

    @property
    def device(self):
        return torch.device(self.place)

    def to(self, device, **options):
        if isinstance(device, torch.dtype):
            return super().to(device)
        brought = self.clone()
        brought.place, brought.options = torch.device(device).type, options
        return brought


def test_copies_to_apple_are_waited_for():
    host = torch.arange(4).as_subclass(OnApple)
    for device, waits in (("mps", True), ("cuda", False), ("cpu", False)):
        sent = transforms.to_device(host, device)
        assert sent.place == device and sent.options == {"non_blocking": not waits}


def test_known_pixels_of_apple_are_pooled_on_the_cpu(monkeypatch):
    known = torch.full((1, 5, 7), 255)
    known[0, 1, 1] = 3
    expected = transforms.shrink_known(known, (3, 4))
    places, pool = set(), F.adaptive_max_pool2d

    def pooled(x, size, **options):
        places.add(x.device.type)
        return pool(x, size, **options)

    monkeypatch.setattr(transforms.F, "adaptive_max_pool2d", pooled)
    assert torch.equal(transforms.shrink_known(known.as_subclass(OnApple), (3, 4)), expected)
    assert places == {"cpu"}
    assert transforms.cpu_for_mps(torch.device("cuda")) == torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "expected"), [("mps", torch.contiguous_format), ("cuda", torch.channels_last)]
)
def test_networks_of_apple_are_contiguous(device, expected, monkeypatch):
    sent = []
    monkeypatch.setattr(
        DeepLabV3Plus, "to", lambda self, device, memory_format: sent.append(memory_format) or self
    )
    args = train_supervised.parse_options(SMALL)
    alone = SimpleNamespace(device=torch.device(device), num_processes=1)
    setup.new_model(args, load_source("street", None), alone)
    assert sent == [expected]


# ------------------------------------------------------------------------------------ with values
@pytest.fixture
def no_state():
    """Accelerate's state belongs to the process; another test's device is not this one's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=["no", "bf16"])
def real_accelerator(request, device, no_state):
    return Accelerator(cpu=device == "cpu", mixed_precision=request.param)


@contextmanager
def no_waiting(device):
    """An error, on a GPU, where the host waits for it."""
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
    semi, options = name in OPTIONS, OPTIONS.get(name, ["--reco"] if "ReCo" in name else [])
    args = (train_semi if semi else train_supervised).parse_options([*SMALL, *options])
    args.partial, args.crop_size = args.label_ratio is not None, [SIZE, SIZE]
    torch.manual_seed(0)
    model = network(args, "cpu").to(device)
    teacher = MeanTeacher(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    student, optimizer = real_accelerator.prepare(model, sgd)
    labelled, unlabelled = real_batch(device), real_batch(device, 2 * SIZE)
    if not args.partial:
        unlabelled[1].fill_(255)

    def step():
        if semi:
            step = train_semi.train_step
            parts = labelled, unlabelled, student, teacher, optimizer
        else:
            step, parts = train_supervised.train_step, (labelled, student, optimizer)
        return step(*parts, real_accelerator, args, draws())

    step()  # the first one may wait: memory is taken, algorithms are chosen
    with no_waiting(device):
        losses, shown = step()
    assert all(loss.isfinite() and loss.device.type == device for loss in losses.values())
    assert shown["images"].device.type == device
    for parameter in model.parameters():
        gradient = sgd.state[parameter]["momentum_buffer"]
        assert gradient.any() and gradient.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_skips_a_step_that_overflows(no_state):
    too_much = GradScalerKwargs(init_scale=2.0**100)
    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[too_much])
    args = train_semi.parse_options([*SMALL, "--reco"])
    args.partial, args.crop_size = False, [SIZE, SIZE]
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
