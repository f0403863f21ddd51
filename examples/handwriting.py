"""Real handwriting as the folder that --dataset folder reads, to try it before your own images.

    $ python examples/handwriting.py dataset/handwriting
    $ accelerate launch train_semi.py --reco --dataset folder --data-path dataset/handwriting \\
          --num-labeled 60 --recipe street --channels 64 --crop-size 64 --scale 0.8 1.25 \\
          --batch-size 8 --lr 0.2 --iterations 2000 --val-interval 500 --warmup-iterations 600

Each image shows two to five of the 1,797 handwritten digits (8x8 pixels) of scikit-learn, enlarged,
slanted and inked onto paper, wood or something blotchy; its label says which pixels are a zero, a
one, ... or none. The training, validation and test images share no digit. Copy the layout for your
own data:

    DIR/images/{train,val,test}/NNNN.png    the images, RGB (test: for evaluate.py --split test;
                                            optional)
    DIR/labels/{train,val,test}/NNNN.png    palette PNGs of that size: 0 background, 1 ... 10 the
                                            digits (255: not labelled)
    DIR/classes.txt                         one class name a line, in the order of the indices
"""

import argparse
import math
import shlex
from pathlib import Path

import numpy as np
from own_folder import add_image, launch, write_classes
from PIL import Image

from inputs.errors import UserError, need

CLASSES = {  # name: colour
    "background": (38, 40, 48),
    "zero": (231, 76, 60),
    "one": (243, 156, 18),
    "two": (241, 216, 76),
    "three": (139, 195, 74),
    "four": (38, 166, 122),
    "five": (72, 201, 224),
    "six": (66, 133, 244),
    "seven": (126, 87, 214),
    "eight": (224, 92, 186),
    "nine": (188, 152, 126),
}
GROUNDS = [  # paper, card, wood, slate, blackboard
    (236, 228, 208),
    (222, 224, 226),
    (196, 170, 128),
    (150, 110, 74),
    (118, 134, 120),
    (168, 182, 196),
    (72, 78, 84),
    (56, 74, 66),
    (204, 148, 132),
    (94, 66, 48),
]
INKS = [  # pens, chalks
    (28, 30, 40),
    (36, 52, 120),
    (130, 30, 34),
    (24, 84, 60),
    (80, 50, 30),
    (240, 238, 230),
    (246, 214, 110),
    (150, 206, 220),
    (250, 170, 150),
]


def split_digits(targets: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """Indices of the training, validation and test digits: 3/4, 1/8 and 1/8 of every class."""
    rng, parts = np.random.default_rng(seed), ([], [], [])
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(targets == digit))
        cuts = [len(order) * 6 // 8, len(order) * 7 // 8]
        for part, mine in zip(parts, np.split(order, cuts), strict=True):
            part.extend(mine)
    return tuple(np.array(part) for part in parts)


def smooth_noise(rng: np.random.Generator, size: int, rows: int, columns: int) -> np.ndarray:
    """Noise of about rows x columns blobs: float [size, size] in [-1, 1]."""
    grid = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def draw_ground(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Paper, a board or a stained wall, lit from one side: float [size, size, 3], 0..255, and its
    base colour [3]."""
    base = np.array(GROUNDS[rng.integers(len(GROUNDS))]) + rng.uniform(-12, 12, 3)
    kind = rng.integers(3)
    if kind == 0:  # paper: fine fibres
        texture = 6 * smooth_noise(rng, size, size // 2, size // 2)
        texture = texture + 6 * smooth_noise(rng, size, 5, 5)
    elif kind == 1:  # wood: rings, drawn out along the grain
        texture = 16 * np.sin(9 * smooth_noise(rng, size, 7, 2))
        texture = texture + 7 * smooth_noise(rng, size, size // 2, 4)
        texture = texture.T if rng.random() < 0.5 else texture
    else:  # blotches
        texture = 26 * smooth_noise(rng, size, 6, 6) + 12 * smooth_noise(rng, size, 14, 14)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0, 0.22) * (x * math.cos(angle) + y * math.sin(angle))
    return (base + texture[..., None] * rng.uniform(0.7, 1.1, 3)) * light[..., None], base


def draw_digit(rng: np.random.Generator, digit: np.ndarray, height: float) -> np.ndarray:
    """One 8x8 digit (values 0..16) about `height` pixels high, turned, slanted: float [n, n]."""
    n, turn, slant = math.ceil(1.5 * height), rng.uniform(-0.15, 0.15), rng.uniform(-0.12, 0.12)
    stretch = rng.uniform(0.9, 1.1)
    cos, sin, unit = math.cos(turn), math.sin(turn), 8 / height
    # image coordinates (u, v) -> digit coordinates; the digit is in the middle of 12x12
    a, b = unit * stretch * (cos + slant * sin), unit * stretch * (slant * cos - sin)
    d, e, middle = unit * sin, unit * cos, n / 2
    matrix = (a, b, 6 - (a + b) * middle, d, e, 6 - (d + e) * middle)
    source = Image.fromarray(np.pad(digit, 2).astype(np.float32))
    drawn = source.transform((n, n), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(drawn)


def draw_image(
    rng: np.random.Generator,
    digits: np.ndarray,
    targets: np.ndarray,
    indices: np.ndarray,
    size: int = 64,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Two to five of the digits `indices` (into digits [N, 8, 8] and targets [N]) on a ground:
    image uint8 [size, size, 3], label uint8 [size, size] (0 background, 1 + digit), the indices
    used."""
    image, base = draw_ground(rng, size)
    label, used = np.zeros((size, size), np.uint8), []
    inks = [ink for ink in INKS if abs(np.mean(ink) - base.mean()) > 70]  # readable on this ground
    for index in rng.choice(indices, rng.integers(2, 6), replace=False):
        stroke = draw_digit(rng, digits[index], rng.uniform(0.3, 0.42) * size)
        ink, mask = np.array(inks[rng.integers(len(inks))]) + rng.uniform(-10, 10, 3), stroke > 5
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        stroke, mask = (m[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1] for m in (stroke, mask))
        h, w = mask.shape
        places = [(rng.integers(0, size - h + 1), rng.integers(0, size - w + 1)) for _ in range(30)]
        # digits may touch, never cover each other
        places = [(y, x) for y, x in places if not (label[y : y + h, x : x + w] * mask).any()]
        if not places:
            continue
        y, x = places[0]
        window = image[y : y + h, x : x + w]
        opacity = np.clip((stroke - 4) / 5, 0, 1)[..., None] * rng.uniform(0.85, 1)
        window += (ink - window) * opacity
        label[y : y + h, x : x + w][mask] = targets[index] + 1
        used.append(int(index))
    image += rng.normal(0, rng.uniform(2, 6), image.shape)
    return image.clip(0, 255).astype(np.uint8), label, used


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dir", metavar="DIR", type=Path, help="where to write; must not exist, or be empty")
    add("--train", type=int, default=600, help="training images")
    add("--val", type=int, default=150, help="validation images")
    add("--test", type=int, default=300, help="test images")
    add("--size", type=int, default=64, help="width and height in pixels, 32 or more")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for option, least in (("train", 1), ("val", 1), ("test", 1), ("size", 32), ("seed", 0)):
        value = getattr(args, option)
        need(value >= least, f"--{option} {value}: {least} or more")
    return args


def main() -> None:
    args = parse_options()
    empty = not args.dir.exists() or (args.dir.is_dir() and not any(args.dir.iterdir()))
    need(empty, f"{args.dir} exists and is not an empty folder")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits are part of scikit-learn: pip install scikit-learn") from None

    data = load_digits()
    write_classes(args.dir, [*CLASSES])
    parts = split_digits(data.target, args.seed)
    counts = {"train": args.train, "val": args.val, "test": args.test}
    for number, (split, count) in enumerate(counts.items()):
        for i in range(count):
            rng = np.random.default_rng([args.seed, number, i])
            drawn = draw_image(rng, data.images, data.target, parts[number], args.size)
            image, label = Image.fromarray(drawn[0]), drawn[1]
            add_image(args.dir, split, f"{i:04d}.png", image, label, [*CLASSES.values()])
    print(
        f"{args.dir}: {args.train} training, {args.val} validation and {args.test} test images, "
        f"{args.size}x{args.size}, with labels"
    )
    print(
        "try: accelerate launch train_semi.py --reco --dataset folder "
        f"--data-path {shlex.quote(str(args.dir))} --num-labeled 60 --recipe street "
        "--channels 64 --crop-size 64 --scale 0.8 1.25 --batch-size 8 --lr 0.2 --iterations 2000 "
        "--val-interval 500 --warmup-iterations 600"
    )


if __name__ == "__main__":
    launch(main)
