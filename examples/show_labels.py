"""Draw labelled images of a --dataset folder folder and their labels, a row for each class, with
the share of the labelled pixels and the number of images of each class.

    $ python examples/show_labels.py dataset/tiles labels.png
    $ python examples/show_labels.py dataset/tiles cracks.png --classes crack --images 5
    $ python predict.py RUN dataset/tiles/images/test --out-dir predictions
    $ python examples/show_labels.py dataset/tiles masks.png --split test --predictions predictions

White is not labelled.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.patches import Patch
from own_folder import launch
from torch import Tensor
from tqdm import tqdm

from data import load_source
from engine.options import new_parser, positive
from engine.pictures import draw_grid, paint, spread_indices
from inputs.errors import need
from inputs.files import need_no_input, output_file, read_image, write
from inputs.source import Sample, Source


def parse_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("folder", help="the folder: classes.txt, images/, labels/")
    add("picture", metavar="PICTURE", type=Path, help="output: *.png")
    add("--split", choices=["train", "val", "test"], default="train", help="which images")
    add("--classes", nargs="+", metavar="NAME", help="draw the rows of these classes only")
    add("--images", type=positive, default=2, metavar="N", help="images in a row")
    add("--dpi", type=positive, default=150, metavar="N", help="dots per inch of the picture")
    add("--predictions", type=Path, metavar="DIR", help="add overlays that predict.py wrote")
    add("--overwrite", action="store_true", help="replace PICTURE")
    return parser.parse_args()


def count_pixels(source: Source, samples: list[Sample]) -> Tensor:
    """The pixels of each class in each label, [images, classes]."""
    counts = []
    for sample in tqdm(samples, unit="label", disable=None):
        label = torch.from_numpy(source.read_label(sample)).flatten()
        counts.append(torch.bincount(label, minlength=256)[: len(source.classes)])
    return torch.stack(counts)


def panels(source: Source, sample: Sample, predictions: Path | None) -> list[Tensor]:
    """An image, its label over it, and its prediction over it, as predict.py draws it."""
    image, label = source.read(sample)
    overlays = [image // 2 + paint(label, source.palette) // 2]
    if predictions:
        overlays.append(read_image(predictions / f"{sample.name}_overlay.png"))
    return [image, *overlays]


def main() -> None:
    args = parse_options()
    need(args.picture.suffix == ".png", f"{args.picture}: the name must end with .png")
    output_file("PICTURE", args.picture, args.overwrite)
    source = load_source("folder", args.folder, max_size=1024)
    samples = [sample for sample in getattr(source, args.split) if sample.label]
    need(samples, f"{args.folder}: holds no labelled image of the split {args.split}")
    need_no_input([args.picture], [file for s in samples for file in (s.image, s.label)])

    counts = count_pixels(source, samples)
    shares = (counts.sum(0) / counts.sum().clamp(min=1)).tolist()
    numbers = (counts > 0).sum(0).tolist()
    lines = [
        f"{name}: {100 * share:.3g} % of the labelled pixels, in {number} of {len(samples)} images"
        for name, share, number in zip(source.classes, shares, numbers, strict=True)
    ]
    print(*lines, sep="\n")

    blank = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    titles = ["image", "label", *(["prediction"] if args.predictions else [])] * args.images
    chosen, rows = args.classes or source.classes, []
    for c, name in enumerate(source.classes):
        holders = counts[:, c].nonzero()[:, 0].tolist()
        if holders and name in chosen:
            picked = [samples[holders[i]] for i in spread_indices(len(holders), args.images)]
            row = [panel for s in picked for panel in panels(source, s, args.predictions)]
            rows.append(row + [blank] * (len(titles) - len(row)))
    need(rows, f"{args.folder}: no label of the split {args.split} holds {', '.join(chosen)}")
    figure = draw_grid(rows, titles)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * len(lines))
    colours = [[value / 255 for value in colour] for colour in source.palette]
    patches = [Patch(color=rgb, label=line) for rgb, line in zip(colours, lines, strict=True)]
    legend = figure.legend(handles=patches, loc="outside lower left", fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name does not start a formula
    write(args.picture, lambda file: figure.savefig(file, dpi=args.dpi))
    print(f"written to {args.picture}")


if __name__ == "__main__":
    launch(main)
