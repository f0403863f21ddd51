"""Scale, crop, pad, flip, colour and blur: image, label and confidence stay aligned, labels are
never interpolated, draws follow the stated distribution, and nothing synchronises with a GPU."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as tv

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


def with_padding(label, confidence, sparse=False):
    """The maps of `batch_scale_crop` and `random_scale_crop`."""
    return (label, IGNORE, sparse), (confidence, 0.0, False)


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
    as_pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    label = rng().integers(0, 9, (90, 120)).astype(np.uint8)
    for size in ((45, 60), (61, 97), (133, 155)):
        expected = np.array(as_pil.resize(size[::-1], Image.Resampling.BILINEAR), np.int32)
        resized = transforms.resize_image(image, size).permute(1, 2, 0).int().numpy()
        assert np.abs(resized - expected).max() <= 1
        expected = np.array(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
        resized = transforms.resize_nearest(torch.from_numpy(label), size).numpy()
        assert (resized != expected).mean() < 0.03  # where a centre falls between two pixels


@pytest.mark.parametrize("size", [(32, 1), (1, 1), (1, 40), (3, 1)])
@pytest.mark.parametrize("shape", [(64, 2), (2, 64), (1, 1)])
def test_resizing_uint8_to_one_pixel_is_right(shape, size):
    image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8).permute(2, 0, 1)
    expected = transforms.resize_image(image.float(), size)
    for x in (image, image.contiguous()):
        resized = transforms.resize_image(x, size)
        assert resized.dtype == torch.uint8
        assert (resized - expected).abs().max() <= 1


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
        images, *maps = batch
        view = transforms.batch_scale_crop(images, with_padding(*maps), crop, scale, rng(seed))
        images, labels, confidence = view
        assert images.shape == (2, 3, *crop)
        assert labels.shape == confidence.shape == (2, *crop)
        assert labels.dtype == torch.int64
        assert_aligned(images, labels, confidence, radius)


def test_padding_lies_right_and_below_ignored_and_reflected():
    _, label, confidence = (x[0] for x in scene(height=30, width=40))
    ramp = torch.arange(30 * 40.0).view(30, 40).expand(3, 30, 40)
    padded, new_label, new_confidence = transforms.random_scale_crop(
        ramp, with_padding(label, confidence), (100, 64), (1.0, 1.0), rng()
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


def test_single_known_pixels_are_not_lost_by_scaling():
    """Of 40 pixels, far apart, nearest sampling at 0.5 to 1 meets some; `sparse` keeps all."""
    image, label = torch.zeros(3, 60, 72), torch.full((60, 72), IGNORE)
    label[5::12, 4::9] = torch.arange(40).view(5, 8) % 4
    few = 0
    for seed in range(20):
        maps = (label, IGNORE, False), (label, IGNORE, True)
        _, some, kept = transforms.random_scale_crop(image, maps, (60, 72), (0.5, 1.0), rng(seed))
        assert kept.dtype == label.dtype
        assert torch.bincount(kept[kept != IGNORE]).min() >= 10
        few += int(torch.bincount(some[some != IGNORE], minlength=4).min() < 10)
    assert few > 10  # 20 but for scales near 1


def test_an_image_scaled_to_one_pixel():
    """Also an image of one row, whose height does not shrink with its width."""
    image = torch.full((3, 64, 3), 200, dtype=torch.uint8)
    label = torch.full((64, 3), 7, dtype=torch.uint8)
    maps, scale = with_padding(label, torch.ones(64, 3)), (0.01, 0.01)
    new, new_label, confidence = transforms.random_scale_crop(image, maps, (16, 20), scale, rng())
    assert new.shape == (3, 16, 20)
    assert (new == 200).all()
    assert new_label.sum() == 7 + (16 * 20 - 1) * IGNORE
    assert confidence.sum() == 1
    row = torch.full((1, 100), IGNORE)
    row[0, ::10] = 3  # nearest sampling meets none of them
    assert (transforms.resize_label(row, (1, 50), sparse=True) == 3).sum() == 10


def test_crops_are_uniform():
    """The position of every crop is read off an image that tells its rows and columns."""
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    image, generator, corners = torch.stack([y, x, y]), rng(1), []
    for _ in range(3000):
        (crop,) = transforms.random_scale_crop(image, [], (16, 16), (1.0, 1.0), generator)
        corners.append(crop[:2, 0, 0].int().tolist())
    for values, number in zip(np.transpose(corners), (5, 15), strict=True):
        count = np.bincount(values, minlength=number)
        assert len(count) == number
        assert np.abs(count - 3000 / number).max() < 5 * (3000 / number) ** 0.5


def test_scales_are_uniform():
    """The scale of every crop is read off the slope of a ramp."""
    ramp = torch.arange(400.0).expand(3, 4, 400)
    generator, factors = rng(1), []
    for _ in range(600):
        (crop,) = transforms.random_scale_crop(ramp, [], (1, 64), (0.5, 1.5), generator)
        factors.append(47 / float(crop[0, 0, 55] - crop[0, 0, 8]))  # away from the ramp's ends
    factors = np.array(factors)
    assert factors.min() > 0.49
    assert factors.max() < 1.51
    assert_uniform(factors.clip(0.5, 1.5), 0.5, 1.5)


def test_scale_crop_leaves_its_arguments_alone_and_follows_the_seed():
    batch = scene(5)
    before = [x.clone() for x in batch]

    def view(seed, crop, scale):
        return transforms.batch_scale_crop(
            batch[0], with_padding(*batch[1:]), crop, scale, rng(seed)
        )

    first, second, other = (view(seed, (64, 64), (0.5, 1.5)) for seed in (9, 9, 10))
    same = view(9, (60, 80), (1.0, 1.0))  # the right size already
    assert all(torch.equal(a, b) for a, b in zip(before, batch, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, same, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], other[1])


# ---------------------------------------------------------------------- colour, blur and flip
@pytest.mark.usefixtures("without_colour")
def test_the_whole_chain_stays_aligned():
    for seed, strategy in itertools.product(range(4), STRATEGIES):
        torch.manual_seed(seed)
        generator, (images, *maps) = rng(seed), scene(4, cell=15, seed=seed)
        common = (64, 64), (0.5, 1.5), generator
        images, *maps = mix(
            *transforms.batch_scale_crop(images, with_padding(*maps), *common), strategy
        )
        # where mixing joins two regions of one class, the image still shows their old borders
        assert_aligned(*transforms.augment(images, maps, generator), stray=0.02)


NAMES = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
UNCHANGED = [1, 1, 1, 0]


def test_the_draws_follow_the_paper():
    """2,000 images in batches of 4: how often each change is made, independently of the others; the
    amounts are uniform, and each image has its own; every order of the colours is as likely."""
    generator = rng(4)
    batches = [transforms.draw_augmentation(4, generator) for _ in range(500)]
    orders, *draws = zip(*batches, strict=True)
    amounts, sigma, flip = (np.concatenate(x, axis=-1) for x in draws)
    jitter, blur = (amounts.T != UNCHANGED).all(1), sigma > 0
    assert (amounts.T[~jitter] == UNCHANGED).all()  # all four or none
    for chosen, expected in (
        (jitter, 0.8),
        (blur, 0.5),
        (flip, 0.5),
        (jitter & blur, 0.4),
        (jitter & flip, 0.4),
        (blur & flip, 0.25),
    ):
        assert abs(chosen.mean() - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5
    amounts, sigma = amounts[:, jitter], sigma[blur]
    for name, values in zip(NAMES[:3], amounts, strict=False):
        assert_uniform(values, 0.75, 1.25, name)
    assert_uniform(amounts[3], -0.25, 0.25, "hue")
    assert_uniform(sigma, 0.15, 1.15, "sigma")
    assert np.abs(np.corrcoef(amounts) - np.eye(4)).max() < 0.1
    assert all(len(np.unique(values)) > 0.99 * len(values) for values in (*amounts, sigma))
    orders = [tuple(order) for order in orders]
    assert set(orders) == set(itertools.permutations(range(4)))
    assert max(map(orders.count, orders)) < 500 / 24 + 5 * (500 / 24) ** 0.5


def colourful(batch, height=24, width=32):
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    images[0, :, :4] = 0.5  # grey
    images[0, :, 4:6] = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    images[0, :, 6:8] = torch.tensor([1.0, 1.0, 0.0])[:, None, None]
    images[0, :, 8:9], images[0, :, 9:10] = 0, 1  # black, white
    return images


@pytest.mark.parametrize("change", range(4), ids=NAMES)
def test_each_colour_change_is_torchvisions(change):
    images = colourful(9)
    amounts = torch.linspace(-0.25, 0.25, 9) + (change < 3)  # the middle one changes nothing
    torchvisions = getattr(tv, NAMES[change])
    expected = [torchvisions(x, float(a)) for x, a in zip(images, amounts, strict=True)]
    changed = transforms.COLOUR_CHANGES[change](images.clone(), amounts.view(-1, 1, 1, 1))
    torch.testing.assert_close(changed, torch.stack(expected), atol=3e-6, rtol=0)
    torch.testing.assert_close(changed[4], images[4], atol=1e-6, rtol=0)


def test_the_blur_is_torchvisions():
    images, sigma = colourful(6), np.array([0, 0.15, 0.4, 0.7, 1, 1.15])
    blurred = transforms.blur(images, torch.from_numpy(transforms.gaussian_kernels(sigma)))
    assert torch.equal(blurred[0], images[0])
    for new, old, s in zip(blurred[1:], images[1:], sigma[1:], strict=True):
        torch.testing.assert_close(new, tv.gaussian_blur(old, 9, float(s)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augment_equals_torchvision_image_by_image(layout):
    images, *maps = colourful(8), *scene(8, 24, 32)[1:]
    images = images.contiguous(memory_format=layout)
    for seed in range(12):
        order, amounts, sigma, flip = transforms.draw_augmentation(8, rng(seed))
        new, *new_maps = transforms.augment(images, maps, rng(seed))
        for b, image in enumerate(images):
            if (amounts[:, b] != UNCHANGED).any():
                for change in order:
                    image = getattr(tv, NAMES[change])(image, float(amounts[change, b]))
            if sigma[b]:
                image = tv.gaussian_blur(image, 9, float(sigma[b]))
            expected = [image, *(x[b] for x in maps)]
            for x, wanted in zip((new, *new_maps), expected, strict=True):
                wanted = wanted.flip(-1) if flip[b] else wanted
                torch.testing.assert_close(x[b], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(24, 32), (5, 5)])  # the smallest that the blur can reflect
def test_augment_leaves_its_arguments_alone_and_follows_the_seed(size):
    images, *maps = colourful(8)[..., : size[0], : size[1]], *scene(8, *size, cell=2)[1:]
    before = [x.clone() for x in (images, *maps)]
    first, second, other = (transforms.augment(images, maps, rng(seed)) for seed in (9, 9, 10))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert second[0].min() >= 0
    assert second[0].max() <= 1 + 1e-6  # the blur's weights sum to 1 up to rounding
    for old, new in zip(before, first, strict=True):
        assert new.dtype == old.dtype
        assert new.shape == old.shape
        new.fill_(1)  # the results are new tensors
    assert all(torch.equal(a, b) for a, b in zip(before, (images, *maps), strict=True))


# ------------------------------------------------------------------------ no synchronisation
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

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, function
        if name in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), function
        return function(*args, **(kwargs or {}))


def chain(images, labels, confidence, strategy):
    """Everything that happens to a batch between the loader and the network."""
    generator = rng(2)
    images = transforms.to_float(images, labels.device)
    maps = with_padding(labels, confidence, sparse=True)
    view = transforms.batch_scale_crop(images, maps, (64, 64), (0.5, 1.5), generator)
    fill = torch.full((3, 1, 1), 0.5, device=labels.device)
    images, *maps = mix(*view, strategy, fill=fill)
    images, labels, confidence = transforms.augment(images, maps, generator)
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


def test_augment_dispatches_few_operations():
    """A GPU takes longer to start most of them than to run them: no loop over the images."""
    images, labels, _ = scene(10)
    with NoWaiting() as mode:
        transforms.augment(images, [labels, labels], rng())
    assert mode.operations < 120


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
