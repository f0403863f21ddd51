"""A training step, told by its parts: what teacher and student see, what the loss is made of, what
the seed decides, which weights are kept."""

import contextlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import train_semi
import train_supervised
import trees
from cli import SMALL
from engine import checkpoint, options, pictures, record, setup
from inputs import labels, transforms
from inputs.errors import UserError
from inputs.files import IGNORE
from models import DeepLabV3Plus
from reco import reco_loss


# ------------------------------------------------------------------ the step, told by its parts
class Step:
    """One train_semi.train_step whose network, teacher, optimiser and accelerator write down what
    is done with them."""

    def __init__(self, *words, known=None, sure=4.0, partial=False, side=16, seed=0):
        args = train_semi.parse_options(["--crop-size", "16", "--scale", "1", "1", *words])
        args.partial = partial
        self.events, self.seen, self.out = [], [], []
        torch.manual_seed(0)
        labelled, unlabelled = (
            torch.randint(0, 256, (n, 3, s, s), dtype=torch.uint8) for n, s in ((2, 16), (3, side))
        )
        self.images = labelled, unlabelled
        label = labelled.argmax(1).byte()  # as the teacher's: the class is the strongest channel
        nothing = torch.full((3, side, side), IGNORE, dtype=torch.uint8)
        known = nothing if known is None else known

        def event(name):
            return lambda *_, **__: self.events.append(name)

        def student(x):
            self.seen.append(x)
            n, (h, w) = len(x), (s // 4 for s in x.shape[-2:])
            out = torch.randn(n, 3, h, w), torch.randn(n, 8, h, w)
            self.out.append([t.requires_grad_() for t in out])
            return self.out[-1]

        def teacher(x):  # the class is that of the strongest channel
            self.events.append("teacher labels")
            self.taught = x
            return sure * (x == x.amax(1, keepdim=True)), None

        def reduce(count, how):
            self.events.append(how)
            return count

        def backward(loss):
            self.events.append("backward")
            self.loss = loss.detach()
            loss.backward()

        self.losses, self.shown = train_semi.train_step(
            (labelled, label),
            (unlabelled, known),
            student,
            SimpleNamespace(
                label=teacher,
                update=event("average"),
                model=SimpleNamespace(mean=torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)),
            ),
            SimpleNamespace(step=event("step"), zero_grad=event("zero")),
            SimpleNamespace(
                device=torch.device("cpu"),
                autocast=contextlib.nullcontext,
                reduce=reduce,
                backward=backward,
                optimizer_step_was_skipped=False,
                unwrap_model=lambda model, **_: model,
            ),
            args,
            np.random.default_rng(seed),
        )


def test_the_order_of_a_step():
    """The teacher labels with its old weights, and averages in the student after its step; both
    losses are divided by what the processes hold together."""
    before, after = ["teacher labels", "mean", "mean"], ["backward", "step", "zero", "average"]
    assert Step("--reco").events == before + after


@pytest.mark.parametrize("words", [[], ["--reco"], ["--reco", "--weak-threshold", "1"]])
def test_every_output_of_the_student_has_a_gradient(words):
    """Distributed training waits for that of every parameter."""
    assert all(tensor.grad is not None for out in Step(*words).out for tensor in out)


@pytest.mark.parametrize("weight", ["0", "0.25"])
def test_the_loss_is_the_sum_of_its_parts(weight):
    step = Step(
        "--reco", "--reco-weight", weight, "--weak-threshold", "0", "--reco-threshold", "0.5"
    )
    parts = [step.losses[f"loss/{part}"] for part in ("supervised", "unsupervised", "reco")]
    assert all(part > 0 for part in parts)
    expected = parts[0] + parts[1] + float(weight) * parts[2]
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.losses["loss/total"], expected)


def test_the_thresholds_have_their_places():
    """The strong one weights the unlabelled images, the weak one admits pixels to ReCo."""
    sure = ["--reco", "--weak-threshold", "0", "--reco-threshold", "1"]
    step = Step(*sure)
    assert step.losses["teacher/eta"] == 0 == step.losses["loss/unsupervised"]
    assert step.losses["reco/hard pixels"] == 5 * 4 * 4  # every pixel of both batches
    none = Step("--reco", "--weak-threshold", "1", "--reco-threshold", "0.3")
    assert none.losses["teacher/eta"] == 1
    assert none.losses["reco/hard pixels"] <= 2 * 4 * 4
    (_, rep_l), (_, rep_u) = none.out
    assert rep_l.grad.any() and not rep_u.grad.any()  # and each has its own pixels


def test_a_threshold_itself_is_sure_enough():
    """Of the unlabelled images' weight, of ReCo's valid pixels, and of the easy ones."""
    confidence = torch.tensor([[[0.5, 0.75], [0.875, 1.0]]])  # exact in float32
    label, logits = torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, 2)
    for threshold, share in ((0.75, 0.75), (0.8, 0.5), (0.875, 0.5), (0.9, 0.25)):
        _, eta = train_semi.unsupervised_loss(logits, label, confidence, threshold)
        assert eta == share
        args = train_semi.parse_options(["--reco", "--weak-threshold", str(threshold)])
        args.reco_threshold = 2.0  # all are hard
        known = torch.full((1, 2, 2), IGNORE)
        parts = torch.zeros(2, 2, 2, 2), torch.randn(2, 4, 2, 2), logits, known, label, confidence
        _, stats = train_semi.contrast(*parts, False, args)
        assert stats["num_hard"].tolist() == [4 * share, 0]
        args.weak_threshold, args.reco_threshold = 0.0, 0.5  # the student's probability itself
        _, stats = train_semi.contrast(*parts, False, args)
        assert stats["num_hard"].tolist() == [0, 0]


@pytest.mark.usefixtures("without_colour")
@pytest.mark.parametrize("strategy", ["none", "cutmix", "cutout", "classmix"])
def test_what_the_student_sees(strategy):
    """Mixed as asked for and mirrored, and the pseudo-label of a pixel is that of the image that it
    comes from; the teacher sees the images as they were read."""
    flips = []
    for seed in range(8):
        step = Step("--mixing-strategy", strategy, seed=seed)
        given = transforms.to_float(torch.cat(step.images), "cpu")
        assert torch.equal(step.taught, given[2:])
        seen, label = torch.cat(step.seen), step.shown["label"]
        known = label != IGNORE
        one = (seen == seen.amax(1, keepdim=True)).sum(1) == 1  # its strongest channel is clear
        assert torch.equal(seen.argmax(1)[known & one], label[known & one])
        views = torch.stack([given, given.flip(-1)], 1)[None]  # [1, 5, 2, 3, H, W]
        shares = (seen[:, None, None] == views).all(3).float().mean((-1, -2))  # [5, 5, 2]
        flips.append(shares.sum(1).argmax(-1))  # of each image that the student sees
        own, other = shares.amax(-1).diag(), shares.amax(-1).fill_diagonal_(0)[2:]
        assert (own[:2] == 1).all()
        assert (own[2:] == 1).all() == (strategy == "none")
        assert ((other > 0.2).sum(1) >= 1).any() == (strategy in ("cutmix", "classmix"))
        assert (~known).any() == (strategy == "cutout")
    flips = torch.stack(flips).float().mean(0)
    assert (flips > 0).all() and (flips < 1).all()


@pytest.mark.usefixtures("without_colour")
def test_what_supervised_training_sees():
    """Labels are mirrored with their images."""
    args = train_supervised.parse_options([])
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        reduce=lambda count, how: count,
        backward=lambda loss: loss.backward(),
    )
    _, shown = train_supervised.train_step(
        (images, images.argmax(1).byte()),
        lambda x: (torch.zeros(8, 3, 4, 4, requires_grad=True), None),
        SimpleNamespace(step=lambda: None, zero_grad=lambda set_to_none: None),
        accelerator,
        args,
        np.random.default_rng(1),
    )
    seen, label = shown["images"], shown["label"]
    one = (seen == seen.amax(1, keepdim=True)).sum(1) == 1
    assert torch.equal(seen.argmax(1)[one], label[one])
    assert not torch.equal(seen, transforms.to_float(images, "cpu"))


def test_images_are_changed_in_colour_too():
    step = Step()
    given, seen = transforms.to_float(torch.cat(step.images), "cpu"), torch.cat(step.seen)
    sums = [x.sum((1, 2, 3)) for x in (given, seen)]
    assert not torch.isclose(*sums)[:2].all()


def test_unlabelled_images_are_scaled_after_the_teacher_and_lose_no_known_pixel():
    known = torch.full((3, 32, 32), IGNORE, dtype=torch.uint8)
    known[:, 2::8, 2::8] = 1  # 16 in each; nearest sampling alone meets none
    words = ["--scale", "0.5", "0.5", "--mixing-strategy", "none"]
    step = Step(*words, known=known, partial=True, side=32)
    assert step.taught.shape[-1] == 32
    assert ((step.shown["confidence"][2:] == 1).sum((1, 2)) == 16).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pseudo_label_has_the_confidence_of_a_known_pixel(dtype):
    logits = torch.zeros(1, 3, 8, 8, dtype=dtype)
    logits[:, 2] = 100
    teacher = SimpleNamespace(label=lambda images: (logits, None))
    known = torch.full((1, 32, 32), 255)
    known[0, 5, 5] = 1
    accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    label, confidence = train_semi.pseudo_label(
        teacher, torch.zeros(1, 3, 32, 32), known, accelerator
    )
    assert label[0, 5, 5] == 1 and (label == 2).sum() == 32 * 32 - 1
    assert confidence.dtype == torch.float32
    assert (confidence == 1).sum() == 1 == confidence[0, 5, 5] and confidence.min() > 0.9999


def test_contrast_takes_pixels_of_which_the_student_is_sure():
    """Partial labels: the labelled images' unknown pixels join with the student's own class."""
    args = train_semi.parse_options(
        ["--reco", "--reco-threshold", "0.5"]
    )  # sure is 0.97 all the same
    label_l, full_l = torch.full((1, 8, 8), 255), torch.zeros(1, 3, 8, 8)
    label_l[0, 0, 0] = 0
    full_l[0, 1, 4:6], full_l[0, 1, 6:] = np.log(98), np.log(48)  # of probability 0.98 and 0.96
    label_u, confidence = torch.zeros(1, 8, 8, dtype=torch.int64), torch.zeros(1, 8, 8)
    logits, rep = torch.zeros(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    parts = logits, rep, full_l, label_l, label_u, confidence
    for partial, hard in ((True, [1, 16, 0]), (False, [1, 0, 0])):
        _, stats = train_semi.contrast(*parts, partial, args)
        assert stats["num_hard"].tolist() == hard


def test_only_queries_that_count_are_shown():
    label = torch.arange(4)[None, :, None].expand(1, 4, 4)  # a class a row
    prob = torch.nn.functional.one_hot(label, 4).permute(0, 3, 1, 2).float()
    prob[:, 0, 0] = 0.5  # of class 0 in its row: the only hard pixels
    rep = torch.randn(1, 8, 4, 4)
    _, stats = reco_loss(rep, label, prob, label >= 0, num_queries=8, return_stats=True)
    assert stats["num_hard"].tolist() == [4, 0, 0, 0]
    shown = train_supervised.reco_pictures(rep, stats)
    picked = pictures.query_mask(shown["queries"], shown["rep_size"], 0, (4, 4))
    assert picked[0, 0].any() and not picked[0, 1:].any()


def test_names_of_classes_are_plain_text():
    names = ["background", "US$_a_b$", "stain $5 and $6"]
    figure = pictures.heat_map(torch.eye(3), names)
    figure.canvas.draw()
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_xticklabels()] == names


def test_supervised_contrast_keeps_known_pixels():
    args = train_supervised.parse_options(["--reco"])
    args.partial = True
    label = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    label[0, 1, 2], label[1, 21, 3] = 0, 2
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    out = torch.zeros(2, 3, 8, 8, requires_grad=True), torch.randn(2, 5, 8, 8, requires_grad=True)
    quiet = SimpleNamespace(step=lambda: None, zero_grad=lambda set_to_none: None)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        reduce=lambda count, how: {"mean": 2 * count}[how],  # the other process has more
        backward=lambda loss: loss.backward(),
    )
    args.reco_weight = 0.25
    losses, shown = train_supervised.train_step(
        (images + 7, label), lambda x: out, quiet, accelerator, args, np.random.default_rng(1)
    )
    assert losses["reco/classes"] == 2 and losses["reco/hard pixels"] == 2
    assert losses["loss/supervised"] == pytest.approx(np.log(3) / 2)
    expected = losses["loss/supervised"] + 0.25 * losses["loss/reco"]
    torch.testing.assert_close(losses["loss/total"], expected)
    assert len(shown["images"].unique()) > 1  # 7 / 255 everywhere but for the colour changes


# -------------------------------------------------------------------------------- several processes
def test_the_mean_over_processes_is_the_loss_of_the_whole_batch():
    """However the labelled pixels are shared out."""
    torch.manual_seed(0)
    logits, label = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
    label[0], label[1, :6] = 255, 255
    logits[2, 0, :4], label[2, :4] = 200, 0  # a cross-entropy of 0
    confidence = torch.rand(4, 8, 8)

    def supervised(part, accelerator):
        return train_supervised.supervised_loss(logits[part], label[part], accelerator)

    def unsupervised(part, accelerator):
        given = logits[part], label[part], confidence[part], 0.5, accelerator
        return train_semi.unsupervised_loss(*given)[0]

    known = 4 * 64 - 64 - 48
    for loss, count in ((supervised, known), (unsupervised, known - 32)):

        def reduce(own, how, count=count):
            assert how == "mean" and own.dtype == torch.float32
            return torch.tensor(count / 2)

        accelerator = SimpleNamespace(reduce=reduce)
        halves = [loss(part, accelerator) for part in (slice(0, 2), slice(2, 4))]
        torch.testing.assert_close(sum(halves) / 2, loss(slice(None), None))


def test_the_default_rate_follows_the_global_batch():
    args = train_semi.parse_options(["--batch-size", "8"])  # the recipe's: 4
    assert [setup.base_learning_rate(args, n) / args.lr for n in (1, 3)] == pytest.approx([2, 6])
    args = train_semi.parse_options(["--batch-size", "8", "--lr", "0.3"])
    assert setup.base_learning_rate(args, 3) == 0.3
    one, both = train_supervised.parse_options([]), train_semi.parse_options([])
    assert one.batch_size == one.recipe_batch == 2 * both.batch_size and one.lr == both.lr


# -------------------------------------------------------------------------------- seeds and loaders
def test_draws_follow_seed_step_and_process():
    keys = list(itertools.product((0, 1), repeat=3))
    first, again = (
        [(setup.seed_step(*k).random(), float(torch.rand(()))) for k in keys] for _ in "12"
    )
    assert first == again
    assert all(len(set(values)) == len(keys) for values in zip(*first, strict=True))


def test_the_loaders_of_a_run():
    source = data.load_source("street", None)

    def loaders(seed=0, rank=0):
        words = ["--label-ratio", "p0", "--seed", str(seed), "--labeled-batch-size", "4"]
        args = train_semi.parse_options(words)
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=2, device=torch.device("cpu")
        )
        division = labels.divide(source, 0, "p0", None, seed)
        return train_semi.training_loaders(args, source, division, accelerator, 0)

    def batches(**changed):
        return [loader.sampler.batch(3) for loader in loaders(**changed)]

    labelled, unlabelled = batches()
    assert batches() == [labelled, unlabelled] and labelled != unlabelled
    for other in (dict(seed=1), dict(rank=1)):
        assert all(a != b for a, b in zip(batches(**other), (labelled, unlabelled), strict=True))
    kept = {}
    for seed in (0, 1):
        for loader, scale in zip(loaders(seed), [(0.5, 1.5), (1.0, 1.0)], strict=True):
            assert loader.dataset.scale == scale
            loader.dataset.crop, loader.dataset.scale = (64, 64), (1.0, 1.0)
            label = kept[seed] = loader.dataset[5, 0][1]
            full = source.read(source.train[5])[1]
            assert (label != IGNORE).sum() == len(full.unique())
    assert not torch.equal(kept[0], kept[1])


def test_first_weights_follow_the_seed():
    source = data.load_source("street", None)
    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"))

    def first(seed):
        args = train_supervised.parse_options(["--seed", str(seed)])
        return setup.new_model(args, source, accelerator)[0].classifier[0].weight

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))


# -------------------------------------------------------------------------------- options
def test_the_optimiser_is_that_of_the_options():
    model = DeepLabV3Plus(3, "test_resnet", 8, False, channels=8, low_channels=8)
    args = train_supervised.parse_options(["--weight-decay", "0.003"])
    for kind in ("sgd", "adamw"):
        args.optimizer = kind
        (group,) = setup.new_optimizer(args, model).param_groups
        assert group["weight_decay"] == 0.003
        if kind == "sgd":
            assert group["momentum"] == 0.9 and group["nesterov"]


def test_the_options_reach_the_loss():
    words = "--reco --reco-temp 0.3 --reco-num-queries 5 --reco-num-negatives 6 "
    words += "--reco-threshold 0.9 --reco-sampling independent"
    settings = options.reco_settings(train_semi.parse_options(words.split()))
    assert settings == dict(
        temperature=0.3,
        num_queries=5,
        num_negatives=6,
        strong_threshold=0.9,
        sampling="independent",
        active_keys=True,
        return_stats=True,
    )
    ablation = ["--reco", "--reco-random-queries", "--reco-random-keys"]
    settings = options.reco_settings(train_semi.parse_options(ablation))
    assert settings["strong_threshold"] > 1 and not settings["active_keys"]


# -------------------------------------------------------------------------------- what is kept
def test_the_best_on_validation_is_kept(tmp_path, monkeypatch):
    """By mIoU alone, of the first network, and of equal ones the earlier."""
    results = {"accuracy": 0.5, "iou": [0.5]}
    scores = iter(
        [(0.3, 0.9), (0.9, 0.9), (0.5, 0.1), (0.1, 0), (0.5, 0.2), (0.9, 1), (0.4, 0.95), (1, 1)]
    )

    def evaluated(*_, **__):
        miou, boundary = next(scores)
        return {**results, "miou": miou, "boundary_iou": boundary}, torch.zeros(1, 1)

    monkeypatch.setattr(record, "evaluate", evaluated)
    written = []
    monkeypatch.setattr(record, "write_weights", lambda folder, network: written.append(network))
    told = object.__new__(record.Record)
    told.bar, told.main, told.control, told.accelerator = object(), True, None, None
    told.best, told.history, told.folder = None, [], tmp_path
    told.source = SimpleNamespace(classes=["a"])
    told.check_losses = told.report_validation = lambda *_: None
    kept = []
    for told.step in (1, 2, 3, 4):
        written.clear()
        told.validate({"teacher": "the teacher", "student": "the student"}, None)
        kept.append(list(written))
    assert kept == [["the teacher"], ["the teacher"], [], []]
    assert told.best["step"] == 2 and [e["miou"] for e in told.history] == [0.3, 0.5, 0.5, 0.4]


def test_weights_that_are_not_finite_stop_the_run():
    told, model = object.__new__(record.Record), torch.nn.Linear(2, 2)
    told.step, told.first_bad = 3, record.BadStep()
    told.check_weights(model)
    model.bias.data[1] = float("nan")
    with pytest.raises(UserError, match="weights were not finite after step 2"):
        told.check_weights(model)


def test_the_teacher_is_what_is_kept(script, tmp_path):
    words = ["--dataset", "folder", "--data-path", trees.folder(tmp_path / "data", size=(32, 40))]
    words += [*SMALL, "--batch-size", "2", "--iterations", "3", "--val-interval", "3"]
    status, _, err = script(train_semi, *words, "--log-with", "none", "--out-dir", tmp_path / "run")
    assert status == 0, err
    kept = load_file(tmp_path / "run" / "model.safetensors")
    state = checkpoint.load_state(tmp_path / "run")
    assert all(torch.equal(value, state["teacher"]["model"][key]) for key, value in kept.items())
    (entry,) = json.loads((tmp_path / "run" / "history.json").read_text())
    assert entry["miou"] == entry["teacher miou"]


def test_the_warm_up(script, tmp_path, monkeypatch):
    """Supervised steps without contrast; the teacher averages, with the student's statistics."""
    tree, steps = trees.folder(tmp_path / "data", size=(32, 40)), []
    whole, supervised = train_semi.train_step, train_supervised.train_step

    def semi(batch_l, batch_u, student, teacher, *others):
        if not steps[2:]:
            for mine, theirs in zip(teacher.model.buffers(), student.buffers(), strict=True):
                assert torch.equal(mine, theirs)
            assert teacher.step == 2
            moved = zip(teacher.model.parameters(), student.parameters(), strict=True)
            assert not all(torch.equal(a, b) for a, b in moved)
        losses, shown = whole(batch_l, batch_u, student, teacher, *others)
        steps.append(set(losses))
        return losses, shown

    def alone(*parts, **options):
        losses, shown = supervised(*parts, **options)
        steps.append(set(losses))
        return losses, shown

    monkeypatch.setattr(train_semi, "train_step", semi)
    monkeypatch.setattr(train_supervised, "train_step", alone)
    words = ["--dataset", "folder", "--data-path", tree, *SMALL, "--batch-size", "2", "--reco"]
    words += ["--iterations", "4", "--warmup-iterations", "2", "--log-with", "none"]
    status, _, err = script(train_semi, *words, "--out-dir", tmp_path / "run")
    assert status == 0, err
    assert steps[:2] == [{"loss/total", "loss/supervised"}] * 2
    assert len(steps) == 4 and all("loss/unsupervised" in s and "loss/reco" in s for s in steps[2:])


@pytest.mark.parametrize("module", [train_supervised, train_semi])
def test_seed_and_rate_of_every_step(module, script, tmp_path, monkeypatch):
    """The seed decides the labelled images and, with the step, what is drawn in it."""
    tree, drawn, rates = trees.folder(tmp_path / "data", train=6, size=(32, 40)), [], []
    seed_step, train_step = setup.seed_step, module.train_step

    def seeded(*key):
        drawn.append(key)
        return seed_step(*key)

    def step(*parts, **options):
        optimizer = next(part for part in parts if hasattr(part, "param_groups"))
        rates.append(optimizer.param_groups[0]["lr"])
        return train_step(*parts, **options)

    monkeypatch.setattr(run, "seed_step", seeded)
    monkeypatch.setattr(module, "train_step", step)
    words = ["--dataset", "folder", "--data-path", tree, *SMALL, "--batch-size", "2"]
    words += ["--iterations", "3", "--num-labeled", "2", "--seed", "5", "--lr", "0.01"]
    status, _, err = script(module, *words, "--log-with", "none", "--out-dir", tmp_path / "run")
    assert status == 0, err
    assert drawn == [(5, step, 0) for step in range(3)]
    assert rates == [setup.learning_rate(0.01, step, 3) for step in range(3)]
    source = data.load_source("folder", str(tree))
    chosen, other = ([s.name for s in labels.labelled_split(source, 2, n)] for n in (5, 0))
    assert (tmp_path / "run" / "labeled.txt").read_text().split() == chosen != other


@pytest.mark.usefixtures("without_colour")
def test_cutout_is_filled_with_the_mean():
    """Which the network takes to zero."""
    step = Step("--mixing-strategy", "cutout")
    gone = step.shown["label"][2:] == IGNORE
    assert (step.seen[1].movedim(1, -1)[gone] == torch.tensor([0.4, 0.5, 0.6])).all()
