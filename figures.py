"""The figures of experiments.py: curves with the range of the seeds, and rows of pictures."""

import statistics
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot

matplotlib.use("agg")  # no display is needed


def draw_band(axis, values: dict[int, list[float]], label: str, colour: str) -> None:
    """A line through the means and a band over the ranges; `values` has a list for each x."""
    x, means = list(values), [statistics.mean(v) for v in values.values()]
    axis.plot(x, means, color=colour, label=label, marker=".")
    low, high = [min(v) for v in values.values()], [max(v) for v in values.values()]
    axis.fill_between(x, low, high, color=colour, alpha=0.15)


def draw_panels(panels: dict[str, dict[str, dict]], xlabel: str, ylabel: str, file: Path) -> None:
    """One panel for each title in `panels`, in it one band for each label: {x: values}."""
    labels = list(dict.fromkeys(label for bands in panels.values() for label in bands))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.4 * columns, 3.6 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, bands) in zip(axes.flat, panels.items(), strict=False):
        for label, values in bands.items():
            draw_band(axis, values, label, f"C{labels.index(label)}")
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, file)


def draw_label_curve(bands: dict[str, dict], file: Path) -> None:
    """Test mIoU over the number of labelled images, which has a logarithmic axis."""
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for i, (label, values) in enumerate(bands.items()):
        draw_band(axis, values, label, f"C{i}")
    numbers = sorted({number for values in bands.values() for number in values})
    axis.set(xscale="log", xlabel="labelled images", ylabel="test mIoU")
    axis.set_xticks(numbers, labels=map(str, numbers))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, file)


def draw_rows(rows: dict[str, list[np.ndarray]], file: Path) -> None:
    """Pictures uint8 [H, W, 3], a line of them for each title."""
    count = len(next(iter(rows.values())))
    height, width = next(iter(rows.values()))[0].shape[:2]
    size = (2 * count, 2 * len(rows) * height / width)
    options = {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(rows), count, **options)
    for line, (title, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    save(figure, file)


def save(figure, file: Path) -> None:
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
