"""Scale, crop, pad, flip, colour and blur: image, label and confidence stay aligned, labels are
never interpolated, the draws have the stated distribution, and nothing waits for the device."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from inputs import transforms
from inputs.files import IGNORE
from mixing import STRATEGIES, mix

CLASSES = 12


def rng(seed=0):
    return np.random.default_rng(seed)


def scene(batch=1, height=60, width=80, cell=10, seed=0):
    """Images, labels and confidence in cells: the grey value and the confidence of each pixel are
    both (label + 1) / 16."""
    ids = rng(seed).integers(0, CLASSES, (batch, -(-height // cell), -(-width // cell)))
    cells = ids.repeat(cell, axis=1).repeat(cell, axis=2)
    label = torch.from_numpy(cells[:, :height, :width].copy())
    code = (label.float() + 1) / 16
    return code[:, None].repeat(1, 3, 1, 1), label, code


def flat(label, radius):
    """[B, H, W] bool: the pixels around which all labels are equal, as far as `radius`; none at
    the edges."""
    x = F.pad(label[:, None].float(), [radius] * 4, value=-1)
    high = F.max_pool2d(x, 2 * radius + 1, stride=1)
    low = -F.max_pool2d(-x, 2 * radius + 1, stride=1)
    return (high == low)[:, 0]


def assert_aligned(image, label, confidence, radius=2, stray=0.0):
    """In the inner part of every cell the image tells the label (but for a share `stray`); the
    confidence does everywhere."""
    known = label != IGNORE
    code = (label.float() + 1) / 16
    assert set(label.unique().tolist()) <= {*range(CLASSES), IGNORE}  # never interpolated
    assert torch.equal(confidence[known], code[known])
    assert (confidence[~known] == 0).all()
    inner = flat(label, radius) & known
    assert inner.float().mean() > 0.01
    wrong = (image[:, 0][inner] - code[inner]).abs() > 1e-5
    assert wrong.float().mean() <= stray


# -------------------------------------------------------------------------------------- sizes
def test_to_float():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    before = images.clone()
    as_float = transforms.to_float(images, torch.device("cpu"))
    assert as_float.dtype == torch.float32
    torch.testing.assert_close(as_float, before / 255)
    assert torch.equal(images, before)


def test_resampling_matches_pil():
    smooth = F.interpolate(torch.rand(1, 3, 9, 12), size=(90, 120), mode="bicubic")[0].clamp(0, 1)
    image = (smooth * 255).to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    label = rng().integers(0, 9, (90, 120)).astype(np.uint8)
    for size in ((45, 60), (61, 97), (133, 155)):
        expected = np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR), np.int32)
        resized = transforms.resize_image(image, size).permute(1, 2, 0).int().numpy()
        assert np.abs(resized - expected).max() <= 1
        expected = np.array(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
        resized = transforms.resize_nearest(torch.from_numpy(label), size).numpy()
        assert (resized != expected).mean() < 0.03  # where a centre falls between two pixels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float32])
def test_resize_nearest_keeps_the_type(dtype):
    values = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    expected = values.repeat_interleave(3, 0).repeat_interleave(2, 1)
    resized = transforms.resize_nearest(values, (6, 4))
    assert resized.dtype == dtype
    assert torch.equal(resized, expected)
    assert torch.equal(transforms.resize_nearest(values, (2, 2)), values)


def test_shrink_label():
    label = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 255], [12, 13, 14, 15]]])
    small = transforms.shrink_label(label, (2, 2))
    assert small.dtype == torch.int64
    assert small.tolist() == [[[0, 2], [8, 10]]]
    mask = transforms.shrink_label(label > 4, (2, 2))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[[False, False], [True, True]]]
    confidence = transforms.shrink_label(label / 16, (2, 2))
    assert confidence.dtype == torch.float32
    assert torch.equal(confidence, small / 16)


def test_shrink_known_keeps_every_cell_with_a_known_pixel():
    known = torch.full((1, 8, 8), 255)
    known[0, 3, 2] = 4  # alone in its cell of 4x4
    known[0, 0, 4], known[0, 1, 5] = 0, 6  # the nearest pixel of the cell, and another
    known[0, 5, 5], known[0, 6, 6] = 7, 2  # two, neither the nearest
    small = transforms.shrink_known(known, (2, 2))
    assert small.dtype == torch.int64
    assert small.tolist() == [[[4, 0], [255, 7]]]
    full = torch.arange(64).view(1, 8, 8) % 5
    assert torch.equal(transforms.shrink_known(full, (3, 3)), transforms.shrink_label(full, (3, 3)))


def test_upsample_aligns_the_corners():
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    small = torch.stack([y, x, 2 * y + x])[None]
    y, x = torch.meshgrid(torch.linspace(0, 3, 13), torch.linspace(0, 4, 21), indexing="ij")
    large = torch.stack([y, x, 2 * y + x])[None]
    torch.testing.assert_close(transforms.upsample(small, (13, 21)), large)
    torch.testing.assert_close(transforms.upsample(small, torch.Size([4, 5])), small)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_reflect_pad_reflects_as_often_as_needed(size):
    small = torch.arange(3 * size * size, dtype=torch.uint8).view(3, size, size)
    mode = "reflect" if size > 1 else "edge"
    expected = np.pad(small.numpy(), ((0, 0), (0, 9), (0, 7)), mode=mode)
    for x in (small, small.float()):
        padded = transforms.reflect_pad(x, size + 9, size + 7)
        assert padded.dtype == x.dtype
        assert np.array_equal(padded.numpy(), expected)
        assert torch.equal(transforms.reflect_pad(x, 1, 1), x)  # large enough already


# ---------------------------------------------------------------------------- scale and crop
@pytest.mark.parametrize("crop", [(40, 40), (64, 48), (90, 100), (200, 31)])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 1.5), (0.3, 0.4), (2.0, 2.5)])
def test_scale_crop_and_pad_stay_aligned(crop, scale):
    radius = 1 if scale[1] < 1 else 2 if scale[1] == 1 else 4  # of the blur by resampling
    for seed in range(5):
        batch = scene(2, cell=20, seed=seed)
        images, labels, confidence = transforms.batch_scale_crop(*batch, crop, scale, rng(seed))
        assert images.shape == (2, 3, *crop)
        assert labels.shape == confidence.shape == (2, *crop)
        assert labels.dtype == torch.int64
        assert_aligned(images, labels, confidence, radius)


def test_padding_lies_right_and_below_ignored_and_reflected():
    _, label, confidence = (x[0] for x in scene(height=30, width=40))
    ramp = torch.arange(30 * 40.0).view(30, 40).expand(3, 30, 40)
    padded, new_label, new_confidence = transforms.random_scale_crop(
        ramp, label, confidence, (100, 64), (1.0, 1.0), rng()
    )
    assert torch.equal(new_label[:30, :40], label)
    assert torch.equal(new_confidence[:30, :40], confidence)
    outside = torch.ones(100, 64, dtype=torch.bool)
    outside[:30, :40] = False
    assert (new_label[outside] == IGNORE).all()
    assert (new_confidence[outside] == 0).all()
    expected = np.pad(ramp.numpy(), ((0, 0), (0, 70), (0, 24)), mode="reflect")
    assert np.array_equal(padded.numpy(), expected)


def assert_uniform(values, low, high, name=""):
    """The Kolmogorov-Smirnov distance to the uniform distribution is that of chance, and the values
    reach both ends."""
    values = (np.sort(values) - low) / (high - low)
    number = len(values)
    assert 0 <= values[0] < 10 / number, name
    assert 1 - 10 / number < values[-1] <= 1, name
    distance = np.abs(values - (np.arange(number) + 0.5) / number).max()
    assert distance < 1.95 / number**0.5, name


@pytest.mark.parametrize("with_confidence", [True, False])
def test_single_known_pixels_are_not_lost_by_scaling(with_confidence):
    """Of 40 pixels, far apart, some are met by nearest sampling at 0.5 to 1; `sparse` keeps all."""
    image, other = torch.zeros(3, 60, 72), 9 if with_confidence else 255
    label = torch.full((60, 72), other)
    label[5::12, 4::9] = torch.arange(40).view(5, 8) % 4
    confidence = (label != other).float() if with_confidence else None
    few = 0
    for seed, sparse in itertools.product(range(20), (False, True)):
        sample = image, label, confidence, (60, 72), (0.5, 1.0)
        _, new, sure = transforms.random_scale_crop(*sample, rng(seed), sparse)
        known = new < 4
        assert new.dtype == label.dtype
        if sparse:
            assert torch.bincount(new[known]).min() >= 10
        else:
            few += int(torch.bincount(new[known], minlength=4).min() < 10)
        if with_confidence:
            assert torch.equal(sure == 1, known)
    assert few > 10  # 20 but for scales near 1


def test_crops_are_uniform():
    """The position of every crop is read off an image that tells its rows and columns."""
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    image, label = torch.stack([y, x, y]), torch.zeros(20, 30, dtype=torch.uint8)
    generator, corners = rng(1), []
    for _ in range(3000):
        crop = transforms.random_scale_crop(image, label, None, (16, 16), (1.0, 1.0), generator)[0]
        corners.append(crop[:2, 0, 0].int().tolist())
    for values, number in zip(np.transpose(corners), (5, 15), strict=True):
        count = np.bincount(values, minlength=number)
        assert len(count) == number
        assert np.abs(count - 3000 / number).max() < 5 * (3000 / number) ** 0.5


def test_scales_are_uniform():
    """The scale of every crop is read off the slope of a ramp."""
    ramp = torch.arange(400.0).expand(3, 4, 400)
    label, generator, factors = torch.zeros(4, 400, dtype=torch.uint8), rng(1), []
    for _ in range(600):
        crop = transforms.random_scale_crop(ramp, label, None, (1, 64), (0.5, 1.5), generator)[0]
        factors.append(47 / float(crop[0, 0, 55] - crop[0, 0, 8]))  # away from the ramp's ends
    factors = np.array(factors)
    assert factors.min() > 0.49
    assert factors.max() < 1.51
    assert_uniform(factors.clip(0.5, 1.5), 0.5, 1.5)


def test_uint8_images_without_confidence():
    image = torch.randint(0, 256, (3, 33, 45), dtype=torch.uint8)
    label = torch.randint(0, 5, (33, 45), dtype=torch.uint8)
    new, new_label, confidence = transforms.random_scale_crop(
        image, label, None, (50, 50), (0.5, 1.5), rng()
    )
    assert new.dtype == new_label.dtype == torch.uint8
    assert new.shape == (3, 50, 50)
    assert new_label.shape == (50, 50)
    assert confidence is None


def test_a_batch_of_the_right_size_is_left_as_it_is():
    batch = scene(2, 40, 40)
    same = transforms.batch_scale_crop(*batch, (40, 40), (1.0, 1.0), rng())
    assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))


def test_scale_crop_leaves_its_arguments_alone_and_follows_the_seed():
    batch = scene(5)
    before = [x.clone() for x in batch]
    first, second, other = (
        transforms.batch_scale_crop(*batch, (64, 64), (0.5, 1.5), rng(seed)) for seed in (9, 9, 10)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, batch, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], other[1])


# ---------------------------------------------------------------------- colour, blur and flip
@pytest.mark.usefixtures("without_colour")
def test_the_whole_chain_stays_aligned():
    for seed, strategy in itertools.product(range(4), STRATEGIES):
        torch.manual_seed(seed)
        generator, batch = rng(seed), scene(4, cell=15, seed=seed)
        batch = transforms.batch_scale_crop(*batch, (64, 64), (0.5, 1.5), generator)
        # where mixing joins two regions of one class, the image still shows their old borders
        assert_aligned(*transforms.augment(*mix(*batch, strategy), generator), stray=0.02)


@pytest.mark.usefixtures("without_colour")
@pytest.mark.parametrize("with_confidence", [True, False])
def test_flips_image_label_and_confidence_together(with_confidence):
    images, labels, confidence = scene(64, 6, 8, cell=1)
    old = (images, labels, confidence if with_confidence else None)
    new = transforms.augment(*old, rng(3))
    flipped = torch.tensor([not torch.equal(a, b) for a, b in zip(labels, new[1], strict=True)])
    assert 16 < flipped.sum() < 48
    assert (new[2] is not None) == with_confidence
    for before, after in zip(old, new, strict=True):
        if before is not None:
            chosen = flipped.view(-1, *[1] * (before.ndim - 1))
            assert torch.equal(after, torch.where(chosen, before.flip(-1), before))


NAMES = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")


@pytest.fixture(scope="module")
def draws():
    """Image -> [(function, amount), ...] in the order of the calls, for 2,000 images in batches
    of 4; and which images were flipped."""
    calls, flipped = {i: [] for i in range(2000)}, []

    def record(name):
        def change(image, *amount):
            calls[int(image[0, 0, 0])].append((name, *amount))
            return image

        return change

    def flip(x):
        if x.ndim == 3:  # the image, not its label
            flipped.append(int(x[0, 0, 0]))
        return x

    with pytest.MonkeyPatch.context() as patch:
        recorders = tuple(record(change.__name__) for change in transforms.COLOUR_CHANGES)
        patch.setattr(transforms, "COLOUR_CHANGES", recorders)
        patch.setattr(transforms.tv, "gaussian_blur", record("blur"))
        patch.setattr(transforms.tv, "horizontal_flip", flip)
        generator, images = rng(4), torch.arange(2000.0).view(-1, 1, 1, 1).expand(-1, 3, 1, 2)
        for batch in images.split(4):
            transforms.augment(batch, batch[:, 0].long(), None, generator)
    jitters = {i: [c for c in entries if c[0] != "blur"] for i, entries in calls.items()}
    blurs = {i: [c for c in entries if c[0] == "blur"] for i, entries in calls.items()}
    assert all(jitters[i] + blurs[i] == calls[i] for i in calls)  # the blur comes last
    assert {len(entries) for entries in jitters.values()} == {0, 4}  # all four or none
    assert {len(entries) for entries in blurs.values()} == {0, 1}
    assert len(set(flipped)) == len(flipped)
    jitters = {i: entries for i, entries in jitters.items() if entries}
    return jitters, {i: entries[0] for i, entries in blurs.items() if entries}, set(flipped)


def test_how_often_each_change_is_made(draws):
    jittered, blurred, flipped = (set(x) for x in draws)
    for chosen, expected in (
        (jittered, 0.8),
        (blurred, 0.5),
        (flipped, 0.5),
        (jittered & blurred, 0.4),  # independent of each other
        (jittered & flipped, 0.4),
        (blurred & flipped, 0.25),
    ):
        assert abs(len(chosen) / 2000 - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


def test_each_image_has_its_own_order_of_colour_changes(draws):
    orders = [tuple(name for name, _ in entries) for entries in draws[0].values()]
    assert set(orders) == set(itertools.permutations(NAMES))
    mean = len(orders) / 24
    assert max(map(orders.count, set(orders))) < mean + 5 * mean**0.5
    equal = sum(a == b for a, b in zip(orders[::2], orders[1::2], strict=False))
    assert equal < len(orders) / 10  # not one order for a batch


def test_the_amounts_are_uniform_and_independent(draws):
    jitters, blurs, _ = draws
    amounts = {name: [dict(entries)[name] for entries in jitters.values()] for name in NAMES}
    for name in NAMES[:3]:
        assert_uniform(amounts[name], 0.75, 1.25, name)
    assert_uniform(amounts["adjust_hue"], -0.25, 0.25, "hue")
    assert {kernel for _, kernel, _ in blurs.values()} == {9}
    assert_uniform([sigma for *_, sigma in blurs.values()], 0.15, 1.15, "sigma")
    assert np.abs(np.corrcoef(list(amounts.values())) - np.eye(4)).max() < 0.1
    for values in amounts.values():
        assert len(set(values)) == len(values)  # each image has its own


def colourful(batch, height=24, width=32):
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    images[0, :, :4] = 0.5  # grey
    images[0, :, 4:6] = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    images[0, :, 6:8] = torch.tensor([1.0, 1.0, 0.0])[:, None, None]
    images[0, :, 8:9], images[0, :, 9:10] = 0, 1  # black, white
    return images


@pytest.mark.parametrize("size", [(24, 32), (5, 5)])  # the smallest that the blur can reflect
def test_augment_leaves_its_arguments_alone_and_follows_the_seed(size):
    arguments = (colourful(8)[..., : size[0], : size[1]], *scene(8, *size, cell=2)[1:])
    before = [x.clone() for x in arguments]
    first, second, other = (transforms.augment(*arguments, rng(seed)) for seed in (9, 9, 10))
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    for old, new in zip(arguments, first, strict=True):
        assert new.dtype == old.dtype
        assert new.shape == old.shape
        new.fill_(1)  # the results are new tensors
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))
    assert second[0].min() >= 0
    assert second[0].max() <= 1 + 1e-6  # the blur's weights sum to 1 up to rounding
    assert second[0].isfinite().all()


def test_images_of_a_batch_do_not_influence_each_other():
    images, labels = colourful(8), scene(8, 24, 32)[1]
    whole = transforms.augment(images, labels, None, rng(5))[0]
    for b in range(8):
        alone = torch.zeros_like(images)
        alone[b] = images[b]
        torch.testing.assert_close(transforms.augment(alone, labels, None, rng(5))[0][b], whole[b])


# --------------------------------------------------------------- nothing waits for the device
class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: reading a value, shapes that depend on
    values."""

    WAITS = frozenset(
        {
            "_local_scalar_dense",
            "_unique2",
            "bincount",
            "equal",
            "is_nonzero",
            "masked_select",
            "nonzero",
            "repeat_interleave",
            "unique_consecutive",
        }
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, function
        if name in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), function
        return function(*args, **(kwargs or {}))


def chain(images, labels, confidence, strategy):
    """Everything that happens to a batch between the loader and the network; ten images, so that
    every change is made to some."""
    generator = rng(2)
    images = transforms.to_float(images, labels.device)
    batch = transforms.batch_scale_crop(images, labels, confidence, (64, 64), (0.5, 1.5), generator)
    fill = torch.full((3, 1, 1), 0.5, device=labels.device)
    mixed = mix(*batch, strategy, fill=fill)
    images, labels, confidence = transforms.augment(*mixed, generator)
    small = (16, 16)
    return (
        images,
        transforms.shrink_label(labels, small),
        transforms.shrink_label(confidence >= 0.7, small),
        transforms.upsample(images, (96, 96)),
    )


def loaded():
    images, labels, confidence = scene(10)
    return (images * 255).to(torch.uint8), labels, confidence


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_waits_for_the_device(strategy):
    with pytest.raises(AssertionError), NoWaiting():
        torch.ones(1).item()
    with NoWaiting():
        chain(*loaded(), strategy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_waits_for_the_gpu(strategy):
    images, labels, confidence = loaded()
    pinned, on_gpu = images.pin_memory(), (labels.cuda(), confidence.cuda())
    chain(pinned, *on_gpu, strategy)
    torch.manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = chain(pinned, *on_gpu, strategy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.is_cuda for x in results)
    assert results[0].isfinite().all()
    if strategy != "classmix":  # its draw is the device's
        torch.manual_seed(0)
        expected = chain(images, labels, confidence, strategy)
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, atol=2e-4, rtol=0)
