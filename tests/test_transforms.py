"""Scale, crop, pad, flip, colour and blur: image, label and confidence stay aligned, labels are never interpolated, the colours are those of
torchvision, the draws have the stated distribution, and nothing waits for the device."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image, ImageFilter
from torch.utils._python_dispatch import TorchDispatchMode

import data
from data import IGNORE
from mixing import mix

CLASSES = 12


def rng(seed=0):
    return np.random.default_rng(seed)


def scene(batch=1, height=60, width=80, cell=10, seed=0):
    """A label that can be read off its image (grey value (label + 1) / 16) and off its confidence (label + 1) / 16, in cells, with some ignored."""
    ids = rng(seed).integers(0, CLASSES, (batch, -(-height // cell), -(-width // cell)))
    label = torch.from_numpy(
        ids.repeat(cell, axis=1).repeat(cell, axis=2)[:, :height, :width].copy()
    )
    code = (label.float() + 1) / 16
    return code[:, None].repeat(1, 3, 1, 1), label, code


def flat(label, radius):
    """[B, H, W] bool: the pixels around which all labels are equal, as far as `radius`; none at the edges."""
    x = torch.nn.functional.pad(label[:, None].float(), [radius] * 4, value=-1)
    high, low = (
        torch.nn.functional.max_pool2d(sign * x, 2 * radius + 1, stride=1) * sign
        for sign in (1, -1)
    )
    return (high == low)[:, 0]


def assert_aligned(image, label, confidence, radius=2, stray=0.0):
    """In the inner part of every cell the image tells the label (but for a share `stray`); the confidence does everywhere."""
    known = label != IGNORE
    assert set(label.unique().tolist()) <= {*range(CLASSES), IGNORE}  # never interpolated
    assert (
        torch.equal(confidence[known], (label[known].float() + 1) / 16)
        and (confidence[~known] == 0).all()
    )
    inner = flat(label, radius) & known
    assert inner.float().mean() > 0.01
    assert (
        (image[:, 0][inner] - (label[inner].float() + 1) / 16).abs() > 1e-5
    ).float().mean() <= stray


@pytest.mark.parametrize("crop", [(40, 40), (64, 48), (90, 100), (200, 31)])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 1.5), (0.3, 0.4), (2.0, 2.5)])
def test_scale_crop_and_pad_stay_aligned(crop, scale):
    for seed in range(5):
        images, labels, confidence = data.batch_scale_crop(
            *scene(2, cell=20, seed=seed), crop, scale, rng(seed)
        )
        assert (
            images.shape == (2, 3, *crop)
            and labels.shape == confidence.shape == (2, *crop)
            and labels.dtype == torch.int64
        )
        assert_aligned(
            images, labels, confidence, radius=1 if scale[1] < 1 else 2 if scale[1] == 1 else 4
        )


def test_padding_lies_right_and_below_ignored_and_reflected():
    image, label, confidence = (x[0] for x in scene(height=30, width=40))
    ramp = torch.arange(30 * 40.0).view(30, 40).expand(3, 30, 40)
    padded, new_label, new_confidence = data.random_scale_crop(
        ramp, label, confidence, (100, 64), (1.0, 1.0), rng()
    )
    assert torch.equal(new_label[:30, :40], label) and torch.equal(
        new_confidence[:30, :40], confidence
    )
    outside = torch.ones(100, 64, dtype=torch.bool)
    outside[:30, :40] = False
    assert (new_label[outside] == IGNORE).all() and (new_confidence[outside] == 0).all()
    assert np.array_equal(
        padded[0].numpy(), np.pad(ramp[0].numpy(), ((0, 70), (0, 24)), mode="reflect")
    )  # more than once where needed
    for size in (1, 2, 3):
        small = torch.arange(3.0 * size * size).view(3, size, size)
        expected = np.pad(
            small.numpy(), ((0, 0), (0, 9), (0, 7)), mode="reflect" if size > 1 else "edge"
        )
        assert np.array_equal(data.reflect_pad(small, size + 9, size + 7).numpy(), expected)


def test_crops_are_uniform_and_scales_too():
    """The position of every crop is read off an image that tells its rows and columns; the scale off its slope."""
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    image, label = torch.stack([y, x, y]), torch.zeros(20, 30, dtype=torch.uint8)
    generator = rng(1)
    tops, lefts = zip(
        *(
            (int(c[0, 0, 0]), int(c[1, 0, 0]))
            for c, _, _ in (
                data.random_scale_crop(image, label, None, (16, 16), (1.0, 1.0), generator)
                for _ in range(3000)
            )
        )
    )
    for values, number in ((tops, 5), (lefts, 15)):
        count = np.bincount(values, minlength=number)
        assert (
            len(count) == number
            and np.abs(count - 3000 / number).max() < 5 * (3000 / number) ** 0.5
        )
    slopes = []
    for _ in range(600):
        crop = data.random_scale_crop(image, label, None, (8, 8), (0.5, 1.5), generator)[0]
        slopes.append(7 / float(crop[1, 4, 7] - crop[1, 4, 0]))
    assert (
        0.45 < min(slopes) < 0.56 and 1.4 < max(slopes) < 1.65 and abs(np.mean(slopes) - 1) < 0.06
    )


def test_uint8_images_and_no_confidence():
    image, label = (
        torch.randint(0, 256, (3, 33, 45), dtype=torch.uint8),
        torch.randint(0, 5, (33, 45), dtype=torch.uint8),
    )
    new, new_label, confidence = data.random_scale_crop(
        image, label, None, (50, 50), (0.5, 1.5), rng()
    )
    assert (
        new.dtype == new_label.dtype == torch.uint8
        and new.shape == (3, 50, 50)
        and confidence is None
    )
    same = data.batch_scale_crop(*scene(2, 40, 40), (40, 40), (1.0, 1.0), rng())
    assert all(torch.equal(a, b) for a, b in zip(same, scene(2, 40, 40)))


def test_resampling_matches_pil():
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 9, 12), size=(90, 120), mode="bicubic"
    )[0].clamp(0, 1)
    image = (smooth * 255).to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    for size in ((45, 60), (61, 97), (133, 155)):
        expected = torch.from_numpy(np.array(picture.resize(size[::-1], Image.BILINEAR))).permute(
            2, 0, 1
        )
        assert (data.resize_image(image, size).int() - expected.int()).abs().max() <= 1
        label = rng().integers(0, 9, (90, 120)).astype(np.uint8)
        different = data.resize_nearest(label, size) != np.array(
            Image.fromarray(label).resize(size[::-1], Image.NEAREST)
        )
        assert different.mean() < 0.03  # where a centre falls between two pixels


@pytest.fixture
def without_colour(monkeypatch):
    monkeypatch.setattr(data, "JITTER", (lambda x, amount: x,) * 4)
    monkeypatch.setattr(data, "gaussian_blur", lambda x, sigma: x)


def test_the_whole_chain_stays_aligned(without_colour):
    for seed, strategy in itertools.product(range(4), ("cutout", "cutmix", "classmix")):
        torch.manual_seed(seed)
        generator = rng(seed)
        batch = data.batch_scale_crop(
            *scene(4, cell=15, seed=seed), (64, 64), (0.5, 1.5), generator
        )
        # where mixing joins two regions of one class, the image still shows the borders that were there
        assert_aligned(*data.augment(*mix(*batch, strategy), generator), stray=0.02)


def test_flips_image_label_and_confidence_together(without_colour):
    images, labels, confidence = scene(64, 6, 8, cell=1)
    for known in (confidence, None):
        new_images, new_labels, new_confidence = data.augment(images, labels, known, rng(3))
        flipped = torch.tensor([not torch.equal(a, b) for a, b in zip(labels, new_labels)])
        assert 16 < flipped.sum() < 48
        for old, new in ((images, new_images), (labels, new_labels), (known, new_confidence)):
            assert old is new is None or torch.equal(
                new, torch.where(flipped.view(-1, *[1] * (old.ndim - 1)), old.flip(-1), old)
            )


def test_distribution_of_the_draws(monkeypatch):
    """Every draw of 2,000 images in batches of 4, as the reference has them: each image its own, in its own order."""
    calls = []

    def record(name):
        def change(x, amount):
            calls.extend((int(i), name, float(a)) for i, a in zip(x[:, 0, 0, 0], amount))
            return x

        return change

    monkeypatch.setattr(
        data,
        "JITTER",
        tuple(record(name) for name in ("brightness", "contrast", "saturation", "hue")),
    )
    monkeypatch.setattr(data, "gaussian_blur", record("blur"))
    generator, images = rng(4), torch.arange(2000.0).view(-1, 1, 1, 1).expand(-1, 3, 1, 2)
    for batch in images.split(4):
        data.augment(batch, batch[:, 0].long(), None, generator)
    by_image = {}
    for image, name, amount in calls:
        by_image.setdefault(image, []).append((name, amount))
    jittered = {
        image: [entry for entry in entries if entry[0] != "blur"]
        for image, entries in by_image.items()
        if entries[0][0] != "blur"
    }
    blurred = {
        image: entries[-1][1] for image, entries in by_image.items() if entries[-1][0] == "blur"
    }

    def share(number, expected):
        assert abs(number / 2000 - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5

    (
        share(len(jittered), 0.8),
        share(len(blurred), 0.5),
        share(len(jittered.keys() & blurred.keys()), 0.4),
    )
    assert all(len(entries) == 4 for entries in jittered.values())
    orders = [tuple(name for name, _ in entries) for entries in jittered.values()]
    assert (
        len(set(orders)) == 24
        and max(map(orders.count, set(orders))) < len(orders) / 24 + 5 * (len(orders) / 24) ** 0.5
    )
    assert (
        sum(a == b for a, b in zip(orders[::2], orders[1::2])) < len(orders) / 10
    )  # not one order for a batch
    amounts = {
        name: [dict(entries)[name] for entries in jittered.values()]
        for name in ("brightness", "contrast", "saturation", "hue")
    }
    for name, values, low, high in [
        *((n, amounts[n], 0.75, 1.25) for n in ("brightness", "contrast", "saturation")),
        ("hue", amounts["hue"], -0.25, 0.25),
        ("sigma", list(blurred.values()), 0.15, 1.15),
    ]:
        values = (np.sort(values) - low) / (
            high - low
        )  # uniform: the distance to its distribution function (Kolmogorov-Smirnov)
        assert values[0] >= 0 and values[-1] <= 1, name
        assert (
            np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max()
            < 1.95 / len(values) ** 0.5
        ), name
    assert np.abs(np.corrcoef(list(amounts.values())) - np.eye(4)).max() < 0.1


def colourful(batch=3, height=24, width=32):
    torch.manual_seed(0)
    images = torch.rand(batch, 3, height, width)
    images[0, :, :4] = 0.5  # grey
    images[0, :, 4:6] = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    images[0, :, 6:8] = torch.tensor([1.0, 1.0, 0.0])[:, None, None]
    images[0, :, 8:9], images[0, :, 9:10] = 0, 1  # black, white
    return images


def test_colours_are_those_of_torchvision():
    images, factor = colourful(), torch.tensor([0.75, 1.1, 1.25])
    for change, reference in zip(
        data.JITTER, (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    ):
        expected = torch.stack([reference(image, float(f)) for image, f in zip(images, factor)])
        weights_differ = 2e-3  # torchvision's luma is 0.2989, 0.587, 0.114
        torch.testing.assert_close(change(images, factor), expected, atol=weights_differ, rtol=0)
    for shift in ([-0.25, 0.0, 0.25], [-0.5, 0.1, 0.4], [0.01, -0.01, 0.2]):
        expected = torch.stack([tv.adjust_hue(image, s) for image, s in zip(images, shift)])
        torch.testing.assert_close(
            data.shift_hue(images, torch.tensor(shift)), expected, atol=2e-6, rtol=0
        )


def test_blur_is_that_of_torchvision_with_replicated_edges():
    images, sigma = colourful(), torch.tensor([0.15, 0.7, 1.15])
    blurred = data.gaussian_blur(images, sigma)
    for image, s, result in zip(images, sigma, blurred):
        wide = torch.nn.functional.pad(image[None], (8, 8, 8, 8), mode="replicate")[0]
        torch.testing.assert_close(
            result, tv.gaussian_blur(wide, 9, float(s))[:, 8:-8, 8:-8], atol=1e-6, rtol=0
        )
    torch.testing.assert_close(
        data.gaussian_blur(torch.ones(1, 3, 5, 5), sigma[2:]), torch.ones(1, 3, 5, 5)
    )
    assert data.gaussian_blur(torch.rand(1, 3, 2, 1), sigma[:1]).shape == (
        1,
        3,
        2,
        1,
    )  # smaller than the kernel
    # and close to PIL's approximation by boxes, which the reference used
    picture = (colourful(1, 40, 40)[0] * 255).to(torch.uint8)
    pil = np.asarray(
        Image.fromarray(picture.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(1.0)),
        np.float32,
    )
    ours = (
        data.gaussian_blur(picture[None] / 255, torch.tensor([1.0]))[0].permute(1, 2, 0).numpy()
        * 255
    )
    assert np.abs(pil - ours).mean() < 6


def test_batched_changes_equal_single_ones():
    """What a GPU does with all chosen images at once equals what the CPU does image by image."""
    images = torch.rand(6, 3, 20, 20)
    amount = rng().uniform(0.75, 1.25, 6).astype(np.float32)
    chosen = np.array([True, False, True, True, False, True])
    for change in (*data.JITTER, data.gaussian_blur):
        result = data.change_some(images, chosen, change, amount)
        for i in range(6):
            expected = (
                change(images[i : i + 1], torch.from_numpy(amount[i : i + 1]))[0]
                if chosen[i]
                else images[i]
            )
            torch.testing.assert_close(result[i], expected)
    assert data.change_some(images, ~chosen & chosen, data.gaussian_blur, amount) is images


def test_augment_leaves_its_arguments_alone_and_follows_the_seed():
    images, labels, confidence = scene(5)
    before = [x.clone() for x in (images, labels, confidence)]
    first, second = (data.augment(images, labels, confidence, rng(9)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, (images, labels, confidence)))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[0], data.augment(images, labels, confidence, rng(10))[0])
    assert first[0].min() >= 0 and first[0].max() <= 1 and first[0].dtype == torch.float32


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: reading a value, shapes that depend on values."""

    WAITS = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "unique_consecutive",
        "_unique2",
        "bincount",
        "repeat_interleave",
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITS, function
        if function.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), function
        return function(*args, **(kwargs or {}))


def chain(images, labels, confidence, strategy, device):
    generator = rng(2)
    batch = data.batch_scale_crop(images, labels, confidence, (64, 64), (0.5, 1.5), generator)
    images, labels, confidence = data.augment(
        *mix(*batch, strategy, fill=data.mean_colour(device)), generator
    )
    return (
        data.normalise(images),
        data.shrink_label(labels, (16, 16)),
        data.shrink_label(confidence >= 0.7, (16, 16)),
    )


@pytest.mark.parametrize("strategy", ["cutout", "cutmix", "classmix"])
def test_nothing_waits_for_the_device(strategy):
    batch = scene(4)
    data.mean_colour(batch[0].device)
    with pytest.raises(AssertionError), NoWaiting():
        torch.ones(1).item()
    with NoWaiting():
        chain(*batch, strategy, batch[0].device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("strategy", ["cutout", "cutmix", "classmix"])
def test_nothing_waits_for_the_gpu(strategy):
    device = torch.device("cuda")
    batch = [x.to(device) for x in scene(4)]
    chain(*batch, strategy, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = chain(*batch, strategy, device)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if strategy != "classmix":  # its draw is the device's
        torch.manual_seed(0)
        on_gpu = chain(*batch, strategy, device)[0].cpu()
        torch.manual_seed(0)
        torch.testing.assert_close(
            on_gpu,
            chain(*(x.cpu() for x in batch), strategy, torch.device("cpu"))[0],
            atol=2e-4,
            rtol=0,
        )
    assert images.isfinite().all()


def test_small_helpers():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    as_float = data.to_float(images, torch.device("cpu"))
    torch.testing.assert_close(
        data.normalise(as_float), tv.normalize(images / 255, data.MEAN, data.STD)
    )
    torch.testing.assert_close(
        data.normalise(data.mean_colour(torch.device("cpu"))[None]), torch.zeros(1, 3, 1, 1)
    )
    label = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 255], [12, 13, 14, 15]]])
    assert (
        data.shrink_label(label, (2, 2)).tolist() == [[[0, 2], [8, 10]]]
        and data.shrink_label(label, (2, 2)).dtype == torch.int64
    )
    assert data.shrink_label(label > 4, (2, 2)).tolist() == [[[False, False], [True, True]]]
