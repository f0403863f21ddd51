"""CutOut, CutMix, ClassMix: what is kept and where the rest comes from; one mask for everything."""

import itertools
from collections import Counter

import pytest
import torch

from inputs.files import IGNORE
from mixing import STRATEGIES, class_mask, mix, rectangle_mask


def batch(size=4, height=24, width=36, classes=6, ignored=0.1):
    """Images whose three channels are the image, row and column that each pixel came from.

    Label and confidence are functions of them."""
    torch.manual_seed(0)
    ranges = [torch.arange(n) for n in (size, height, width)]
    b, y, x = torch.meshgrid(*ranges, indexing="ij")
    label = (b + y // 6 + x // 6 * 2) % classes
    label = torch.where(torch.rand(label.shape) < ignored, IGNORE, label)
    confidence = (b * height * width + y * width + x).float() / (size * height * width)
    return torch.stack([b, y, x], dim=1).float(), label, confidence


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_everything_follows_one_mask(strategy, size, device):
    images, label, confidence = batch(size)
    known = torch.where(torch.rand(label.shape) < 0.8, IGNORE, label.flip(0))  # another label map
    given = [x.to(device) for x in (images, label, confidence, known)]
    before = [t.clone() for t in given]
    mixed = mix(*given[:3], strategy, -1.0, given[3], given[3].byte())
    assert all(map(torch.equal, before, given))  # the arguments do not change
    new_images, new_label, new_confidence, *others = (x.cpu() for x in mixed)
    removed = new_images[:, 0] == -1
    origin = new_images[:, 0].long().clamp_min(0)
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(36), indexing="ij")
    own = torch.arange(size)[:, None, None]
    assert ((origin == own) | (origin == (own + 1) % size) | removed).all()
    position = torch.stack([rows, columns]).float().expand(size, 2, 24, 36)
    unmoved = torch.where(removed[:, None], -1.0, position)
    assert torch.equal(new_images[:, 1:], unmoved)
    assert torch.equal(new_label, torch.where(removed, IGNORE, label[origin, rows, columns]))
    assert torch.equal(new_confidence, torch.where(removed, 0.0, confidence[origin, rows, columns]))
    expected = torch.where(removed, IGNORE, known[origin, rows, columns])
    assert torch.equal(others[0], expected) and torch.equal(others[1], expected.byte())
    assert removed.any() == (strategy == "cutout")
    assert (origin != own).any() == (
        size > 1 and strategy in ("cutmix", "classmix")
    ) or removed.any()


def test_cutout_fills_and_forgets_half():
    images, label, confidence = batch(3)
    fill = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    new_images, new_label, new_confidence = mix(images, label, confidence + 1, "cutout", fill)
    gone = new_confidence == 0
    assert (new_label[gone] == IGNORE).all()
    filled = fill.flatten().expand(int(gone.sum()), 3)
    assert torch.equal(new_images.permute(0, 2, 3, 1)[gone], filled)
    assert torch.equal(new_label[~gone], label[~gone])
    assert ((gone.sum(dim=(1, 2)) - 24 * 36 / 2).abs() <= 36 / 2).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_labels_as_files_hold_them(strategy):
    images, label, confidence = batch(3)
    torch.manual_seed(5)
    wide = mix(images, label, confidence, strategy)
    torch.manual_seed(5)
    narrow = mix(images.to(torch.uint8), label.to(torch.uint8), confidence, strategy)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(wide, narrow, strict=True))


SIZES = [(64, 64), (321, 321), (33, 47), (2, 2), (3, 100), (100, 3), (1, 5)]


@pytest.mark.parametrize("height, width", SIZES)
def test_rectangle_is_half_the_area(height, width):
    torch.manual_seed(1)
    masks = rectangle_mask(400, height, width)
    if min(height, width) < 2:
        assert not masks.any()
        return
    area = masks.sum(dim=(1, 2)).float()
    w = masks.any(dim=1).sum(dim=1).float()
    h = masks.any(dim=2).sum(dim=1).float()
    assert torch.equal(area, h * w)  # one solid rectangle
    # half the area, but for the height, which is rounded to whole pixels
    assert ((area - height * width / 2).abs() <= w / 2).all()
    assert (w > width / 2).all() and (w <= width).all() and (h >= 1).all()
    if width > 10:
        assert len(w.unique()) > min(100, width / 4)  # of many shapes
        edges = masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]
        assert all(edge.any() for edge in edges)  # and places


def test_rectangles_differ_within_a_batch():
    assert len({m.numpy().tobytes() for m in rectangle_mask(20, 64, 64)}) > 10


def test_classmix_keeps_exactly_half_of_the_classes_rounded_down():
    torch.manual_seed(2)
    label = torch.randint(0, 19, (40, 16, 16))
    for i in range(40):
        label[i] = label[i] % (1 + i % 19)  # 1 to 19 classes
    label[:, :2] = IGNORE
    keep = class_mask(label)
    for one, kept in zip(label, keep, strict=True):
        classes = set(one.unique().tolist()) - {IGNORE}
        chosen = set(one[kept].unique().tolist())
        assert len(chosen) == len(classes) // 2 and chosen <= classes
        pixels = torch.isin(one, torch.tensor(sorted(chosen), dtype=torch.long))
        assert torch.equal(kept, pixels)  # all of their pixels


def test_classmix_chooses_at_random():
    torch.manual_seed(3)
    label = torch.tensor([3, 7, 11, 18, IGNORE]).expand(3000, 1, 5)
    seen = Counter(tuple(label[0][kept].tolist()) for kept in class_mask(label))
    assert set(seen) == set(itertools.combinations((3, 7, 11, 18), 2))
    assert all(abs(count - 500) < 5 * (3000 * 1 / 6 * 5 / 6) ** 0.5 for count in seen.values())


@pytest.mark.parametrize("value", [4, IGNORE])
def test_classmix_takes_the_next_image_if_there_are_fewer_than_two_classes(value):
    images, label, confidence = batch(2)
    label[0] = value
    new_images, new_label, _ = mix(images, label, confidence, "classmix")
    assert torch.equal(new_images[0], images[1]) and torch.equal(new_label[0], label[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ignored_batch_stays_ignored(strategy):
    images, label, confidence = batch(3)
    assert (mix(images, torch.full_like(label, IGNORE), confidence, strategy)[1] == IGNORE).all()


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="classmix"):
        mix(*batch(), "mixup")


def test_draws_follow_the_seed():
    images, label, confidence = batch()
    for strategy in STRATEGIES:
        torch.manual_seed(5)
        first = mix(images, label, confidence, strategy)
        torch.manual_seed(5)
        again = mix(images, label, confidence, strategy)
        assert all(map(torch.equal, first, again))
