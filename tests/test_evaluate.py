"""Metrics against torchmetrics and a literal erosion, predictions that must not depend on how they
are made, and evaluate.py as a user runs it."""

import functools
import itertools
import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

import data
import evaluate
import models
import predict
import trees
from cli import ROOT, run_script
from engine import checkpoint, evaluation, processes
from engine.evaluation import Metrics, predict_probabilities, tile_starts
from engine.loaders import EvaluationImages
from inputs import files, transforms
from inputs.files import IGNORE
from inputs.source import street_scene
from test_models import published_weights


def make_run(folder, dataset="street", data_path=None, max_size=1024, **network):
    """The folder of a run whose small network has random weights, and batch-norm statistics that
    make it predict many classes."""
    source = data.load_source(dataset, data_path and str(data_path), max_size)
    torch.manual_seed(0)
    shape = (
        dict(
            num_classes=len(source.classes),
            backbone="test_resnet",
            rep_dim=8,
            output_stride=8,
            decoder_stride=2,
            channels=16,
            low_channels=8,
            aspp_rates=[1, 2, 3],
        )
        | network
    )
    model = models.DeepLabV3Plus(**shape, pretrained=False)
    images = torch.stack([street_scene("train", i)[0] for i in range(8)])
    for _ in range(20):
        model(transforms.to_float(images, "cpu"))
    checkpoint.write_weights(folder, model)
    files.write_json(
        folder / "config.json",
        {
            "model": {
                **shape,
                "mean": model.mean.flatten().tolist(),
                "std": model.std.flatten().tolist(),
            },
            "classes": source.classes,
            "palette": source.palette,
            "crop_size": [48, 48],
            "size": source.size,
            "max_size": source.max_size,
            "arguments": {
                "script": "train_semi.py",
                "dataset": dataset,
                "data_path": data_path and str(data_path),
                "max_size": max_size,
            },
        },
    )
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's data of 7 validation images, and a run on them."""
    root = tmp_path_factory.mktemp("own")
    return make_run(
        root / "run",
        "folder",
        trees.folder(root / "data", train=1, val=7, unlabelled=0, size=(50, 70), painted=1.0),
    )


# ------------------------------------------------------------------------------------------ metrics
def random_maps(rng, classes, shape, void=0.2):
    blocks = (
        rng.integers(classes, size=(shape[0], -(-shape[1] // 6), -(-shape[2] // 6)))
        .repeat(6, 1)
        .repeat(6, 2)[:, : shape[1], : shape[2]]
    )
    prediction = np.where(rng.random(shape) < 0.9, blocks, rng.integers(classes, size=shape))
    hole = (
        rng.random((shape[0], shape[1] // 8 + 1, shape[2] // 8 + 1))
        .repeat(8, 1)
        .repeat(8, 2)[:, : shape[1], : shape[2]]
        < void
    )
    return torch.from_numpy(prediction), torch.from_numpy(np.where(hole, IGNORE, blocks))


def measure(prediction, label, classes):
    counts = Metrics(classes)
    counts.update(prediction, label)
    return counts.results()


@pytest.mark.parametrize("seed", range(4))
def test_miou_is_that_of_torchmetrics(seed):
    classification = pytest.importorskip("torchmetrics.classification")
    classes, rng = 9, np.random.default_rng(seed)
    theirs = {
        average: classification.MulticlassJaccardIndex(
            classes, average=average, ignore_index=IGNORE
        )
        for average in ("macro", "none")
    }
    ours = Metrics(classes)
    for _ in range(3):  # classes 7 and 8 are absent, 6 is predicted alone
        prediction, label = random_maps(rng, 7, (2, 37, 53))
        label[label == 6] = 0
        ours.update(prediction, label)
        for metric in theirs.values():
            metric.update(prediction, label)
    results = ours.results()
    assert results["miou"] == pytest.approx(theirs["macro"].compute().item(), abs=1e-6)
    assert [0.0 if v is None else v for v in results["iou"]] == pytest.approx(
        theirs["none"].compute().tolist(), abs=1e-6
    )
    assert results["iou"][6] == 0.0 and results["iou"][7] is results["iou"][8] is None


def test_hand_worked():
    label = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 255]]])
    prediction = torch.tensor([[[0, 1, 1, 1], [0, 0, 2, 2]]])
    results = measure(prediction, label, 4)
    # class 2 is predicted though it does not occur: 0; class 3 occurs nowhere: no part of the mean
    assert results["iou"] == [3 / 4, 2 / 4, 0.0, None]
    assert results["miou"] == pytest.approx((0.75 + 0.5 + 0) / 3) and results[
        "accuracy"
    ] == pytest.approx(5 / 7)


def test_nothing_labelled_is_zero_and_never_nan():
    for results in (
        Metrics(5).results(),
        measure(torch.zeros(2, 8, 8), torch.full((2, 8, 8), IGNORE), 5),
    ):
        assert results["miou"] == results["accuracy"] == results["boundary_iou"] == 0.0
        assert results["iou"] == results["boundary_iou_per_class"] == [None] * 5
        json.dumps(results, allow_nan=False)
        text = evaluation.table(results, list("abcde"))
        assert "nan" not in text and text.splitlines()[-1].startswith("mIoU")


def eroded(mask, times):
    """A pixel survives a step if its 3x3 neighbourhood is all mask; beyond the image there is none.
    As in Cheng et al.'s own code."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = np.all(
            [
                padded[y : y + mask.shape[0], x : x + mask.shape[1]]
                for y in range(3)
                for x in range(3)
            ],
            axis=0,
        )
    return mask


@pytest.mark.parametrize(
    "shape,void",
    [
        ((3, 40, 60), 0.0),
        ((2, 61, 35), 0.25),
        ((1, 120, 200), 0.1),
        ((1, 1, 1), 0.0),
        ((2, 3, 50), 0.3),
    ],
)
def test_boundary_iou_is_that_of_a_literal_erosion(shape, void):
    classes, rng = 5, np.random.default_rng(sum(shape))
    prediction, label = random_maps(rng, classes, shape, void)
    distance = max(1, round(0.02 * (shape[1] ** 2 + shape[2] ** 2) ** 0.5))
    both, either = np.zeros(classes), np.zeros(classes)
    for p, truth in zip(prediction.numpy(), label.numpy(), strict=True):
        for c in range(classes):
            mask_p, mask_l = (p == c) & (truth != IGNORE), truth == c
            edge_p, edge_l = mask_p & ~eroded(mask_p, distance), mask_l & ~eroded(mask_l, distance)
            both[c] += (edge_p & edge_l).sum()
            either[c] += (edge_p | edge_l).sum()
    results = measure(prediction, label, classes)
    expected = [b / e if e else None for b, e in zip(both, either, strict=True)]
    assert results["boundary_iou_per_class"] == expected
    assert results["boundary_iou"] == pytest.approx(np.mean([v for v in expected if v is not None]))


def test_boundary_iou_hand_worked():
    label, prediction = (
        torch.zeros(1, 100, 100),
        torch.zeros(1, 100, 100),
    )  # 2 % of the diagonal: 3 pixels
    label[:, 40:60, 40:60] = 1
    prediction[:, 39:61, 39:61] = 1  # one pixel larger on each side
    # truth's ring 20^2 - 14^2 = 204, prediction's 22^2 - 16^2 = 228, both 20^2 - 16^2 = 144
    assert measure(prediction, label, 2)["boundary_iou_per_class"][1] == 144 / (204 + 228 - 144)
    label[:, :30] = label[:, :, 70:] = IGNORE
    guess = torch.where(label == IGNORE, torch.randint(2, label.shape).float(), label)
    perfect = measure(guess, label, 2)
    assert (
        perfect["boundary_iou"] == perfect["miou"] == perfect["accuracy"] == 1.0
    )  # whatever is predicted where nothing is labelled


def test_the_padding_of_an_image_makes_its_boundary_no_wider(tmp_path):
    """Pascal's images are padded to 513 x 513; two per cent are those of the image's diagonal."""
    tree = trees.pascal(tmp_path, size=(60, 90))
    source = data.load_source("pascal", str(tree))
    images = EvaluationImages(source, source.val)
    assert images[0][0].shape == (3, 513, 513)

    model, counts = Pointwise(3), Metrics(21)
    loader = torch.utils.data.DataLoader(images, 3)
    results, confusion = evaluation.evaluate(model, loader, 21, Accelerator(cpu=True))
    for sample in source.val:
        image, label = source.read(sample)
        with torch.no_grad():
            prediction = model(transforms.to_float(image[None], "cpu"))[0].argmax(1)
        counts.update(prediction, label[None])
    assert results == counts.results() and results["boundary_iou"] > 0
    assert torch.equal(confusion, counts.confusion)


def test_a_folder_is_scored_at_the_size_that_predict_takes(tmp_path):
    """A run whose images all had one size sees others at that, larger and smaller ones."""
    tree = trees.folder(tmp_path)
    classes = data.load_source("folder", str(tree)).classes
    arguments = {"dataset": "camvid", "max_size": 1024}
    config = {"arguments": arguments, "size": [36, 48], "classes": classes}
    source = evaluate.load_images(
        Namespace(run="run", dataset="folder", data_path=str(tree)), config
    )
    assert source.training_size(96, 128) == source.training_size(9, 12) == (36, 48)
    assert source.training_size(128, 96) == (48, 36)


def test_a_batch_counts_as_its_images():
    prediction, label = random_maps(np.random.default_rng(0), 4, (5, 30, 40))
    one, each = Metrics(4), Metrics(4)
    one.update(prediction, label)
    for i in range(5):
        each.update(prediction[i : i + 1], label[i : i + 1])
    assert torch.equal(one.confusion, each.confusion) and torch.equal(one.boundary, each.boundary)


# --------------------------------------------------------------------------------------- prediction
class Pointwise(nn.Module):
    """Logits from each pixel's colour alone (stride 1), so it is all one how a picture is cut,
    mirrored or tiled."""

    def __init__(self, classes=6):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.largest = nn.Conv2d(3, classes, 1), 0

    def forward(self, x):
        self.largest = max(self.largest, x.shape[-2] * x.shape[-1])
        return self.layer(x), None


class Constant(nn.Module):
    def forward(self, x):
        return torch.tensor([1.0, -2.0, 0.5])[None, :, None, None].expand(
            len(x), 3, -(-x.shape[-2] // 4), -(-x.shape[-1] // 4)
        ), None


WAYS = [
    dict(flip=True),
    dict(window=(16, 24)),
    dict(window=(200, 200)),
    dict(window=(17, 13), flip=True),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_flip_and_windows_change_nothing_for_a_pointwise_model(way):
    images = torch.rand(2, 3, 41, 67)
    torch.testing.assert_close(
        predict_probabilities(Pointwise(), images, **way),
        predict_probabilities(Pointwise(), images),
    )


@pytest.mark.parametrize(
    "way",
    [*WAYS, dict(scales=[0.5, 1.0, 1.7]), dict(scales=[0.3, 2.0], flip=True, window=(16, 16))],
    ids=str,
)
def test_nothing_changes_a_constant_model(way):
    prob = predict_probabilities(Constant(), torch.rand(2, 3, 41, 67), **way)
    torch.testing.assert_close(
        prob, torch.tensor([1.0, -2.0, 0.5]).softmax(0)[None, :, None, None].expand(2, 3, 41, 67)
    )
    plain = torch.full(
        (1, 3, 20, 30), 0.3
    )  # nor do scales change what a pointwise model says of one colour
    torch.testing.assert_close(
        predict_probabilities(Pointwise(), plain, **way), predict_probabilities(Pointwise(), plain)
    )


@pytest.mark.parametrize(
    "way", [dict(scales=[0.5, 1.25], flip=True), dict(window=(32, 40)), dict(scales=[0.1])], ids=str
)
def test_probabilities_of_a_network_sum_to_one(own, way):
    model = models.load(own)
    for size in ((50, 70), (1, 1), (33, 4)):
        prob = predict_probabilities(model, torch.rand(2, 3, *size), **way)
        assert prob.shape == (2, 3, *size) and prob.dtype == torch.float32
        torch.testing.assert_close(prob.sum(1), torch.ones(2, *size))


def test_tiles_cover_and_overlap_by_a_third():
    for length in range(1, 200):
        for tile in (1, 2, 3, 7, 16, 64):
            tile_ = min(tile, length)
            starts = tile_starts(length, tile_)
            assert starts[0] == 0 and starts[-1] + tile_ == length
            assert all(
                0 < b - a <= max(1, tile_ - tile_ / 3) for a, b in itertools.pairwise(starts)
            )


# ------------------------------------------------------------------------------------------- script
def test_table_and_json(own, script):
    status, out, err = script(evaluate, own, "--num-workers", 0)
    assert status == 0 and err == "", err
    saved = json.loads((own / "evaluation-val.json").read_text())
    source = data.load_source("folder", str(own.parent / "data"), 1024)
    counts, model = Metrics(3), models.load(own)
    for sample in source.val:
        image, label = source.read(sample)
        counts.update(
            predict_probabilities(model, transforms.to_float(image[None], "cpu")).argmax(1),
            label[None],
        )
    expected = counts.results()
    assert {key: saved[key] for key in expected} == expected
    assert (
        saved["confusion"] == counts.confusion.tolist()
        and saved["images"] == 7
        and saved["processes"] == 1
        and saved["classes"] == source.classes
    )
    lines = out.splitlines()
    assert (
        lines[0] == "7 val images of folder"
        and lines[-1] == f"written to {own / 'evaluation-val.json'}"
    )
    for name, iou in zip(source.classes, expected["iou"], strict=True):
        assert any(line.startswith(name) and f"{100 * iou:6.2f}" in line for line in lines)
    assert (
        f"{100 * expected['miou']:.2f}" in lines[-2]
        and f"{100 * expected['accuracy']:.2f}" in lines[-2]
    )


def test_options_and_another_data_set_of_the_same_classes(own, script, tmp_path):
    other = trees.folder(tmp_path / "other", train=1, val=2, unlabelled=0, seed=5)
    status, _, err = script(
        evaluate,
        own,
        "--dataset",
        "folder",
        "--data-path",
        other,
        "--num-workers",
        0,
        "--sliding-window",
        "--flip",
        "--scales",
        0.5,
        1.0,
        "--json",
        tmp_path / "results.json",
    )
    saved = json.loads((tmp_path / "results.json").read_text())
    assert (
        status == 0
        and saved["images"] == 2
        and saved["options"]["scales"] == [0.5, 1.0]
        and saved["options"]["sliding_window"]
    ), err


def test_two_processes_count_what_one_counts(own, script, tmp_path):
    assert script(evaluate, own, "--num-workers", 0, "--json", tmp_path / "one.json")[0] == 0
    done = run_script(
        "evaluate.py", own, "--json", tmp_path / "two.json", processes=2
    )  # 7 images: 4 and 3
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2 and done.stdout.count("written to") == 1
    for key in (
        "confusion",
        "iou",
        "miou",
        "accuracy",
        "boundary_iou",
        "boundary_iou_per_class",
        "images",
    ):
        assert one[key] == two[key], key


def test_full_resolution(script, tmp_path):
    """Cityscapes: 1024x512 as in training, or the size of the files, which the network sees."""
    tree = trees.cityscapes(tmp_path / "data", train=1, val=2, size=(96, 192))
    folder, counted = make_run(tmp_path / "run", "cityscapes", tree), {}
    for name, options in (("training", []), ("full", ["--full-resolution"])):
        status, _, err = script(evaluate, folder, "--num-workers", 0, *options)
        assert status == 0, err
        counted[name] = np.sum(
            json.loads((folder / "evaluation-val.json").read_text())["confusion"]
        )
    labels = [
        files.read_label(s.label, data.load_source("cityscapes", str(tree)).table)
        for s in data.load_source("cityscapes", str(tree)).val
    ]
    assert counted["full"] == sum((label != IGNORE).sum() for label in labels)
    assert counted["training"] == sum(
        (transforms.resize_nearest(torch.from_numpy(label), (512, 1024)) != IGNORE).sum()
        for label in labels
    )


@pytest.mark.parametrize(
    "dataset,options",
    [
        ("pascal", []),
        ("pascal", ["--full-resolution"]),
        ("sun", []),
        ("sun", ["--full-resolution"]),
    ],
)
def test_files_of_several_sizes(dataset, options, script, tmp_path):
    tree = getattr(trees, dataset)(tmp_path / "data")
    folder = make_run(tmp_path / "run", dataset, tree)
    sample = data.load_source(dataset, str(tree)).val[-1]
    for path in (sample.image, sample.label):
        Image.open(path).crop((0, 0, 40, 31)).save(path)
    status, _, err = script(evaluate, folder, "--num-workers", 0, *options)
    assert status == 0, err


@pytest.fixture(scope="module")
def paper_file(tmp_path_factory):
    """A checkpoint as the authors publish them, with the weights of the golden file."""
    path = tmp_path_factory.mktemp("published") / "cityscapes_reco.pth"
    torch.save(published_weights(), path)
    return path


def test_published_checkpoint(paper_file, script, tmp_path, monkeypatch):
    """evaluate.py and predict.py take it, and the network computes the golden logits."""
    tree = trees.cityscapes(tmp_path / "data", train=1, val=1, size=(64, 128))
    load_published = functools.cache(models.load_published)  # built once
    for module in (evaluate, predict):
        monkeypatch.setattr(module, "load_published", load_published)
    status, out, err = script(
        evaluate,
        "--checkpoint",
        paper_file,
        "--dataset",
        "cityscapes",
        "--data-path",
        tree,
        "--full-resolution",
        "--num-workers",
        0,
        "--json",
        tmp_path / "results.json",
    )
    assert status == 0 and "traffic light" in out, err
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["images"] == 1 and 0 <= saved["miou"] <= 1

    picture = next((tree / "leftImg8bit" / "val").rglob("*.png"))
    Image.open(picture).resize((1024, 32)).save(tmp_path / "wide.png")
    status, out, err = script(
        predict,
        "--checkpoint",
        paper_file,
        "--dataset",
        "cityscapes",
        tmp_path / "wide.png",
        "--out-dir",
        tmp_path / "out",
    )
    assert status == 0, err
    mask = Image.open(tmp_path / "out" / "wide.png")
    assert mask.size == (1024, 32) and mask.getpalette()[:6] == [128, 64, 128, 244, 35, 232]

    model = load_published(str(paper_file), "cityscapes")
    assert load_published.cache_info().misses == 1
    golden = np.load(ROOT / "tests" / "golden" / "deeplabv3plus_forward.npz")
    images = torch.from_numpy(golden["x"]) * model.std + model.mean  # x is normalised
    with torch.no_grad():
        logits, _ = model(images)
    np.testing.assert_allclose(logits.numpy(), golden["logits"], atol=1e-4)


def test_classes_of_published_checkpoints():
    sources = {name: data.DATASETS[name].source for name in models.PUBLISHED}
    numbers = {name: (len(s.classes), len(s.palette)) for name, s in sources.items()}
    assert numbers == {"cityscapes": (19, 19), "pascal": (21, 21), "sun": (37, 37)}


def bad(own, tmp_path):
    """What cannot be evaluated, and what the line must name."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"run": Pointwise}, tmp_path / "code.pth")
    torch.save({"w": torch.zeros(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:700])
    torn = trees.folder(tmp_path / "torn", train=1, val=3, unlabelled=0)
    victim = torn / "images" / "val" / "val_001.png"
    victim.write_bytes(victim.read_bytes()[:100])
    four = trees.folder(tmp_path / "four", train=1, val=1, classes=4)
    shutil.copytree(own, ade := tmp_path / "ade")  # a run of a checkout with another data set
    config = json.loads((ade / "config.json").read_text())
    config["arguments"]["dataset"] = "ade"
    (ade / "config.json").write_text(json.dumps(config))
    city = ["--dataset", "cityscapes", "--data-path", tmp_path]
    return [
        ([], "--checkpoint"),
        ([own, "--checkpoint", tmp_path / "foreign.pth"], "--checkpoint"),
        (["nowhere"], "nowhere"),
        ([tmp_path / "empty"], "config.json"),
        ([own, "--data-path", "nowhere"], "nowhere"),
        ([own, "--dataset", "street"], "11 classes"),
        ([own, "--dataset", "folder", "--data-path", four], "4 classes"),
        ([own, "--split", "test"], "--split test"),
        ([own, "--scales", "0"], "--scales"),
        ([own, "--scales", "1e9"], "--scales"),
        ([own, "--json", own], "is a folder"),
        ([own, "--json", own / "config.json"], "config.json: exists"),
        ([own, "--json", own / "model.safetensors", "--overwrite"], "overwrite the input"),
        ([ade], "the data set ade"),
        (["nowhere/my run"], "nowhere/my run: no such folder"),
        ([own, "--json", "nowhere/results.json"], "nowhere"),
        ([own, "--dataset", "folder", "--data-path", torn], "val_001.png"),
        (["--checkpoint", tmp_path / "foreign.pth"], "--dataset"),
        (["--checkpoint", tmp_path / "none.pth", *city], "none.pth"),
        (["--checkpoint", tmp_path / "text.pth", *city], "text.pth"),
        (["--checkpoint", tmp_path / "list.pth", *city], "list.pth"),
        (["--checkpoint", tmp_path / "code.pth", *city], "code.pth"),
        (["--checkpoint", tmp_path / "cut.pth", *city], "cut.pth"),
    ]


def test_bad_input_is_one_line(own, script, tmp_path):
    for arguments, culprit in bad(own, tmp_path):
        for workers in (0, 1) if culprit == "val_001.png" else (0,):
            status, out, err = script(evaluate, *arguments, "--num-workers", workers)
            assert (
                status == 2
                and err.count("\n") == 1
                and err.startswith("evaluate.py: ")
                and culprit in err
                and not out
            ), (arguments, status, out, err)


def test_a_broken_file_is_named_whichever_process_meets_it(own, script, tmp_path, monkeypatch):
    torn = trees.folder(tmp_path / "torn", train=1, val=1, unlabelled=0)
    victim = torn / "images" / "val" / "val_000.png"
    victim.write_bytes(victim.read_bytes()[:100])
    Accelerator()  # of the one process that this is
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(processes, "_own_errors", False)
    assert script(evaluate, "nowhere")[2] == ""  # what every process finds, the main one tells
    status, _, err = script(
        evaluate, own, "--dataset", "folder", "--data-path", torn, "--num-workers", 0
    )
    assert status == 2 and err.startswith(f"evaluate.py: {victim}") and err.count("\n") == 1


def test_an_evaluation_leaves_the_mode(own):
    model = models.load(own)
    for mode in (True, False):
        model.train(mode)
        evaluation.evaluate(model, [], 3, Accelerator())
        assert model.training == mode


class Placed(nn.Module):
    """Logits that depend on where a pixel lies in what the network is given, and on its size."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        height, width = x.shape[-2:]
        self.sizes.append((height, width))
        y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack([x[:, 0], (y * y + x_) / (height + width) + x[:, 1]], 1), None


def test_flip_scales_and_windows_are_means():
    model, images = Placed(), torch.rand(2, 3, 30, 41)
    plain = predict_probabilities(model, images)
    mirrored = predict_probabilities(model, images.flip(-1)).flip(-1)
    torch.testing.assert_close(
        predict_probabilities(model, images, flip=True), (plain + mirrored) / 2
    )
    model.sizes.clear()
    torch.testing.assert_close(
        predict_probabilities(model, images, scales=[1.5, 1.0]),
        (plain + predict_probabilities(model, images, scales=[1.5])) / 2,
    )
    assert set(model.sizes) == {(30, 41), (45, 62)}
    total, times = torch.zeros_like(plain), torch.zeros(30, 41)
    for top, left in itertools.product(tile_starts(30, 16), tile_starts(41, 24)):
        part = images[..., top : top + 16, left : left + 24]
        total[..., top : top + 16, left : left + 24] += predict_probabilities(model, part)
        times[top : top + 16, left : left + 24] += 1
    assert times.max() > 1
    torch.testing.assert_close(predict_probabilities(model, images, window=(16, 24)), total / times)


@pytest.mark.parametrize("window", [None, (5, 6)])
def test_probabilities_of_half_precision_logits_are_float32(window):
    logits = torch.randn(1, 4, 5, 6).bfloat16()
    prob = predict_probabilities(lambda x: (logits, None), torch.zeros(1, 3, 5, 6), window=window)
    torch.testing.assert_close(prob, logits.float().softmax(1))


def test_the_options_of_an_evaluation_reach_it(own, script, tmp_path):
    words = ["--sliding-window", "--flip", "--scales", 0.5, 1.0, "--json", tmp_path / "r.json"]
    status, _, err = script(evaluate, own, "--num-workers", 0, *words)
    assert status == 0, err
    source = data.load_source("folder", str(own.parent / "data"), 1024)
    counts, model = Metrics(3), models.load(own)
    options = dict(scales=[0.5, 1.0], flip=True, window=(48, 48))
    for sample in source.val:
        image, label = source.read(sample)
        prob = predict_probabilities(model, transforms.to_float(image[None], "cpu"), **options)
        counts.update(prob.argmax(1), label[None])
    assert json.loads((tmp_path / "r.json").read_text())["confusion"] == counts.confusion.tolist()
