"""Magnetic tiles with defects as the folder that --dataset folder reads.

    $ git clone https://github.com/abin24/Magnetic-tile-defect-datasets. tiles_clone
    $ python examples/magnetic_tiles.py tiles_clone dataset/tiles
    $ python train_semi.py --reco --dataset folder --data-path dataset/tiles --recipe camvid \\
          --num-labeled 30

Grey images of 200 to 600 pixels, 51 MB (the dot at the end belongs to the name of the
repository). Six classes: no defect, blowhole, break, crack, fray, uneven. Of the images without a
defect the first 200 are taken, in the order of the MD5 of their file names. In that order, of six
images of a kind three are for training, one for validation, two for testing: 301, 97 and 194.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from own_folder import add_image, launch, write_classes
from PIL import Image
from tqdm import tqdm

from inputs.errors import need
from inputs.files import open_image

KINDS = ("free", "blowhole", "break", "crack", "fray", "uneven")  # in order of the class numbers
PARTS = ("train", "train", "train", "val", "test", "test")
FREE_IMAGES = 200


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path, help="the clone of the repository")
    parser.add_argument("out", type=Path, help="the folder to write")
    return parser.parse_args()


def list_images(clone: Path, kind: str) -> list[Path]:
    """The images of a kind of defect, in the order of the MD5 of their names."""
    folder = clone / f"MT_{kind.capitalize()}" / "Imgs"
    files = sorted(folder.glob("*.jpg"), key=lambda f: hashlib.md5(f.name.encode()).hexdigest())
    need(files, f"{folder}: holds no .jpg; is {clone} the clone of the repository?")
    return files[:FREE_IMAGES] if kind == "free" else files


def read_pair(file: Path, number: int) -> tuple[Image.Image, np.ndarray]:
    """A grey image and its label uint8 [H, W]: the class `number` where the mask beside it is
    above 127, else 0."""
    image, size = open_image(file)
    mask, mask_size = open_image(file.with_suffix(".png"))
    need(size == mask_size, f"{file}: its mask has another size")
    defect = np.asarray(mask.convert("L")) > 127
    return image.convert("L"), defect.astype(np.uint8) * np.uint8(number)


def main() -> None:
    args = parse_options()
    files = {kind: list_images(args.clone, kind) for kind in KINDS}
    write_classes(args.out, ["background", *KINDS[1:]])
    counts = dict.fromkeys(("train", "val", "test"), 0)
    for number, kind in enumerate(KINDS):
        for i, file in enumerate(tqdm(files[kind], desc=kind, unit="image", disable=None)):
            image, label = read_pair(file, number)
            part = PARTS[i % len(PARTS)]
            add_image(args.out, part, f"{kind}_{i:03d}.png", image, label)
            counts[part] += 1
    print(f"{args.out}: {', '.join(f'{n} {part}' for part, n in counts.items())} images")


if __name__ == "__main__":
    launch(main)
