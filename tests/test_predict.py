"""predict.py and models.load: images of any kind and size, where the masks go, and files that are
not images."""

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data
import models
import predict
import trees
from engine import evaluation
from engine.evaluation import predict_probabilities
from inputs import files, transforms
from inputs.errors import UserError
from inputs.source import street_scene, value_table
from test_evaluate import Constant, Pointwise, make_run


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("street") / "run")


def scene(index=0, size=(64, 64)) -> Image.Image:
    return Image.fromarray(street_scene("test", index)[0].permute(1, 2, 0).numpy()).resize(size)


def mask_of(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


def tree(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------- images
def test_images_of_every_kind_and_size(street, script, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    base, grey = scene(1, (80, 56)), scene(1, (80, 56)).convert("L")
    for name, size in (("dot", (1, 1)), ("row", (300, 1)), ("column", (1, 299)), ("odd", (65, 33))):
        scene(2, size).save(folder / f"{name}.png")
    base.save(folder / "rgb.png")
    base.convert("RGBA").save(folder / "rgba.png")
    base.quantize(200).save(folder / "palette.png")
    base.quantize(200).convert("RGB").save(folder / "palette_as_rgb.png")
    grey.save(folder / "grey.png")
    grey.convert("RGB").save(folder / "grey_as_rgb.png")
    grey.convert("LA").save(folder / "grey_alpha.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "grey16.png")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.convert("1").save(folder / "bits.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 270 degrees
    base.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    base.save(folder / "small.webp", lossless=True)
    base.save(folder / "small.tif")

    status, out, err = script(
        predict, street, folder, "--out-dir", tmp_path / "out", "--confidence"
    )
    assert status == 0 and err == "", err
    model, palette = (
        models.load(street),
        json.loads((street / "config.json").read_text())["palette"],
    )
    count = 0
    for path in folder.iterdir():
        stem = tmp_path / "out" / path.stem
        if path.suffix in (".webp", ".tif"):  # small.tif was first
            stem = tmp_path / "out" / {".tif": "small", ".webp": "small.webp"}[path.suffix]
        image = files.read_image(path)
        seen = transforms.resize_image(image, tuple(max(32, n) for n in image.shape[-2:]))
        prob = predict_probabilities(model, transforms.to_float(seen[None], "cpu"))
        confidence, expected = F.interpolate(prob, size=image.shape[-2:], mode="bilinear")[0].max(
            dim=0
        )
        mask = mask_of(f"{stem}.png")
        assert np.array_equal(mask, expected.numpy()), path
        assert (
            np.abs(
                np.asarray(Image.open(f"{stem}_confidence.png")).astype(float)
                - 255 * confidence.numpy()
            ).max()
            <= 1
        )
        overlay = np.asarray(Image.open(f"{stem}_overlay.png")).astype(float)
        assert (
            np.abs(
                overlay - (image.permute(1, 2, 0).numpy() / 2 + np.asarray(palette)[mask] / 2)
            ).max()
            <= 1
        )
        count += 1
    assert f"{count} of {count} images" in out and len(tree(tmp_path / "out")) == 3 * count
    masks = {
        name: mask_of(tmp_path / "out" / f"{name}.png")
        for name in (
            "rgb",
            "rgba",
            "turned",
            "small",
            "palette",
            "palette_as_rgb",
            "grey",
            "grey_as_rgb",
            "grey_alpha",
            "grey16",
        )
    }
    assert len(np.unique(masks["rgb"])) > 1 and masks["rgb"].shape == (56, 80)
    for one, other in (
        ("rgba", "rgb"),
        ("turned", "rgb"),
        ("small", "rgb"),
        ("palette", "palette_as_rgb"),
        ("grey", "grey_as_rgb"),
        ("grey_alpha", "grey"),
        ("grey16", "grey"),
    ):
        assert np.array_equal(masks[one], masks[other]), one
    with Image.open(tmp_path / "out" / "rgb.png") as mask:
        assert mask.getpalette()[: len(palette) * 3] == list(itertools.chain(*palette))


def test_names_never_collide(street, script, tmp_path):
    names = ("a.png", "a.jpg", "sub/a.png", "sub/deep/b.png", "a_overlay.png", ".hidden/c.png")
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        scene(len(name), (20, 10)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("x")
    shutil.copytree(tmp_path / "in" / "sub", tmp_path / "other")
    out = tmp_path / "in" / "out"  # inside the folder that is walked
    for more in ([], ["--overwrite"]):  # the second time the predictions are not taken for images
        words = [tmp_path / "in", "--out-dir", out, tmp_path / "in" / "a.png", *more]
        status, text, err = script(predict, street, *words)
        assert status == 0 and "5 of 5 images" in text, err
        masks = ["a", "a.png", "a_overlay.png", "sub/a", "sub/deep/b"]
        assert tree(out) == {f"{m}{ending}" for m in masks for ending in (".png", "_overlay.png")}
    paths = [tmp_path / "other", tmp_path / "in" / "sub", tmp_path / "in" / "a.png"]
    script(predict, street, *paths, "--out-dir", tmp_path / "two")
    masks = {"other/a.png", "other/deep/b.png", "sub/a.png", "sub/deep/b.png", "a.png"}
    assert {m for m in tree(tmp_path / "two") if "overlay" not in m} == masks
    paths = ["in/sub/a.png", "in/a.png", "in/a.jpg", "other/a.png"]
    targets = predict.find_images([str(tmp_path / p) for p in paths], tmp_path / "new")
    assert [t.name for t in targets.values()] == ["a", "a.png", "a.jpg", "a-2"]


def test_nothing_is_overwritten_without_overwrite(street, script, tmp_path):
    """A painted label, or an image that was not named, of the same stem."""
    scene().save(tmp_path / "in.jpg")
    (tmp_path / "labels").mkdir()
    Image.new("L", (64, 64), 3).save(tmp_path / "labels" / "in.png")
    painted = (tmp_path / "labels" / "in.png").read_bytes()
    command = [predict, street, tmp_path / "in.jpg", "--out-dir", tmp_path / "labels"]
    status, text, err = script(*command)
    assert status == 2 and not text and err.count("\n") == 1
    assert "labels: is not empty" in err and "--overwrite" in err
    assert (tmp_path / "labels" / "in.png").read_bytes() == painted
    assert tree(tmp_path / "labels") == {"in.png"}
    assert script(*command, "--overwrite")[0] == 0
    assert mask_of(tmp_path / "labels" / "in.png").shape == (64, 64)


@pytest.mark.parametrize("link", [None, Path.symlink_to, Path.hardlink_to])
def test_an_input_is_never_overwritten(link, street, script, tmp_path):
    """Nor by another name of it."""
    (tmp_path / "in").mkdir()
    scene().save(file := tmp_path / "in" / "a.png")
    out = tmp_path / "in" if link is None else tmp_path / "out"
    out.mkdir(exist_ok=True)
    if link:
        link(out / "a_overlay.png", file)
    before = file.read_bytes()
    status, text, err = script(predict, street, file, "--out-dir", out, "--overwrite")
    assert status == 2 and not text and err.count("\n") == 1 and "overwrite the input" in err
    assert file.read_bytes() == before
    weights = street / "model.safetensors"
    for output, more in ((weights, []), (weights, ["--overwrite"]), (tmp_path / "net.onnx", [])):
        content = weights.read_bytes()
        if output != weights:
            output.write_text("another file")
        status, text, err = script(predict, street, "--onnx", output, *more)
        assert status == 2 and not text and err.count("\n") == 1 and str(output) in err
        assert weights.read_bytes() == content


@pytest.mark.parametrize("classes", [2, 3, 16, 17, 200])
@pytest.mark.parametrize("white", [False, True], ids=["", "a white class"])
def test_what_is_erased_in_a_predicted_mask_is_not_labelled(classes, white, tmp_path):
    """Saved again with the palette it has, a mask holds 255: PNGs of few colours have few bits."""
    colours = [[i, 0, 0] for i in range(classes)]
    colours[-1] = [255, 255, 255] if white else colours[-1]
    label = np.arange(6, dtype=np.uint8).reshape(2, 3) % classes
    predict.write_masks(tmp_path / "a", torch.zeros(3, 2, 3).byte(), label, None, colours)
    with Image.open(tmp_path / "a.png") as mask:
        mask.putpixel((1, 0), 255)
        mask.save(tmp_path / "erased.png")
    label[0, 1] = 255
    table = value_table({i: i for i in (*range(classes), 255)})
    if classes > 2 or not white:  # black and white alone are the greys 0 and 255
        assert np.array_equal(files.read_label(tmp_path / "erased.png", table), label)
    by_colour = {files.pack_colour(*colour): i for i, colour in enumerate(colours)}
    erased = files.read_label(tmp_path / "erased.png", table, colours=by_colour)
    assert np.array_equal(erased, label)


def test_a_broken_file_is_reported_and_the_others_done(street, script, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "c"):
        scene().save(tmp_path / "in" / f"{name}.png")
    whole = (tmp_path / "in" / "a.png").read_bytes()
    (tmp_path / "in" / "b.png").write_bytes(whole[:500])
    (tmp_path / "in" / "d.jpg").write_text("not an image")
    (tmp_path / "in" / "e.png").write_bytes(b"")
    status, out, err = script(predict, street, tmp_path / "in", "--out-dir", tmp_path / "out")
    assert status == 1 and "2 of 5 images" in out
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        str(tmp_path / "in" / name) for name in ("b.png", "d.jpg", "e.png")
    ]
    assert tree(tmp_path / "out") == {"a.png", "a_overlay.png", "c.png", "c_overlay.png"}


def test_the_network_from_python(street, script, tmp_path):
    """models.load(RUN).predict takes an image in any form, and is what predict.py writes."""
    model = models.load(street)
    assert not model.training and model.classes == data.DATASETS["street"].source.classes
    assert model.palette == data.DATASETS["street"].source.palette
    shapes = ((64, 64), (1, 1), (33, 150), (200, 5))
    paths = []
    for i, (height, width) in enumerate(shapes):
        paths.append(tmp_path / f"{i}.png")
        scene(i, (width, height)).save(paths[-1])
    status, _, err = script(predict, street, *paths, "--out-dir", tmp_path / "out", "--confidence")
    assert status == 0, err
    masks = model.predict(paths)
    assert isinstance(masks, list) and len(masks) == len(paths)
    for path, shape, mask in zip(paths, shapes, masks, strict=True):
        assert mask.dtype == np.uint8 and mask.shape == shape
        assert np.array_equal(mask, mask_of(tmp_path / "out" / path.name))
        with Image.open(path) as image:
            forms = [path, str(path), image, np.asarray(image), files.read_image(path)]
            for form in forms:
                assert np.array_equal(model.predict(form), mask), type(form)
            grey = image.convert("L")
        assert np.array_equal(model.predict(grey), model.predict(np.asarray(grey)))

        prob = model.predict(path, probabilities=True)
        assert prob.dtype == np.float32 and prob.shape == (len(model.classes), *shape)
        np.testing.assert_allclose(prob.sum(axis=0), 1, atol=1e-5)
        same, confidence = model.predict(path, confidence=True)
        assert np.array_equal(same, mask) and np.array_equal(prob.argmax(axis=0), mask)
        assert confidence.dtype == np.float32 and np.array_equal(confidence, prob.max(axis=0))
        written = trees.raw(tmp_path / "out" / f"{path.stem}_confidence.png")
        assert np.abs(written - 255 * confidence).max() <= 0.5 + 1e-3
    pairs = model.predict(paths, confidence=True)
    assert all(np.array_equal(m, pair[0]) for m, pair in zip(masks, pairs, strict=True))

    model.train()
    options = dict(tile=48, flip=True, scales=[0.5, 1.0])
    mask = model.predict(paths[2], **options)
    prob = model.predict(paths[2], probabilities=True, **options)
    assert model.training  # as it was; what is predicted does not depend on it
    assert np.array_equal(mask, prob.argmax(axis=0))
    assert np.array_equal(mask, models.load(str(street)).predict(paths[2], **options))

    with pytest.raises(ValueError, match="uint8"):
        model.predict(np.zeros((4, 4, 3), np.float32))
    for tensor in (torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            model.predict(tensor)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match=r"text\.png"):
        model.predict(tmp_path / "text.png")
    with pytest.raises(UserError, match="nowhere"):
        models.load(tmp_path / "nowhere")


# -------------------------------------------------------------------------------- resolution, tiles
def test_network_size_is_that_of_training(tmp_path):
    def size(height, width, **entries):
        config = {
            "model": dict(num_classes=2, backbone="test_resnet", channels=8, low_channels=8),
            "classes": ["a", "b"],
            "palette": [[0, 0, 0], [9, 9, 9]],
            "arguments": {},
            **entries,
        }
        return models.Segmenter(config).network_size(height, width)

    cityscapes = data.load_source(
        "cityscapes", str(trees.cityscapes(tmp_path / "cityscapes", train=1, val=1))
    )
    sun = data.load_source("sun", str(trees.sun(tmp_path / "sun", train=1, test=1)))
    own = data.load_source("folder", str(trees.folder(tmp_path / "folder")), 700)
    for source, shape in ((cityscapes, (1024, 2048)), (sun, (480, 640))):
        expected = source.training_size(*shape)
        assert size(*shape, size=source.size) == expected
    assert size(720, 960, size=data.DATASETS["camvid"].source.size) == (360, 480)
    for shape in ((3648, 5472), (701, 40), (700, 700), (32, 33)):
        assert size(*shape, max_size=700) == own.training_size(*shape)
        assert size(*shape) == shape
    for shape in ((3648, 5472), (1, 1), (5, 20_000)):
        assert (
            min(size(*shape, size=cityscapes.size)) >= 32
            and max(size(*shape, size=cityscapes.size)) == 1024
        )
    assert size(20, 400, size=cityscapes.size) == (51, 1024)  # the longer side is brought up, too
    assert size(90, 60, size=data.DATASETS["camvid"].source.size) == (480, 320)
    assert size(20, 400, max_size=500) == (32, 400)  # never up
    assert size(375, 500, max_size=500) == (375, 500) and size(3000, 4000, max_size=500) == (
        375,
        500,
    )


def test_probabilities_are_brought_back_to_the_original_size(script, tmp_path):
    folder = make_run(
        tmp_path / "run", "folder", trees.folder(tmp_path / "data", classes=5), max_size=50
    )
    scene(3, (150, 101)).save(tmp_path / "big.png")
    assert script(predict, folder, tmp_path / "big.png", "--out-dir", tmp_path / "out")[0] == 0
    small = transforms.resize_image(files.read_image(tmp_path / "big.png"), (34, 50))
    prob = F.interpolate(
        predict_probabilities(models.load(folder), transforms.to_float(small[None], "cpu")),
        size=(101, 150),
        mode="bilinear",
    )[0]
    first, second = prob.topk(2, dim=0).values
    agree = mask_of(tmp_path / "out" / "big.png") == prob.argmax(0).numpy()
    assert agree[(first - second > 1e-5).numpy()].all() and agree.mean() > 0.99


def test_tiles_share_out_every_pixel_once():
    rng = np.random.default_rng(0)
    for _ in range(300):
        length, original, tile = rng.integers(1, [400, 900, 120])
        pieces = evaluation.split(length, original, tile)
        assert list(itertools.chain(*(pixels for _, _, pixels in pieces))) == list(range(original))
        for start, stop, pixels in pieces:
            assert 0 <= start < stop <= length and stop - start <= tile
            for p in (pixels[0], pixels[-1]) if pixels else ():
                assert start - 0.5 <= (p + 0.5) * length / original - 0.5 <= stop - 0.5


@pytest.mark.parametrize(
    "size,shape",
    [((90, 140), (90, 140)), ((60, 35), (123, 70)), ((200, 150), (57, 44)), ((64, 64), (1, 1))],
)
def test_tiles_change_nothing_for_a_pointwise_model(size, shape):
    model, image = Pointwise(), torch.randint(256, (3, *shape), dtype=torch.uint8)
    (label,), (confidence,) = evaluation.predict_images(
        model, image[None], size, tile=32, flip=True
    )
    (whole_label,), (whole_confidence,) = evaluation.predict_images(model, image[None], size)
    assert label.shape == shape and np.array_equal(label, whole_label)
    np.testing.assert_allclose(confidence, whole_confidence, atol=1e-6)
    options = dict(tile=32, scales=[0.5, 2.0])
    (label,), (confidence,) = evaluation.predict_images(Constant(), image[None], size, **options)
    assert (label == 0).all() and confidence == pytest.approx(
        torch.tensor([1.0, -2.0, 0.5]).softmax(0)[0].item(), abs=1e-6
    )


def test_twenty_megapixels_in_tiles():
    model = Pointwise(classes=2)
    image = torch.zeros(3, 3648, 5472, dtype=torch.uint8)
    image[0, :, 4000:] = 255
    (label,), _ = evaluation.predict_images(model, image[None], (3648, 5472))
    assert model.largest == 1024**2 and label.shape == (3648, 5472)
    assert len(np.unique(label[:, :4000])) == len(np.unique(label[:, 4000:])) == 1


def test_options_reach_the_prediction(street, script, tmp_path):
    scene(4, (90, 70)).save(tmp_path / "a.png")
    image, model = (
        transforms.to_float(files.read_image(tmp_path / "a.png")[None], "cpu"),
        models.load(street),
    )
    for i, (options, same) in enumerate(
        (
            (["--flip"], dict(flip=True)),
            (["--scales", 0.5, 1.5], dict(scales=[0.5, 1.5])),
            (["--sliding-window"], dict(window=(48, 48))),
        )
    ):
        assert (
            script(predict, street, tmp_path / "a.png", "--out-dir", tmp_path / str(i), *options)[0]
            == 0
        )
        assert np.array_equal(
            mask_of(tmp_path / str(i) / "a.png"),
            predict_probabilities(model, image, **same)[0].argmax(0).numpy(),
        )
    assert (
        script(predict, street, tmp_path / "a.png", "--out-dir", tmp_path / "tiles", "--tile", 48)[
            0
        ]
        == 0
    )
    assert (
        0.5
        < (
            mask_of(tmp_path / "tiles" / "a.png")
            == predict_probabilities(model, image)[0].argmax(0).numpy()
        ).mean()
        < 1
    )


# ------------------------------------------------------------------------------ what to label, ONNX
def test_suggestions(street, script, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(5):
        scene(i).save(tmp_path / "in" / f"{i}.png")
    scores = {}
    for path in sorted((tmp_path / "in").iterdir()):
        prob = predict_probabilities(
            models.load(street), transforms.to_float(files.read_image(path)[None], "cpu")
        )
        scores[str(path)] = 1 - prob.max(dim=1).values.mean().item()
    status, out, _ = script(
        predict, street, tmp_path / "in", "--out-dir", tmp_path / "out", "--suggest", 3
    )
    lines = out.splitlines()
    assert (
        status == 0
        and (tmp_path / "out" / "suggest.txt").read_text().splitlines() == lines[:3]
        and len(lines) == 4
    )
    assert [line.split("  ")[1] for line in lines[:3]] == sorted(
        scores, key=scores.get, reverse=True
    )[:3]
    assert [float(line.split("  ")[0]) for line in lines[:3]] == pytest.approx(
        sorted(scores.values(), reverse=True)[:3], abs=1e-4
    )


def test_what_is_left_out_is_reported(street, script, tmp_path):
    for folder in ("in", "more"):
        (tmp_path / folder).mkdir()
        scene().save(tmp_path / folder / "a.jfif", "JPEG")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "more")
    for name in ("b.heic", ".c.heic", "d.ppm", "e.txt", "f.svs"):
        (tmp_path / "in" / name).write_text("x")
    status, text, _ = script(predict, street, tmp_path / "in", "--out-dir", tmp_path / "out")
    assert status == 0 and "1 of 1 images" in text and (tmp_path / "out" / "a.png").exists()
    assert ": 5 files are left out" in text and "b.heic ..." in text


@pytest.mark.parametrize("most", [1, 3])
def test_batches_of_one_size(most, tmp_path):
    """In order; what cannot be read is left out."""
    sizes = [(8, 9)] * 4 + [(9, 8)] + [(8, 9)]
    paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        scene(i, size).save(path)
    paths[1].write_text("not an image")
    with ThreadPoolExecutor(2) as pool:
        batches = list(predict.read_batches(pool, paths, lambda image: most, 2))
    assert [path for batch, _ in batches for path in batch] == [paths[i] for i in (0, 2, 3, 4, 5)]
    assert max(len(batch) for batch, _ in batches) == most
    for batch, images in batches:
        for path, image in zip(batch, images, strict=True):
            assert torch.equal(image, files.read_image(path)) and image.shape == images[0].shape


def test_a_batch_is_predicted_as_its_images(street):
    model = models.load(street)
    images = torch.stack([street_scene("test", i)[0] for i in range(3)])
    labels, confidence = evaluation.predict_images(model, images, (96, 96), tile=64)
    for i, image in enumerate(images):
        label, sure = evaluation.predict_images(model, image[None], (96, 96), tile=64)
        assert (labels[i] == label[0]).mean() > 0.999
        np.testing.assert_allclose(confidence[i], sure[0], atol=1e-5)


def test_ctrl_c_leaves_whole_files(street, script, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(12):
        scene(i, (300, 200)).save(tmp_path / "in" / f"{i:02d}.png")
    calls, true = itertools.count(), predict.predict_images

    def interrupted(*arguments, **options):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return true(*arguments, **options)

    monkeypatch.setattr(predict, "predict_images", interrupted)
    status, _, _ = script(predict, street, tmp_path / "in", "--out-dir", tmp_path / "out")
    written = tree(tmp_path / "out")
    assert status == 130 and 0 < len(written) < 24
    for name in written:
        with Image.open(tmp_path / "out" / name) as image:
            image.load()
            assert image.size == (300, 200)


def test_a_linked_image_has_the_name_of_the_link(street, script, tmp_path):
    """Which is the name of its label, too."""
    shutil.copytree(street, tmp_path / "run")
    (tmp_path / "run" / "labeled.txt").write_text("link_0\n")
    for folder in ("store", "in"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        scene(i).save(tmp_path / "store" / f"{i}.png")
        (tmp_path / "in" / f"link_{i}.png").symlink_to(tmp_path / "store" / f"{i}.png")
    words = [tmp_path / "run", tmp_path / "in", "--out-dir", tmp_path / "out", "--suggest", 5]
    status, text, _ = script(predict, *words)
    assert status == 0 and "2 of 2 images" in text
    assert "left out, since an image of the same name has a label: 1\n" in text
    masked = tmp_path / "images" / "val" / "a.png"
    assert not predict.has_mask(masked)
    (tmp_path / "labels" / "val").mkdir(parents=True)
    (tmp_path / "labels" / "val" / "a.PNG").write_text("x")
    assert predict.has_mask(masked) and not predict.has_mask(tmp_path / "other" / "val" / "a.png")
    assert not predict.has_mask(Path("/a.png"))
    (suggested,) = (tmp_path / "out" / "suggest.txt").read_text().splitlines()
    assert suggested.endswith(str(tmp_path / "in" / "link_1.png"))


def test_onnx(street, script, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    status, out, err = script(predict, street, "--onnx", tmp_path / "net.onnx")
    assert (
        status == 0
        and out == f"network written to {tmp_path / 'net.onnx'}\n"
        and tree(tmp_path) == {"net.onnx"}
    ), err
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert (
        json.loads(session.get_modelmeta().custom_metadata_map["classes"])
        == data.load_source("street", None).classes
    )
    model = models.load(street)
    for batch, size in ((1, (64, 64)), (3, (77, 130)), (2, (33, 1))):
        images = torch.stack(
            [
                transforms.to_float(transforms.resize_image(street_scene("val", i)[0], size), "cpu")
                for i in range(batch)
            ]
        )
        (logits,) = session.run(None, {"images": images.numpy()})
        prob = predict_probabilities(model, images)
        assert (
            logits.shape == prob.shape
            and (logits.argmax(1) == prob.argmax(1).numpy()).mean() >= 0.999
        )
        np.testing.assert_allclose(torch.from_numpy(logits).softmax(1), prob, atol=1e-4)


def test_onnx_says_what_to_install(street, script, tmp_path, monkeypatch):
    monkeypatch.setattr(predict.importlib.util, "find_spec", lambda name: None)
    status, _, err = script(predict, street, "--onnx", tmp_path / "net.onnx")
    assert (
        status == 2
        and err.count("\n") == 1
        and "pip install onnx onnxscript" in err
        and not tree(tmp_path)
    )


# ------------------------------------------------------------------------------------------- errors
def damaged(street, folder, **changes):
    """A copy of the run with other entries in its config.json."""
    shutil.copytree(street, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, **{key: change(config[key]) for key, change in changes.items()}})
    )
    return folder


def test_bad_input_is_one_line_and_leaves_nothing(street, script, tmp_path):
    picture, empty, file = tmp_path / "a.png", tmp_path / "empty", tmp_path / "file"
    scene().save(picture)
    empty.mkdir()
    file.write_text("x")
    (tmp_path / "in").mkdir()
    scene().save(tmp_path / "in" / "a.png")
    scene().save(long := tmp_path / "in" / f"{'字' * 80}.png")  # 3 bytes each
    runs = {
        "classes": dict(model=lambda m: {**m, "num_classes": 4}),
        "palette": dict(palette=lambda p: p[:3]),
        "colour": dict(palette=lambda p: [[300, 0, 0]] * len(p)),
        "wider": dict(model=lambda m: {**m, "channels": 24}),
        "backbone": dict(model=lambda m: {**m, "backbone": "resnet18"}),
        "unknown": dict(model=lambda m: {**m, "backbone": "no_such_net"}),
        "option": dict(model=lambda m: {**m, "depth": 3}),
        "text": dict(model=lambda m: {**m, "channels": "x"}),
        "crop": dict(crop_size=lambda c: None),
    }
    for name, changes in runs.items():
        damaged(street, tmp_path / name, **changes)
    for name in ("json", "list", "weights", "noise", "bare"):
        shutil.copytree(street, tmp_path / name)
    (tmp_path / "json" / "config.json").write_text((street / "config.json").read_text()[:-30])
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "weights" / "model.safetensors").write_bytes(
        (street / "model.safetensors").read_bytes()[:-100]
    )
    (tmp_path / "noise" / "model.safetensors").write_text("no weights")
    (tmp_path / "bare" / "model.safetensors").unlink()
    torch.save({"f": scene}, tmp_path / "code.pth")
    torch.save({"w": torch.zeros(99)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:600])
    out = ["--out-dir", tmp_path / "out"]
    checkpoint = ["--dataset", "cityscapes", picture, *out, "--checkpoint"]
    before = tree(tmp_path)
    for arguments, culprit in [
        ([], "run folder"),
        ([street], str(street)),
        ([street, picture], "--out-dir"),
        ([street, tmp_path / "none.png", *out], "none.png"),
        ([street, empty, *out], "empty: no image"),
        ([street, picture, tmp_path / "in", *out], f"{long}: its name is too long"),
        ([street, picture, "--out-dir", file], str(file)),
        ([street, picture, "--out-dir", file / "deeper"], "deeper"),
        ([street, picture, "--out-dir", tmp_path, "--overwrite"], "a.png"),
        ([street, picture, "--out-dir", tmp_path], "not empty"),
        ([street, tmp_path / "in", "--out-dir", tmp_path / "in"], "--out-dir"),
        ([street, picture, *out, "--dataset", "sun"], "--dataset"),
        ([street, picture, *out, "--suggest", "0"], "--suggest"),
        ([street, picture, *out, "--tile", "3"], "--tile"),
        ([street, picture, *out, "--scales", "x"], "--scales"),
        ([street, picture, *out, "--nonsense"], "--nonsense"),
        ([street, "--onnx", file / "net.onnx"], "net.onnx"),
        ([tmp_path / "nowhere", picture, *out], "nowhere"),
        ([empty, picture, *out], "config.json"),
        ([picture, picture, *out], "a.png"),
        *(
            ([tmp_path / name, picture, *out], "config.json")
            for name in ("classes", "palette", "colour", "option", "text", "crop", "json", "list")
        ),
        ([tmp_path / "unknown", picture, *out], "no_such_net"),
        *(
            ([tmp_path / name, picture, *out], "model.safetensors")
            for name in ("wider", "backbone", "weights", "noise", "bare")
        ),
        ([*checkpoint, tmp_path / "code.pth"], "code.pth"),
        ([*checkpoint, tmp_path / "cut.pth"], "cut.pth"),
        ([*checkpoint, tmp_path / "none.pth"], "none.pth"),
        ([*checkpoint, empty], "empty"),
        ([picture, *out, "--checkpoint", tmp_path / "cut.pth"], "--dataset"),
    ]:
        status, text, err = script(predict, *arguments)
        assert (
            status == 2
            and err.count("\n") == 1
            and err.startswith("predict.py: ")
            and culprit in err
            and not text
        ), (arguments, status, text, err)
        assert tree(tmp_path) == before and not (tmp_path / "out").exists(), arguments


def test_a_backbone_that_needs_some_pixels(script, tmp_path):
    folder = make_run(
        tmp_path / "run", backbone="test_convnext", output_stride=32, decoder_stride=4
    )
    scene(0, (1, 1)).save(tmp_path / "dot.png")
    status, _, err = script(predict, folder, tmp_path / "dot.png", "--out-dir", tmp_path / "out")
    assert status == 0 and mask_of(tmp_path / "out" / "dot.png").shape == (1, 1), err
