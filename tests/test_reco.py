"""The ReCo loss against the golden data and the paper's plain sampling, by hand on small cases, on
degenerate batches, and in two processes."""

import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from reco import class_shares, reco_loss, supervised_loss, unsupervised_loss  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden" / "reco_loss.npz"


def golden_inputs():
    g = np.load(GOLDEN)
    return [torch.from_numpy(g[name]) for name in ("rep", "label", "prob", "mask")], g


def golden_options(g, setting):
    return dict(
        temperature=float(g["temperature"][setting]),
        num_queries=int(g["num_queries"][setting]),
        num_negatives=int(g["num_negatives"][setting]),
        strong_threshold=float(g["strong_threshold"][setting]),
    )


def plain_loss(
    rep,
    label,
    prob,
    valid,
    temperature=0.5,
    num_queries=256,
    num_negatives=512,
    strong_threshold=0.97,
):
    """The loss as the paper defines it: class by class, every query with keys of its own, every
    draw independent."""
    rows, label, valid = rep.movedim(1, -1).flatten(0, 2), label.flatten(), valid.flatten()
    prob = prob.movedim(1, -1).flatten(0, 2)  # [n, C]
    classes = [c for c in range(prob.shape[1]) if (valid & (label == c)).any()]
    pixels = {c: (valid & (label == c)).nonzero()[:, 0] for c in classes}
    prototype = {c: rows[pixels[c]].mean(0).detach() for c in classes}
    total = 0 * rep.sum()
    if len(classes) < 2:
        return total
    for c in classes:
        hard = pixels[c][prob[pixels[c], c] < strong_threshold]
        if not len(hard):
            continue
        queries = hard[torch.randint(len(hard), (num_queries,))]
        others = [d for d in classes if d != c]
        similar = torch.stack([F.cosine_similarity(prototype[c], prototype[d], 0) for d in others])
        share = (similar / temperature).softmax(0)
        drawn = share.multinomial(num_queries * num_negatives, replacement=True)
        keys = torch.empty(num_queries * num_negatives, dtype=torch.int64)
        for i, d in enumerate(others):
            at = drawn == i
            keys[at] = pixels[d][torch.randint(len(pixels[d]), (int(at.sum()),))]
        negatives = rows[keys].detach().view(num_queries, num_negatives, -1)
        every = torch.cat([prototype[c].expand(num_queries, 1, -1), negatives], dim=1)
        logits = F.cosine_similarity(rows[queries][:, None], every, dim=2) / temperature
        target = torch.zeros(num_queries, dtype=torch.int64)
        total = total + F.cross_entropy(logits, target) / len(classes)
    return total


def loss_and_grad(rep, label, prob, valid, device="cpu", loss=reco_loss, **options):
    """Computed on the device, returned on the host."""
    rep = rep.detach().clone().to(device).requires_grad_()
    loss = loss(rep, *(x.to(device) for x in (label, prob, valid)), **options)
    loss.backward()
    return loss.detach().cpu(), rep.grad.cpu()


class Moments:
    """Mean and variance of loss and gradient over draws."""

    def __init__(self):
        self.loss, self.sum, self.square = [], 0, 0

    def add(self, loss, grad):
        self.loss.append(float(loss))
        self.sum, self.square = self.sum + grad.double(), self.square + grad.double() ** 2

    def result(self):
        n, loss = len(self.loss), torch.tensor(self.loss, dtype=torch.float64)
        mean = self.sum / n
        variance = ((self.square / n - mean**2) * n / (n - 1)).clamp(min=0)
        return loss.mean(), loss.var(), mean, variance, n


def assert_same_distribution(a, b, rms_limit=1.3):
    """a, b: (loss mean, loss variance, gradient mean, gradient variance, draws); returns
    the two z-scores."""
    z = float((a[0] - b[0]) / (a[1] / a[4] + b[1] / b[4]).sqrt())
    squared_error = a[3] / a[4] + b[3] / b[4]
    drawn = squared_error > 1e-16
    torch.testing.assert_close(a[2][~drawn], b[2][~drawn], atol=1e-7, rtol=1e-5)
    rms = float(((a[2] - b[2])[drawn] / squared_error[drawn].sqrt()).square().mean().sqrt())
    assert abs(z) < 4 and rms < rms_limit, (z, rms)
    return z, rms


# ---------------------------------------------------------------- the other two losses


def test_golden_unsupervised_loss():
    golden = np.load(GOLDEN.with_name("unsupervised_loss.npz"))
    target = torch.from_numpy(golden["target"])
    target[target < 0] = 255
    logits, confidence = (torch.from_numpy(golden[name]) for name in ("logits", "confidence"))
    threshold = float(golden["strong_threshold"])
    loss, eta = unsupervised_loss(logits, target, confidence, threshold)
    assert abs(loss.item() - float(golden["loss"])) < 1e-6 and eta.shape == (3,)


def test_balanced_classes():
    """At 1, every class has the same part of both losses; between, the root of its pixels."""
    label = torch.zeros(1, 10, 10, dtype=torch.int64)
    label[0, 0, :4], label[0, 1, 0], label[0, 9] = 2, 3, 255  # 85, 0, 4, 1 pixels and 10 ignored
    logits = torch.randn(1, 4, 10, 10, requires_grad=True)
    losses = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    means = [losses[label == c].mean() for c in (0, 2, 3)]
    sure = (label != 255).float()
    for balance, parts in ((0.0, (85, 4, 1)), (0.5, (85**0.5, 2, 1)), (1.0, (1, 1, 1))):
        expected = sum(n * mean for n, mean in zip(parts, means, strict=True)) / sum(parts)
        torch.testing.assert_close(supervised_loss(logits, label, balance), expected)
        torch.testing.assert_close(
            unsupervised_loss(logits, label, sure, 0.9, balance)[0], expected
        )
    assert class_shares(label, 4).tolist() == pytest.approx([85 / 90, 0, 4 / 90, 1 / 90])


@pytest.mark.parametrize("balance", [0, 0.5])
def test_losses_of_an_ignored_batch_are_zero_and_connected(balance):
    logits = torch.randn(2, 3, 5, 5, requires_grad=True)
    label = torch.full((2, 5, 5), 255)
    unsupervised, _ = unsupervised_loss(logits, label, torch.zeros(2, 5, 5), 0.97, balance)
    loss = unsupervised + supervised_loss(logits, label, balance)
    loss.backward()
    assert loss.item() == 0 and logits.grad.eq(0).all()


# ---------------------------------------------------------------- golden data


def against_golden(setting, draws, **options):
    inputs, g = golden_inputs()
    moments = Moments()
    torch.manual_seed(setting)
    for _ in range(draws):
        moments.add(*loss_and_grad(*inputs, **golden_options(g, setting), **options))
    ours, runs = moments.result(), int(g["runs"][setting])
    f64 = [
        torch.tensor(g[name][setting], dtype=torch.float64)
        for name in ("loss_mean", "loss_std", "grad_mean", "grad_stderr")
    ]
    golden = f64[0], f64[1] ** 2, f64[2], f64[3] ** 2 * runs, runs
    z, rms = assert_same_distribution(ours, golden)
    ratio = float(ours[3].sum() / golden[3].sum())
    print(
        f"setting {setting} {options}: loss z {z:.2f}, gradient z rms {rms:.2f}, "
        f"gradient variance ratio {ratio:.2f}"
    )
    return ratio


def test_golden_stratified(device):
    ratios = [against_golden(setting, draws=1000, device=device) for setting in range(3)]
    assert sum(ratios) / 3 <= 0.7


@pytest.mark.parametrize("setting", range(3))
def test_plain_sampling_is_the_golden_data(setting):
    assert against_golden(setting, draws=250, loss=plain_loss) <= 1.1


def test_same_expectation_as_plain_sampling():
    inputs = small(shape=(2, 8, 12, 10), num_classes=6)
    inputs[1][inputs[1] == 4] = 255
    inputs[1][0, 0] = 7  # no such class
    inputs[3][1, :4] = False
    inputs[2][:, 1] = 0.99  # nothing hard
    ours, plain = Moments(), Moments()
    for seed in range(300):
        torch.manual_seed(seed)
        options = dict(temperature=0.2, num_queries=16, num_negatives=8)
        ours.add(*loss_and_grad(*inputs, **options))
        plain.add(*loss_and_grad(*inputs, loss=plain_loss, **options))
    assert_same_distribution(ours.result(), plain.result(), rms_limit=1.5)


# ---------------------------------------------------------------- by hand


def row_of_pixels(vectors, labels, num_classes, own_prob=0.5):
    """One image of height 1: a pixel per vector."""
    rep = torch.tensor(vectors, dtype=torch.float32).T[None, :, None]  # [1, D, 1, w]
    label = torch.tensor(labels)[None, None]  # [1, 1, w]
    prob = torch.full((1, num_classes, 1, len(labels)), own_prob)
    return rep, label, prob, torch.ones_like(label, dtype=torch.bool)


def test_two_classes_by_hand(device):
    # One pixel per class: the positive key is the query itself (cosine 1), all 4 negatives
    # the other pixel (cosine 0).
    inputs = row_of_pixels([[2.0, 0.0], [0.0, 3.0]], [0, 1], 2)
    loss, grad = loss_and_grad(*inputs, device, temperature=0.5, num_queries=8, num_negatives=4)
    share = 4 * math.exp(0) / (math.exp(2) + 4 * math.exp(0))  # softmax mass of the negatives
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert float(loss) == pytest.approx(math.log(1 + 4 * math.exp(-2)), rel=1e-5)
    # d loss / d unit query = share * (negative - positive) / 0.5, without what is along the
    # query; over length and |V|.
    expected = torch.tensor([[0.0, share / 0.5 / 2 / 2], [share / 0.5 / 3 / 2, 0.0]])  # [pixel, D]
    torch.testing.assert_close(grad[0, :, 0].T, expected)


def test_prototype_hardness_and_easy_class_by_hand():
    # Class 0: pixels (1, 0, 0) hard and (0, 1, 0) easy, so the query is the first and
    # the prototype lies at 45 degrees.
    # Classes 1 and 2: both pixels along the third axis, cosine 0 to the query, cosine 1 to
    # each other; class 2 is easy.
    rep, label, prob, valid = row_of_pixels(
        [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0, 0, 5.0]], [0, 0, 1, 2], 4
    )
    prob[0, 0, 0, 1] = prob[0, 2, 0, 3] = 0.99
    torch.manual_seed(0)
    rep.requires_grad_()
    loss, stats = reco_loss(
        rep, label, prob, valid, temperature=0.5, num_queries=4, num_negatives=8, return_stats=True
    )
    loss.backward()
    assert int(stats["num_classes"]) == 3 and stats["num_hard"].tolist() == [1, 1, 0, 0]
    assert stats["query_weight"].tolist() == [1, 1, 0, 0]
    assert stats["queries"][0].unique().tolist() == [0] and stats["queries"][
        1
    ].unique().tolist() == [2]
    e2 = math.exp(1 / 0.5)
    expected = torch.tensor(
        [
            [0, 0.5, 0.5, 0],
            [1 / (1 + e2), 0, e2 / (1 + e2), 0],
            [1 / (1 + e2), e2 / (1 + e2), 0, 0],
            [0, 0, 0, 0],
        ]
    )
    torch.testing.assert_close(stats["relation"], expected)
    # Class 0: positive cosine sqrt(1/2), negatives 0. Class 1: positive 1, k of 8 negatives
    # (class 2) 1, the others 0.
    of_class_0 = math.log(1 + 8 * math.exp(-math.sqrt(0.5) / 0.5))
    of_class_1 = [math.log(1 + k + (8 - k) * math.exp(-2)) for k in range(9)]
    assert min(abs(loss.item() - (of_class_0 + x) / 3) for x in of_class_1) < 1e-5
    assert (
        rep.grad[0, :, 0, 1].abs().sum() == 0 and rep.grad[0, :, 0, 3].abs().sum() == 0
    )  # easy: no gradient
    assert rep.grad[0, :, 0, 0].abs().sum() > 0


def test_random_queries_and_random_keys():
    inputs, _ = golden_inputs()
    label, prob, valid = inputs[1:]
    pixels = torch.bincount(label[valid], minlength=6)
    torch.manual_seed(0)
    _, stats = reco_loss(*inputs, active_queries=False, active_keys=False, return_stats=True)
    assert stats["num_hard"].tolist() == pixels.tolist() and int(stats["num_classes"]) == 5
    expected = (torch.ones(6, 6) - torch.eye(6)) / 4  # 5 of 6 classes present: 4 others each
    expected[5], expected[:, 5] = 0, 0
    torch.testing.assert_close(stats["relation"], expected)
    _, stats = reco_loss(*inputs, strong_threshold=0.5, num_queries=100, return_stats=True)
    for c in range(4):
        hard = (label == c) & valid & (prob[:, c] < 0.5)
        assert (
            stats["queries"][c].unique().tolist() == hard.flatten().nonzero()[:, 0].tolist()
        )  # Q exceeds them all
    assert stats["query_weight"].tolist() == [1, 1, 1, 1, 0, 0]


# ------------------------------------------------------ degenerate batches, types, determinism


def small(seed=0, shape=(2, 8, 6, 5), num_classes=4):
    torch.manual_seed(seed)
    B, _, h, w = shape
    return [
        torch.randn(shape),
        torch.randint(num_classes, (B, h, w)),
        torch.rand(B, num_classes, h, w) * 0.9,
        torch.ones(B, h, w, dtype=torch.bool),
    ]


@pytest.mark.parametrize(
    "case", ["one class", "no valid pixel", "all unlabelled", "nothing hard", "one pixel"]
)
def test_nothing_to_learn(case):
    inputs = small(shape=(1, 8, 1, 1)) if case == "one pixel" else small()
    if case == "one class":
        inputs[1][:] = 2
    if case == "no valid pixel":
        inputs[3][:] = False
    if case == "all unlabelled":
        inputs[1][0], inputs[1][1] = 255, -1
    if case == "nothing hard":
        inputs[2][:] = 1
    loss, grad = loss_and_grad(*inputs, num_queries=8, num_negatives=8)
    assert float(loss) == 0 and grad.shape == inputs[0].shape and float(grad.abs().sum()) == 0


def test_unlabelled_and_absent_classes_are_left_alone():
    inputs = small(num_classes=6)
    inputs[1][inputs[1] == 4] = 255
    inputs[1][0, 0] = 7  # no such class
    for seed in range(20):
        torch.manual_seed(seed)
        loss, grad = loss_and_grad(*inputs, num_queries=64, num_negatives=16)
        assert loss.isfinite() and float(loss) > 0
        assert float(grad.movedim(1, -1)[inputs[1] > 5].abs().sum()) == 0
        assert bool((grad.movedim(1, -1)[inputs[1] <= 5].abs().sum(1) > 0).all())


def test_all_zero_representation():
    inputs = small()
    inputs[0][:] = 0
    loss, grad = loss_and_grad(*inputs, num_negatives=16)
    assert float(loss) == pytest.approx(math.log(17), rel=1e-5) and float(grad.abs().sum()) == 0
    inputs = small()
    inputs[0][0, :, 0] = 0  # some of them
    loss, grad = loss_and_grad(*inputs)
    assert loss.isfinite() and bool(grad.isfinite().all()) and float(grad[0, :, 0].abs().sum()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    rep, label, prob, valid = small()
    half = rep.to(dtype)
    torch.manual_seed(1)
    expected, expected_grad = loss_and_grad(half.float(), label, prob, valid, num_queries=16)
    torch.manual_seed(1)
    loss, grad = loss_and_grad(half, label, prob, valid, num_queries=16)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(loss, expected) and torch.equal(grad, expected_grad.to(dtype))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = loss_and_grad(half, label, prob, valid, num_queries=16)
    assert torch.equal(loss, expected)
    loss, grad = loss_and_grad(half, label, prob.to(dtype), valid, num_queries=16)
    assert loss.isfinite() and bool(grad.isfinite().all())


def test_same_seed_same_bits():
    inputs = small(shape=(2, 32, 64, 64), num_classes=8)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(loss_and_grad(*inputs, num_queries=128, num_negatives=64))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


def test_memory_formats_agree():
    rep, label, prob, valid = small()
    results = []
    for r in (rep, rep.to(memory_format=torch.channels_last), rep.repeat(1, 2, 1, 1)[:, 8:]):
        torch.manual_seed(0)
        rep_in = r.detach().requires_grad_()
        loss = reco_loss(rep_in, label, prob, valid)
        (2 * loss).backward()
        results.append((loss.detach(), rep_in.grad))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


def test_no_shape_depends_on_data():
    # Tensors without values: whatever would read one (.item(), nonzero, a boolean mask, an if)
    # raises. On a GPU those are what makes the host wait.
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        rep, label, prob, valid = small()
        rep.requires_grad_()
        loss, stats = reco_loss(rep, label, prob, valid, num_queries=16, return_stats=True)
        loss.backward()
        assert (
            loss.shape == () and rep.grad.shape == rep.shape and stats["queries"].shape == (4, 16)
        )
        with pytest.raises(DataDependentOutputException):
            stats["num_classes"].item()  # the mode does what it is used for


def test_wrong_inputs_are_refused():
    rep, label, prob, valid = small()
    for bad in [
        (rep[0], label, prob, valid),
        (rep, label[:, :3], prob, valid),
        (rep, label.float(), prob, valid),
        (rep, label, prob[:1], valid),
        (rep, label, prob, valid.float()),
        (rep[:0], label[:0], prob[:0], valid[:0]),
    ]:
        with pytest.raises(ValueError):
            reco_loss(*bad)


# ---------------------------------------------------------------- two processes

DRAWS = 300
OPTIONS = dict(temperature=0.5, num_queries=64, num_negatives=32)


def two_process_case(case):
    """The golden batch, image p being process p's, with some labels taken away."""
    (rep, label, prob, valid), _ = golden_inputs()
    if case == "a process without valid pixel":
        valid[1] = False
    if case == "a process with one class":
        valid[1] &= label[1] == 2
    if case == "a process lacking a class, a sharp temperature":
        valid[0] &= label[0] != 1
    return (rep, label, prob, valid), OPTIONS | (dict(temperature=0.1) if "sharp" in case else {})


CASES = [
    "plain",
    "a process without valid pixel",
    "a process with one class",
    "a process lacking a class, a sharp temperature",
]


def labelled_batch():
    """Four images whose labelled pixels are shared unevenly between the halves."""
    torch.manual_seed(0)
    logits, label = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
    label[0], label[1, :6] = 255, 255
    logits[2, 0, :4], label[2, :4] = 200, 0  # a cross-entropy of 0
    return logits, label, torch.rand(4, 8, 8)


def process_main(rank, folder):
    """One of two processes: moments of its loss and gradient over draws -> folder/rank.pt."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )  # a hang becomes an error
    assert dist.get_world_size() == 2
    results = {}
    for case in CASES:
        inputs, options = two_process_case(case)
        inputs = [x[rank : rank + 1] for x in inputs]
        stats = reco_loss(*inputs, **options, return_stats=True)[1]
        draws = []
        for seed in range(DRAWS):
            torch.manual_seed(2 * seed + rank)  # no seed in common
            draws.append(loss_and_grad(*inputs, **options))
        results[case] = (
            stats,
            torch.stack([d[0] for d in draws]),
            torch.stack([d[1] for d in draws]),
        )
    # Nothing to learn, in ways that differ between the processes: none waits, all get a
    # zero gradient.
    for labels in [(255, 255), (0, 255), (255, 3), (1, 1)]:
        inputs = small()
        inputs[1][:] = labels[rank]
        loss, grad = loss_and_grad(*[x[:1] for x in inputs], num_queries=8, num_negatives=8)
        assert float(loss) == 0 and grad.shape == (1, 8, 6, 5) and float(grad.abs().sum()) == 0
    inputs = small()
    inputs[1][:] = rank  # two classes, one in each process
    loss, grad = loss_and_grad(
        *[x[:1, ..., : 5 - rank] for x in inputs], num_queries=8, num_negatives=8
    )
    assert float(loss) > 0 and float(grad.abs().sum()) > 0  # also with maps of different size
    logits, label, confidence = (x[2 * rank : 2 * rank + 2] for x in labelled_batch())
    supervised = supervised_loss(logits, label)
    results["losses"] = supervised, unsupervised_loss(logits, label, confidence, 0.5)[0]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for process in processes:
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            if process.poll() is None:
                for p in processes:
                    p.kill()
        assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_mean_is_the_whole_batch(two_processes, case):
    (stats0, loss0, grad0), (stats1, loss1, grad1) = [results[case] for results in two_processes]
    inputs, options = two_process_case(case)
    stats = reco_loss(*inputs, **options, return_stats=True)[1]
    for name in ("num_classes", "num_hard", "relation"):
        torch.testing.assert_close(stats0[name], stats[name])
        assert torch.equal(stats0[name], stats1[name])
    torch.testing.assert_close(
        (stats0["query_weight"] + stats1["query_weight"]) / 2, stats["query_weight"]
    )

    split, whole = Moments(), Moments()
    torch.manual_seed(0)
    for draw in range(DRAWS):  # each process has a row of the batch
        split.add((loss0[draw] + loss1[draw]) / 2, torch.cat([grad0[draw], grad1[draw]]) / 2)
        whole.add(*loss_and_grad(*inputs, **options))
    # Pixels of a class are drawn together, so their z-scores move together: two equal laws gave
    # 0.86 to 1.23.
    z, rms = assert_same_distribution(split.result(), whole.result(), rms_limit=1.5)
    print(f"{case}: loss z {z:.2f}, gradient z rms {rms:.2f}")


def test_the_mean_over_processes_is_the_loss_of_the_whole_batch(two_processes):
    logits, label, confidence = labelled_batch()
    whole = supervised_loss(logits, label), unsupervised_loss(logits, label, confidence, 0.5)[0]
    for first, second, loss in zip(*(r["losses"] for r in two_processes), whole, strict=True):
        torch.testing.assert_close((first + second) / 2, loss)


if __name__ == "__main__":
    process_main(int(sys.argv[1]), sys.argv[2])
