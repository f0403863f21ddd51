"""A training step by its parts: what teacher and student see, what the loss consists of, what the
seed decides."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import models
import train_semi
import train_supervised
import trees
from cli import SMALL
from engine import checkpoint, pictures, setup
from inputs import labels, transforms
from inputs.files import IGNORE
from reco import reco_loss, unsupervised_loss


class Step:
    """One train_semi.train_step whose network, teacher, optimiser and accelerator record what is
    done with them."""

    def __init__(self, *words, known=None, sure=4.0, partial=False, side=16, seed=0, sync=True):
        args = train_semi.parse_options(["--paper", "--scale", "1", "1", *words])
        args.crop_size = [16, 16]
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

        def backward(loss):
            self.events.append("backward")
            self.loss = loss.detach()
            loss.backward()

        self.curves, to_plot = train_semi.train_step(
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
                backward=backward,
                sync_gradients=sync,
                optimizer_step_was_skipped=False,
                unwrap_model=lambda model, **_: model,
            ),
            args,
            np.random.default_rng(seed),
            partial,
        )
        self.label = torch.cat(to_plot["label"])
        self.confidence = torch.cat([c.float() for c in to_plot["confidence"]])
        self.stats = to_plot["reco"]


def test_the_order_of_a_step():
    """The teacher labels with its old weights, and follows the student after its step; between
    micro-batches it stays."""
    events = ["teacher labels", "backward", "step", "zero"]
    assert Step("--reco").events == [*events, "average"]
    assert Step("--reco", sync=False).events == events


@pytest.mark.parametrize("weight", ["0", "0.25"])
def test_the_loss_is_the_sum_of_its_parts(weight):
    step = Step(
        "--reco", "--reco-weight", weight, "--weak-threshold", "0", "--reco-threshold", "0.5"
    )
    parts = [step.curves[f"loss/{part}"] for part in ("supervised", "unsupervised")]
    parts.append(step.stats["loss"])
    assert all(part > 0 for part in parts)
    expected = parts[0] + parts[1] + float(weight) * parts[2]
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.curves["loss/total"].detach(), expected)


def test_the_thresholds_have_their_places():
    """The strong one weights the unlabelled images, the weak one admits pixels to ReCo."""
    sure = ["--reco", "--weak-threshold", "0", "--reco-threshold", "1"]
    step = Step(*sure)
    assert step.curves["teacher/eta"] == 0 == step.curves["loss/unsupervised"]
    assert step.stats["num_hard"].sum() == 5 * 4 * 4  # every pixel of both batches
    none = Step("--reco", "--weak-threshold", "1", "--reco-threshold", "0.3")
    assert none.curves["teacher/eta"] == 1
    assert none.stats["num_hard"].sum() <= 2 * 4 * 4
    (_, rep_l), (_, rep_u) = none.out
    assert rep_l.grad.any() and not rep_u.grad.any()  # and each has its own pixels


def test_confidence_at_a_threshold_suffices():
    """For the weight of unlabelled images, the valid pixels of ReCo, and the easy ones."""
    confidence = torch.tensor([[[0.5, 0.75], [0.875, 1.0]]])  # exact in float32
    label, logits = torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, 2)
    unknown, rep = torch.full((1, 2, 2), IGNORE), torch.randn(2, 4, 2, 2)
    prob = torch.full((2, 2, 2, 2), 0.5)
    for threshold, share in ((0.75, 0.75), (0.8, 0.5), (0.875, 0.5), (0.9, 0.25)):
        _, eta = unsupervised_loss(logits, label, confidence, threshold)
        assert eta == share
        parts = logits, unknown, label, confidence, unknown, (2, 2), threshold, False
        targets, valid = train_semi.reco_targets(*parts)
        assert valid[0].sum() == 0 and valid[1].sum() == 4 * share
        for strong, hard in ((2.0, 4 * share), (0.5, 0)):
            settings = dict(strong_threshold=strong, return_stats=True)
            _, stats = reco_loss(rep, targets, prob, valid, **settings)
            assert stats["num_hard"].tolist() == [hard, 0]


def test_a_pseudo_label_that_only_the_class_weights_make_is_ignored():
    prob = torch.tensor([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.02, 0.98, 0]]).T.reshape(1, 3, 3, 1)
    teacher = SimpleNamespace(label=lambda images: (prob.clamp_min(1e-9).log(), None))
    accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    label_l = torch.zeros(1, 10, 10, dtype=torch.int64)
    label_l[0, 0, :4] = 1  # 4 %: at 0.5 class 1 weighs sqrt(24) times class 0
    for balance, wanted in ((0.0, [0, 1, 1]), (0.5, [0, IGNORE, 1])):
        parts = teacher, torch.zeros(1, 3, 3, 1), label_l, accelerator, balance
        label, confidence = train_semi.pseudo_label(*parts)
        assert label.flatten().tolist() == wanted
        expected = [0.9, 0.6, 0.98] if balance == 0 else [0.9, 0, 0.98]
        assert confidence.flatten().tolist() == pytest.approx(expected)


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
        seen, label = torch.cat(step.seen), step.label
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
        backward=lambda loss: loss.backward(),
    )
    _, to_plot = train_supervised.train_step(
        (images, images.argmax(1).byte()),
        lambda x: (torch.zeros(8, 3, 4, 4, requires_grad=True), None),
        SimpleNamespace(step=lambda: None, zero_grad=lambda set_to_none: None),
        accelerator,
        args,
        np.random.default_rng(1),
    )
    seen, label = to_plot["images"][0], to_plot["label"][0]
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
    assert ((step.confidence[2:] == 1).sum((1, 2)) == 16).all()


def test_known_pixels_replace_pseudo_labels():
    known = torch.full((3, 16, 16), IGNORE, dtype=torch.uint8)
    known[:, 4:8, 4:8] = 2
    step = Step("--mixing-strategy", "none", known=known, partial=True)
    assert ((step.label[2:] == 2) & (step.confidence[2:] == 1)).sum((1, 2)).min() >= 16
    unknown = Step("--mixing-strategy", "none", partial=True)
    assert unknown.confidence[2:].max() < 1


@pytest.mark.parametrize(("partial", "pixels"), [(True, [1, 16, 0]), (False, [1, 0, 0])])
def test_reco_targets_include_pixels_of_which_the_student_is_sure(partial, pixels):
    """Partial labels: unknown pixels of the labelled images, with the student's own class."""
    label_l, logits_l = torch.full((1, 8, 8), IGNORE), torch.zeros(1, 3, 8, 8)
    label_l[0, 0, 0] = 0
    logits_l[0, 1, 4:6], logits_l[0, 1, 6:] = np.log(98), np.log(48)  # probabilities .98 and .96
    unknown, confidence = torch.full((1, 8, 8), IGNORE), torch.zeros(1, 8, 8)
    parts = logits_l, label_l, torch.zeros_like(label_l), confidence, unknown, (8, 8), 0.7, partial
    label, valid = train_semi.reco_targets(*parts)
    assert torch.bincount(label[valid], minlength=3).tolist() == pixels


def test_only_queries_that_count_are_plotted():
    label = torch.arange(4)[None, :, None].expand(1, 4, 4)  # a class a row
    prob = torch.nn.functional.one_hot(label, 4).permute(0, 3, 1, 2).float()
    prob[:, 0, 0] = 0.5  # of class 0 in its row: the only hard pixels
    rep = torch.randn(1, 8, 4, 4)
    _, stats = reco_loss(rep, label, prob, label >= 0, num_queries=8, return_stats=True)
    assert stats["num_hard"].tolist() == [4, 0, 0, 0]
    to_plot = dict(images=[torch.ones(1, 3, 4, 4)], label=[label], confidence=[label >= 0])
    to_plot["reco"] = stats | dict(rep_size=(4, 4))
    figure = pictures.draw_training(to_plot, [(i, i, i) for i in range(1, 5)])
    drawn = figure.axes[3].images[0].get_array()[..., 0]  # classes at queries, else image / 3
    assert (drawn[0] == 1).any() and (drawn[1:] == 255 // 3).all()


def test_names_of_classes_are_plain_text():
    names = ["background", "US$_a_b$", "stain $5 and $6"]
    figure = pictures.heat_map(torch.eye(3), names)
    figure.canvas.draw()
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_xticklabels()] == names


def test_supervised_reco_keeps_known_pixels():
    args = train_supervised.parse_options(["--reco", "--reco-weight", "0.25"])
    label = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    label[0, 1, 2], label[1, 21, 3] = 0, 2
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    out = torch.zeros(2, 3, 8, 8, requires_grad=True), torch.randn(2, 5, 8, 8, requires_grad=True)
    quiet = SimpleNamespace(step=lambda: None, zero_grad=lambda set_to_none: None)
    cpu = dict(device=torch.device("cpu"), backward=lambda loss: loss.backward())
    step = quiet, SimpleNamespace(**cpu), args, np.random.default_rng(1)
    curves, to_plot = train_supervised.train_step(
        (images + 7, label), lambda x: out, *step, partial=True
    )
    assert to_plot["reco"]["num_classes"] == 2 and to_plot["reco"]["num_hard"].sum() == 2
    assert curves["loss/supervised"].item() == pytest.approx(np.log(3))
    expected = curves["loss/supervised"] + 0.25 * to_plot["reco"]["loss"]
    torch.testing.assert_close(curves["loss/total"], expected)
    assert len(to_plot["images"][0].unique()) > 1  # 7 / 255 everywhere but for the colour jitter


# -------------------------------------------------------------------------------- seeds and loaders
def test_the_loaders_of_a_run():
    source = data.load_source("street", None)

    def loaders(seed=0, rank=0):
        words = ["--label-ratio", "p0", "--seed", str(seed), "--labeled-batch-size", "4"]
        args = train_semi.parse_options(words)
        accelerator = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            gradient_accumulation_steps=1,
            device=torch.device("cpu"),
        )
        split = labels.split_train(source, args)
        return train_semi.training_loaders(args, source, split, accelerator, 0)

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
            label = kept[seed] = loader.dataset[5, 0, -1][1]
            full = source.read(source.train[5])[1]
            assert (label != IGNORE).sum() == len(full.unique())
    assert not torch.equal(kept[0], kept[1])


def test_first_weights_follow_the_seed():
    source = data.load_source("street", None)
    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"))

    def first(seed):
        args = train_supervised.parse_options(["--seed", str(seed)])
        return models.new_model(args, source, accelerator)[0].classifier[0].weight

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))


def test_the_teacher_is_what_is_kept(script, tmp_path):
    words = ["--dataset", "folder", "--data-path", trees.folder(tmp_path / "data", size=(32, 40))]
    words += [*SMALL, "--batch-size", "2", "--iterations", "3", "--val-interval", "3"]
    status, _, err = script(train_semi, *words, "--log-with", "none", "--out-dir", tmp_path / "run")
    assert status == 0, err
    kept = load_file(tmp_path / "run" / "model.safetensors")
    teacher = checkpoint.load_state(tmp_path / "run")["teacher"]["model"]
    assert all(torch.equal(kept[key], value) for key, value in teacher.items())
    assert all(key.endswith("num_batches_tracked") for key in kept.keys() - teacher.keys())
    (entry,) = json.loads((tmp_path / "run" / "history.json").read_text())
    assert entry["miou"] == entry["teacher miou"]


def test_the_warm_up(script, tmp_path, monkeypatch):
    """Supervised steps without ReCo; the teacher follows, with the student's statistics."""
    tree, steps = trees.folder(tmp_path / "data", size=(32, 40)), []
    whole, supervised = train_semi.train_step, train_supervised.train_step

    def semi(batch_l, batch_u, student, teacher, *others):
        if not steps[2:]:
            for mine, theirs in zip(teacher.model.buffers(), student.buffers(), strict=True):
                assert torch.equal(mine, theirs)
            assert teacher.step == 2
            moved = zip(teacher.model.parameters(), student.parameters(), strict=True)
            assert not all(torch.equal(a, b) for a, b in moved)
        curves, to_plot = whole(batch_l, batch_u, student, teacher, *others)
        steps.append((set(curves), bool(to_plot["reco"])))
        return curves, to_plot

    def alone(*parts, **options):
        curves, to_plot = supervised(*parts, **options)
        steps.append((set(curves), bool(to_plot["reco"])))
        return curves, to_plot

    monkeypatch.setattr(train_semi, "train_step", semi)
    monkeypatch.setattr(train_supervised, "train_step", alone)
    words = ["--dataset", "folder", "--data-path", tree, *SMALL, "--batch-size", "2", "--reco"]
    words += ["--iterations", "4", "--warmup-iterations", "2", "--log-with", "none"]
    status, _, err = script(train_semi, *words, "--out-dir", tmp_path / "run")
    assert status == 0, err
    assert steps[:2] == [({"loss/total", "loss/supervised"}, False)] * 2
    assert len(steps) == 4 and all("loss/unsupervised" in s and reco for s, reco in steps[2:])


@pytest.mark.parametrize("module", [train_supervised, train_semi])
def test_seed_and_rate_of_every_step(module, script, tmp_path, monkeypatch):
    """The seed decides the labelled images and, with the step, what is drawn in it."""
    tree, drawn, rates = trees.folder(tmp_path / "data", train=6, size=(32, 40)), [], []
    start_step, train_step = setup.start_step, module.train_step

    def started(args, optimizer, accelerator, step, micro_step):
        drawn.append((step, micro_step))
        return start_step(args, optimizer, accelerator, step, micro_step)

    def step(*parts, **options):
        optimizer = next(part for part in parts if hasattr(part, "param_groups"))
        rates.append(optimizer.param_groups[0]["lr"])
        return train_step(*parts, **options)

    monkeypatch.setattr(module, "start_step", started)
    monkeypatch.setattr(module, "train_step", step)
    words = ["--dataset", "folder", "--data-path", tree, *SMALL, "--batch-size", "2"]
    words += ["--iterations", "3", "--num-labeled", "2", "--seed", "5", "--lr", "0.01"]
    status, _, err = script(module, *words, "--log-with", "none", "--out-dir", tmp_path / "run")
    assert status == 0, err
    assert drawn == [(step, step) for step in range(3)]
    assert rates == [setup.learning_rate(0.01, step, 3) for step in range(3)]
    source = data.load_source("folder", str(tree))
    chosen, other = ([s.name for s in labels.labelled_split(source, 2, n)] for n in (5, 0))
    assert (tmp_path / "run" / "labeled.txt").read_text().split() == chosen != other


@pytest.mark.usefixtures("without_colour")
def test_cutout_is_filled_with_the_mean():
    """Which the network takes to zero."""
    step = Step("--mixing-strategy", "cutout")
    gone = step.label[2:] == IGNORE
    assert (step.seen[1].movedim(1, -1)[gone] == torch.tensor([0.4, 0.5, 0.6])).all()
