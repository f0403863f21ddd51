"""Which images, and which of their pixels, are labelled: the labelled split, published lists of
images, checks of a user's own labels, partial labels."""

import argparse
import hashlib
import json
import os
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from inputs import files
from inputs.errors import UserError, need, note
from inputs.files import IGNORE
from inputs.source import SPARSE, Sample, Source, name_of
from inputs.transforms import resize_nearest

RATIOS = {"p0": 0, "p1": 1, "p5": 5, "p25": 25}  # partial labels: per cent of a class's pixels
READ_AT_ONCE = 32  # labels
FLAT = 16  # of 255: an image with less contrast shows next to nothing


# ------------------------------------------------------------------------- what the labels hold
def label_index(source: Source, samples: list[Sample], quiet: bool = True) -> Iterator[dict]:
    """Yield for each sample {"classes": ids in its label, "share": labelled share of its pixels,
    "flat": whether its image has next to no contrast (only for a user's own data)}.

    Labels are read lazily, checked, and cached by path and `files.stamp`: a changed file is read
    again.
    """
    path = index_path(source)
    known = read_index(path, len(source.classes))
    before = dict(known)

    def entry_of(sample: Sample) -> dict:
        if sample.drawn:
            return inspect_label(source, sample)
        name, stamp = sample.label or sample.image, files.stamp(sample.image, sample.label)
        if name not in known or known[name].get("stamp") != stamp:
            known[name] = {"stamp": stamp, **inspect_label(source, sample)}
        return known[name]

    try:
        hidden = quiet or None  # None: shown only on a terminal
        bar = tqdm(samples, "reading labels", unit="file", leave=False, delay=1, disable=hidden)
        with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(samples), READ_AT_ONCE):
                for entry in pool.map(entry_of, samples[start : start + READ_AT_ONCE]):
                    bar.update()
                    yield entry
    finally:
        if known != before:
            files.write_cache(path, lambda file: file.write(json.dumps(known).encode()))


def index_path(source: Source) -> Path:
    """The cache file of `label_index`, the same for all seeds."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = source.cache_dir or Path(user_cache) / "reco-segmentation"
    content = [
        source.name,
        source.classes,
        source.colours,
        source.size,
        source.max_size,
        os.path.abspath(source.train[0].image),
    ]
    return folder / f"labels-{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}.json"


def read_index(path: Path, num_classes: int) -> dict[str, dict]:
    """The valid entries of the cache file; none if it is missing or damaged."""
    ids = set(range(num_classes))
    try:
        return {
            name: entry
            for name, entry in files.read_json(path).items()
            if set(entry["classes"]) <= ids and 0 <= entry["share"] <= 1
        }
    except (UserError, TypeError, KeyError, AttributeError):
        return {}


def inspect_label(source: Source, sample: Sample) -> dict:
    """The entry of `label_index`. Every file of a user's own is checked before training: the image
    is decoded too (a JPEG at 1/8), and the label is counted at full size."""
    stored, flat = None, False
    if source.own_files:
        image, stored = files.open_image(sample.image, lambda height, width: (1, 1))
        height, width = source.training_size(*stored)
        need(
            min(height, width) > 1,
            f"{sample.image}: is {stored[1]}x{stored[0]}, in training {width}x{height}; a side "
            "of one pixel is not enough",
        )
        rgb = files.to_rgb(image, sample.image)
        flat = int(rgb.max()) - int(rgb.min()) < FLAT
    if not sample.label:
        return {"classes": [], "share": 0.0, "flat": flat}
    if sample.drawn:
        label = source.read(sample)[1].numpy()
    else:
        label = source.read_label(sample, stored)
        if not source.own_files:
            size = source.training_size(*label.shape)
            label = resize_nearest(torch.from_numpy(label), size).numpy()
    count = np.bincount(label.ravel(), minlength=256)
    return {
        "classes": np.flatnonzero(count[:IGNORE]).tolist(),
        "share": 1 - int(count[IGNORE]) / label.size,
        "flat": flat,
    }


def shown_classes(source: Source, samples: list[Sample]) -> np.ndarray:
    """Whether each label holds each class, bool [N, C]."""
    shown = np.zeros((len(samples), len(source.classes)), bool)
    for row, entry in zip(shown, label_index(source, samples), strict=True):
        row[entry["classes"]] = True
    return shown


# --------------------------------------------------------------------------- labelled images
def labelled_split(source: Source, number: int, seed: int, quiet: bool = True) -> list[Sample]:
    """`number` training images that together show every class (paper, section 4.1), chosen by
    `choose_images` from a seeded shuffle of the sorted names.

    Deterministic in (data, number, seed). Reads only the labels that the walk reaches.
    """
    candidates = sorted((s for s in source.train if s.label), key=lambda sample: sample.name)
    need(
        number <= len(candidates),
        f"--num-labeled {number}: the data set has only {len(candidates)} labelled training images",
    )
    order = np.random.default_rng([seed, 1]).permutation(len(candidates))
    candidates = [candidates[i] for i in order]
    seen: list[set[int]] = []  # classes of the candidates read so far
    with closing(label_index(source, candidates, quiet)) as index:

        def classes_of(i: int) -> set[int]:
            while len(seen) <= i:
                seen.append(set(next(index)["classes"]))
            return seen[i]

        chosen = choose_images(
            classes_of, len(candidates), number, len(source.classes), source.min_classes
        )
    return [candidates[i] for i in chosen]


def choose_images(
    classes_of: Callable[[int], set[int]],
    candidates: int,
    number: int,
    num_classes: int,
    min_classes: int,
) -> list[int]:
    """`number` of the images 0, 1, ... `candidates` - 1 so that every class is seen.

    The walk takes an image if it holds a class that is least often taken so far and at least
    `min_classes` classes; when the walk ends, skipped images are tried again. If a walk takes none,
    the rules are relaxed one by one: take the first image with a class not seen so far, even if it
    has few classes; drop the classes that no remaining image has; accept images with few classes.
    """
    taken, remaining = [], list(range(candidates))
    times = np.zeros(num_classes, int)  # how often each class is taken
    waited_for = set(range(num_classes))

    def rarest() -> set[int]:
        fewest = min(times[c] for c in waited_for)
        return {c for c in waited_for if times[c] == fewest}

    def take(i: int) -> None:
        taken.append(i)
        remaining.remove(i)
        times[list(classes_of(i))] += 1

    while len(taken) < number:
        before = len(taken)
        for i in list(remaining):
            if len(classes_of(i)) >= min_classes and rarest() & classes_of(i):
                take(i)
            if len(taken) == number:
                return taken
        if len(taken) > before:
            continue
        rare = rarest()
        never_taken = all(times[c] == 0 for c in rare)
        showing = [i for i in remaining if rare & classes_of(i)]
        if never_taken and showing:
            take(showing[0])
        elif waited_for - rare:
            waited_for -= rare
        elif min_classes > 1:
            waited_for, min_classes = set(range(num_classes)), 1
        else:
            taken += remaining[: number - len(taken)]
    return taken


def published_split(source: Source, path: str | Path) -> list[Sample]:
    """The images that a split file lists, one per line, in its order: a name or a path, with or
    without the label's path after it."""
    need(Path(path).is_file(), f"--labeled-list {path}: no such file")
    by_name = {name_of(Path(s.image)) + Path(s.image).suffix: s for s in source.train}
    by_name |= {s.name: s for s in source.train}
    chosen = []
    text = unicodedata.normalize("NFC", files.read_text(path))
    for number, line in enumerate(text.split("\n"), 1):
        if not (line := line.strip()):
            continue
        first = Path(line.split()[0])  # a label's path may follow, or the name has spaces
        stem = first.stem.removesuffix("_leftImg8bit")
        names = (line, Path(line).name, first.name, first.stem, stem)
        sample = next((by_name[name] for name in names if name in by_name), None)
        need(sample, f"{path}, line {number}: {first} is not a training image of this data set")
        need(sample.label, f"{path}, line {number}: {sample.image} has no label")
        chosen.append(sample)
    need(chosen, f"--labeled-list {path}: names no image")
    return list(dict.fromkeys(chosen))


def check_folder(source: Source, quiet: bool = True) -> set[Sample]:
    """Check every file of a user's own data; the results are cached. Returns the training images
    with a sparse label, which covers less than half of the pixels. Raises UserError for a file that
    cannot be used."""
    samples = source.train + source.val
    entries = dict(zip(samples, label_index(source, samples, quiet), strict=True))
    labelled = {sample: entry for sample, entry in entries.items() if sample.label}
    for part in (source.train, source.val):
        check_classes({s: labelled[s] for s in part if s.label})
    if not quiet:
        present = set().union(*(entry["classes"] for entry in labelled.values()))
        absent = [name for c, name in enumerate(source.classes) if c not in present]
        if absent:
            more = " ..." if len(absent) > 5 else ""
            note(f"no label holds {', '.join(absent[:5])}{more}, which classes.txt names")
        for sample, entry in labelled.items():
            if entry["classes"] == [0] and SPARSE <= entry["share"] < 1:
                note(f"{sample.label}: holds only 0 and 255, as a 0/255 mask; 255: not labelled")
                break
        flat = [sample.image for sample, entry in entries.items() if entry.get("flat")]
        if flat:
            note(f"{len(flat)} images have next to no contrast ({flat[0]} ...); check them")
    return {s for s in source.train if s.label and entries[s]["share"] < SPARSE}


def check_classes(labelled: dict[Sample, dict]) -> None:
    """Raise UserError if the training or the validation labels hold only 255, or only 0 and 255."""
    present = set().union(*(entry["classes"] for entry in labelled.values()))
    void = next((sample for sample, entry in labelled.items() if entry["share"] < 1), None)
    if void and present <= {0}:
        holds = "only 0 and 255, as a 0/255 mask; use 0/1:" if present else "only 255:"
        raise UserError(
            f"{void.label}: like all other labels of its folder it holds {holds} 255 means not "
            "labelled"
        )


class Split(NamedTuple):
    """The labelled and the unlabelled training images; partial: the labels are sparse."""

    labelled: list[Sample]
    unlabelled: list[Sample]
    partial: bool


def split_train(source: Source, args: argparse.Namespace, quiet: bool = True) -> Split:
    """Split the training images by the options num_labeled, label_ratio, labeled_list and seed.

    Labels are partial with --label-ratio, or if a quarter or more of a user's own are sparse. Then
    every labelled image is also in the unlabelled list, with its label. Among full labels, this
    applies to the images with a sparse label only. The other unlabelled images have no label. If
    none remains unlabelled, the list has all images.
    """
    sparse = check_folder(source, quiet) if source.own_files else set()
    if args.labeled_list:
        labelled = published_split(source, args.labeled_list)
    elif args.num_labeled:
        labelled = labelled_split(source, args.num_labeled, args.seed, quiet)
    else:
        labelled = [sample for sample in source.train if sample.label]
    chosen, masks = set(labelled), sum(bool(sample.label) for sample in source.train)
    partial = bool(args.label_ratio) or len(sparse) >= max(1, masks / 4)
    kept = chosen if partial else chosen & sparse  # in both lists, with their label
    none_left = len(chosen) == len(source.train)
    others = [s for s in source.train if none_left or s in kept or s not in chosen]
    return Split(labelled, [s if s in kept else replace(s, label=None) for s in others], partial)


def fingerprint(source: Source, split: Split) -> dict[str, str]:
    """The data fingerprint, checked on resume: hashes of the names and file sizes of the labelled,
    unlabelled and validation images and of the content of the labels, and the class colours."""

    def of(samples: list[Sample]) -> str:
        entries = [
            (s.name, *(os.path.getsize(f) for f in (s.image, s.label) if f and not s.drawn))
            for s in samples
        ]
        return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]

    masks = {s.label for s in (*split.labelled, *source.val) if not s.drawn}
    content = hashlib.sha256()
    for mask in sorted(masks):
        content.update(files.read_bytes(mask))
    return {
        "labelled images": of(split.labelled),
        "unlabelled images": of(split.unlabelled),
        "validation images": of(source.val),
        "labels": content.hexdigest()[:16],
        "colours of the classes": repr(source.colours),
    }


# ------------------------------------------------------------------------------ partial labels
def partial_label(label: np.ndarray, ratio: str, seed: int, name: str) -> np.ndarray:
    """The label (uint8 [H, W]) with all but a few pixels of each class set to 255; section 4.2.

    p0 keeps one uniformly drawn pixel per class. pX starts from that pixel and grows a square by
    5x5 dilations until at least int(X % of the class's pixels) are covered. k dilations cover the
    pixels of the class within Chebyshev distance 2k, so one bincount over (class, k) gives the k at
    which each class stops. Deterministic in its arguments.
    """
    counts, rows, columns = draw_pixels(label, seed, name)
    classes = np.flatnonzero(counts)
    if ratio == "p0":
        kept = np.full_like(label, IGNORE)
        kept[rows[classes], columns[classes]] = classes
        return kept
    height, width = label.shape
    down, across = np.arange(height, dtype=np.int16)[:, None], np.arange(width, dtype=np.int16)
    distance = np.maximum(np.abs(down - rows.take(label)), np.abs(across - columns.take(label)))
    level = (distance + np.int16(1)) >> np.int16(1)  # the dilation that reaches the pixel
    levels = int(level.max()) + 1
    key = label.astype(np.intp) * levels + level
    reached = np.bincount(key.ravel(), minlength=256 * levels).reshape(256, levels).cumsum(axis=1)
    wanted = np.maximum(counts * RATIOS[ratio] // 100, 1)  # the drawn pixel itself at least
    last = (reached >= wanted[:, None]).argmax(axis=1)
    keep = (np.arange(levels) <= last[:, None]) & (counts > 0)[:, None]  # [class, level]
    return np.where(keep, np.arange(256)[:, None], IGNORE).astype(np.uint8).take(key)


def draw_pixels(
    label: np.ndarray, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of pixels of each class, and row and column of one drawn pixel; each [256]."""
    height = len(label)
    row_keys = label + 256 * np.arange(height)[:, None]
    up_to_row = np.bincount(row_keys.ravel(), minlength=256 * height)
    up_to_row = up_to_row.reshape(height, 256).cumsum(axis=0)  # pixels of a class down to a row
    counts = up_to_row[-1] * (np.arange(256) != IGNORE)
    # one draw per class id, so that the draw of a class does not depend on the others
    draws = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(256)
    rows, columns = np.zeros(256, np.int16), np.zeros(256, np.int16)
    for c in np.flatnonzero(counts):
        index = int(draws[c] * counts[c])  # of the drawn pixel, counted row by row
        row = np.searchsorted(up_to_row[:, c], index, side="right")
        before = up_to_row[row - 1, c] if row else 0
        rows[c], columns[c] = row, np.flatnonzero(label[row] == c)[index - before]
    return counts, rows, columns
