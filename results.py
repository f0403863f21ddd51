"""results.csv of experiments.py, and what follows from it: the chosen runs, tables and figures.

A line of the CSV is a run; `chosen` is, throughout, {(setting, method): its lines, a dict each}.
"""

import csv
import statistics
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

import models
from data import load_source
from files import write
from pictures import paint, spread_indices

matplotlib.use("agg")  # no display is needed
FIELDS = ["setting", "method", "lr", "seed", "validation miou", "test miou", "test boundary iou"]
FIELDS += ["seconds", "curve", "arguments", "commit"]
PICTURES = {"street, 20 labels": "streets.png", "camvid, 20 labels": "camvid.png"}
ABLATED = "queries"  # in the names of the methods that are ablations


# -------------------------------------------------------------------------------------- the CSV
def read_rows(results: Path) -> list[dict]:
    file = results / "results.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def add_row(results: Path, row: list) -> None:
    results.mkdir(parents=True, exist_ok=True)
    with open(results / "results.csv", "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([row] if file.tell() else [FIELDS, row])


def best_rate(rows: list[dict], where: tuple[str, str]) -> float | None:
    """The rate with the best validation mIoU at seed 0 of a (setting, method)."""
    first = [r for r in rows if (r["setting"], r["method"]) == where and r["seed"] == "0"]
    best = max(first, key=lambda row: float(row["validation miou"]), default=None)
    return best and float(best["lr"])


def chosen_runs(rows: list[dict], rates: dict[tuple, float | None]) -> dict[tuple, list[dict]]:
    """The runs of each (setting, method) at the rate that `rates` gives for it, by seed."""
    chosen = {}
    for pair, rate in rates.items():
        runs = [r for r in rows if (r["setting"], r["method"]) == pair and float(r["lr"]) == rate]
        if runs:
            chosen[pair] = sorted(runs, key=lambda row: int(row["seed"]))
    return chosen


# ----------------------------------------------------------------------------------- the report
def report(chosen: dict, runs: dict, folder: Path) -> None:
    """Write tables.md (printed, too), curves.png, labels.png and pictures of predictions.

    runs: {(setting, method): the folder of the run of seed 0}; a picture is drawn where the
    weights of all its methods are here."""
    tables = make_tables(chosen)
    write(folder / "tables.md", lambda file: file.write(f"{tables}\n".encode()))
    print(tables)
    methods = {pair: rows for pair, rows in chosen.items() if ABLATED not in pair[1]}
    if methods:
        draw_panels(curves(methods), "step", "validation mIoU", folder / "curves.png")
    if bands := label_curve(chosen):
        draw_label_curve(bands, folder / "labels.png")
    for name, file in PICTURES.items():
        here = {m: run for (n, m), run in runs.items() if n == name and (n, m) in methods}
        if here and all((run / "model.safetensors").exists() for run in here.values()):
            draw_rows(predict_scenes(here), folder / file)


# ----------------------------------------------------------------------------------------- tables
def spread(rows: list[dict], field: str = "test miou") -> str:
    """Mean and range over the seeds in per cent; the number of seeds where it is not three."""
    values = [100 * float(row[field]) for row in rows]
    text = f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    return text if len(rows) == 3 else f"{text}, n = {len(rows)}"


def make_tables(chosen: dict) -> str:
    """Markdown: test mIoU of settings by methods, then every cell with rate and boundary IoU."""
    columns = list(dict.fromkeys(method for _, method in chosen))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name in dict.fromkeys(name for name, _ in chosen):
        cells = [spread(chosen[name, m]) if (name, m) in chosen else "" for m in columns]
        lines.append([name, *cells])
    head = ["setting", "method", "rate", "test mIoU", "boundary IoU", "minutes a run"]
    detail = [head, ["---"] * len(head)]
    for (name, method), rows in chosen.items():
        times = [int(row["seconds"]) for row in rows if row["seconds"]]
        minutes = f"{statistics.mean(times) / 60:.0f}" if times else ""
        scores = [spread(rows), spread(rows, "test boundary iou")]
        detail.append([name, method, rows[0]["lr"], *scores, minutes])
    tables = ["\n".join(f"| {' | '.join(cells)} |" for cells in t) for t in (lines, detail)]
    return "Test mIoU in per cent, mean (min to max) over the seeds.\n\n" + "\n\n".join(tables)


# ----------------------------------------------------------------------------------------- curves
def same_seeds(chosen: dict) -> dict:
    """Of each setting the seeds that all its methods have, so that a figure compares like with
    like; all where they have none in common."""
    seeds = {}
    for (name, _), rows in chosen.items():
        here = {row["seed"] for row in rows}
        seeds[name] = seeds.get(name, here) & here
    return {
        pair: [row for row in rows if row["seed"] in (seeds[pair[0]] or {row["seed"]})]
        for pair, rows in chosen.items()
    }


def curves(chosen: dict) -> dict:
    """Validation mIoU in per cent: {setting: {method: {step: its values over the seeds}}}."""
    panels = {}
    for (name, method), rows in same_seeds(chosen).items():
        values = panels.setdefault(name, {}).setdefault(method, {})
        for point in " ".join(row["curve"] for row in rows).split():
            step, miou = point.split(":")
            values.setdefault(int(step), []).append(100 * float(miou))
    return panels


def label_curve(chosen: dict) -> dict:
    """Test mIoU in per cent on CamVid: {method: {number of labels: its values over the seeds}}."""
    shown = {
        (name, method): rows
        for (name, method), rows in chosen.items()
        if name.startswith("camvid") and name.endswith("labels") and ABLATED not in method
    }
    bands = {}
    for (name, method), rows in same_seeds(shown).items():
        values = [100 * float(row["test miou"]) for row in rows]
        bands.setdefault(method, {})[int(name.split()[1])] = values
    return bands


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


# --------------------------------------------------------------------------------------- pictures
def predict_scenes(runs: dict[str, Path]) -> dict[str, list[np.ndarray]]:
    """Six test images, their truth and the masks of the networks {method: folder}, in colours."""
    networks = {method: models.load(run) for method, run in runs.items()}
    arguments = next(iter(networks.values())).config["arguments"]
    source = load_source(arguments["dataset"], arguments["data_path"])
    samples = [source.test[i] for i in spread_indices(len(source.test), 6)]
    pairs = [source.read(sample) for sample in samples]
    rows = {"image": [image for image, _ in pairs]}
    rows["truth"] = [paint(label, source.palette) for _, label in pairs]
    for method, network in networks.items():
        masks = [torch.from_numpy(network.predict(image)) for image, _ in pairs]
        rows[method] = [paint(mask, source.palette) for mask in masks]
    return {title: [picture.permute(1, 2, 0).numpy() for picture in r] for title, r in rows.items()}


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
