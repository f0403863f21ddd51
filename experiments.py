"""Compare the methods: train what is missing, collect one CSV, write the table; draw the figures.

python experiments.py                                        # the streets: no download
python experiments.py --only camvid                          # see docs/results.md
python experiments.py --only "camvid, 20 labels" --methods supervised ClassMix "ClassMix + ReCo" \\
    --lr 0.04 --seeds 0                                      # one setting at one rate
python experiments.py --results docs                         # add to the committed results
python experiments.py --results docs --figure curves         # draw docs/curves.png, run nothing
python experiments.py --only camvid --jobs 14                # share a GPU (docs/speed.md)

With the same seed all methods have the same labelled images, first weights and number of steps. The
learning rate of a method is the one with the best validation mIoU at seed 0; the table shows the
scores on the test images. A finished run is a row of results.csv and does not run again; a killed
one is resumed.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from accelerate.utils import parse_flag_from_env
from matplotlib import pyplot
from tqdm import tqdm

import models
from data import load_source
from engine.checkpoint import best_miou
from engine.options import natural, new_parser, positive, positive_float
from engine.pictures import paint, spread_indices
from engine.processes import cores, launch
from inputs.errors import need
from inputs.files import write

matplotlib.use("agg")  # no display is needed
FIELDS = ["setting", "method", "lr", "seed", "validation miou", "test miou", "test boundary iou"]
FIELDS += ["seconds", "curve", "arguments", "commit", "machine"]
ROOT, RUNS = Path(__file__).parent, Path("runs/experiments")
METHODS = {
    "supervised": "train_supervised.py",
    "supervised + ReCo": "train_supervised.py --reco",
    "CutMix": "train_semi.py --mixing-strategy cutmix",
    "ClassMix": "train_semi.py",
    "ClassMix + ReCo": "train_semi.py --reco",
}
ABLATIONS = {  # of ClassMix + ReCo, at its rate
    "random queries, random keys": "train_semi.py --reco --reco-random-queries --reco-random-keys",
    "random queries, active keys": "train_semi.py --reco --reco-random-queries",
    "active queries, random keys": "train_semi.py --reco --reco-random-keys",
}
MAIN = ["supervised", "ClassMix", "ClassMix + ReCo"]
# what docs/results.md says to download, or to write, first
CAMVID = "--dataset camvid --data-path dataset/CamVid --backbone-weights dataset/lite0.safetensors"
PAPER = f"--paper {CAMVID}"
TILES = "--dataset folder --data-path dataset/tiles --backbone-weights dataset/lite0.safetensors "
TILES += "--recipe camvid --iterations 1500 --val-interval 250"
RATES = (0.01, 0.02, 0.04)


class Setting(NamedTuple):
    options: str  # data set, labels, and what differs from the recipe
    rates: tuple[float, ...] = ()  # to choose from; none: as in camvid, 20 labels, paper
    methods: list[str] = MAIN


SETTINGS = {
    "street, 20 labels": Setting("--num-labeled 20", (0.2,)),
    "street, p0": Setting("--label-ratio p0", (0.2,)),
    "camvid, 20 labels": Setting(f"{CAMVID} --num-labeled 20", (0.04,)),
    "camvid, p0": Setting(f"{CAMVID} --label-ratio p0", (0.04,)),
    "tiles, 30 labels": Setting(f"{TILES} --num-labeled 30", (0.04,), ["supervised"]),
    "tiles, 30 labels, 8 labelled a step": Setting(
        f"{TILES} --num-labeled 30 --labeled-batch-size 8", (0.04,), ["ClassMix", "ClassMix + ReCo"]
    ),
    "tiles, 301 labels": Setting(f"{TILES} --num-labeled 0", (0.04,), ["supervised"]),
    # the paper's method on these data
    "street, 20 labels, paper": Setting("--paper --num-labeled 20", (0.1, 0.2, 0.4)),
    "street, p0, paper": Setting("--paper --label-ratio p0", (0.05, 0.1, 0.2)),
    "camvid, 5 labels, paper": Setting(f"{PAPER} --num-labeled 5"),
    "camvid, 10 labels, paper": Setting(f"{PAPER} --num-labeled 10"),
    "camvid, 20 labels, paper": Setting(f"{PAPER} --num-labeled 20", RATES, [*METHODS, *ABLATIONS]),
    # as many labelled images per step as in supervised training
    "camvid, 20 labels, paper, 8 labelled a step": Setting(
        f"{PAPER} --num-labeled 20 --labeled-batch-size 8",
        methods=["CutMix", "ClassMix", "ClassMix + ReCo"],
    ),
    "camvid, 46 labels, paper": Setting(f"{PAPER} --num-labeled 46"),
    "camvid, 100 labels, paper": Setting(f"{PAPER} --num-labeled 100"),
    "camvid, 367 labels, paper": Setting(
        f"{PAPER} --num-labeled 0", (), ["supervised + ReCo", *MAIN]
    ),
    "camvid, p0, paper": Setting(f"{PAPER} --label-ratio p0", RATES),
    "tiles, 30 labels, paper": Setting(f"{TILES} --paper --num-labeled 30", (0.04,)),
}
LOCK = threading.Lock()


# ------------------------------------------------------------------------------------------- runs
def arguments_of(name: str, method: str, rate: float, seed: int) -> list[str]:
    """The part of a run's command line that decides its result, without local paths."""
    words = (METHODS | ABLATIONS)[method].split() + SETTINGS[name].options.split()
    return [*words, "--lr", f"{rate:g}", "--seed", str(seed), "--log-with", "none"]


def folder_of(name: str, method: str, rate: float, seed: int) -> Path:
    return RUNS / f"{name}-{method}-lr{rate:g}-seed{seed}".replace(",", "").replace(" ", "-")


def choose_at(name: str, method: str) -> tuple[str, str]:
    """The setting and method whose runs decide the rate: for an ablation ClassMix + ReCo."""
    setting = name if SETTINGS[name].rates else "camvid, 20 labels, paper"
    return setting, method if method in METHODS else "ClassMix + ReCo"


def run_script(script: str, *words) -> None:
    """Run a script with one thread, on a GPU if there is one (not with ACCELERATE_USE_CPU=1)."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or ["killed"])[-1]
    need(done.returncode == 0, f"{' '.join(command[1:])}: failed: {last}")


def measure(args: Namespace, job: tuple) -> None:
    """Train one run, evaluate it on the test images and add its row to results.csv."""
    folder, words = folder_of(*job), arguments_of(*job)
    begun, resumed = time.monotonic(), (folder / "config.json").exists()
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    machine = "CPU core" if on_cpu else torch.cuda.get_device_name()
    local = ["--num-workers", "0", "--out-dir", folder, *(["--resume"] if resumed else [])]
    if "--data-path" in words:  # only the first run decodes the images
        local += ["--cache-dir", RUNS / "cache"]
    run_script(*words, *local)
    run_script("evaluate.py", folder, "--split", "test", "--num-workers", "0")
    history = json.loads((folder / "history.json").read_text())
    test = json.loads((folder / "evaluation-test.json").read_text())
    scores = [best_miou(folder), test["miou"], test["boundary_iou"]]
    seconds = "" if resumed else round(time.monotonic() - begun)
    curve = " ".join(f"{entry['step']}:{entry['miou']:.4f}" for entry in history)
    scores = [f"{score:.4f}" for score in scores]
    with LOCK:  # two runs may end together
        add_row(args.results, [*job, *scores, seconds, curve, " ".join(words), commit, machine])


def run_missing(args: Namespace, jobs: list[tuple]) -> None:
    """Run each job (setting, method, rate, seed) that has no row yet, --jobs at a time."""
    done = {(row["setting"], row["arguments"]) for row in read_rows(args.results)}
    jobs = [job for job in jobs if (job[0], " ".join(arguments_of(*job))) not in done]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), unit="run") as bar:
        for _ in pool.map(lambda job: measure(args, job), jobs):  # a failure cancels the rest
            bar.update()


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


# ----------------------------------------------------------------------------------------- tables
def spread(rows: list[dict], field: str = "test miou") -> str:
    """Mean and range over the seeds in per cent; also the number of seeds if it is not three."""
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


# ---------------------------------------------------------------------------------------- figures
def same_seeds(chosen: dict) -> dict:
    """For each setting the seeds that all its methods have, so that a figure compares like with
    like."""
    seeds = {}
    for (name, _), rows in chosen.items():
        here = {row["seed"] for row in rows}
        seeds[name] = seeds.get(name, here) & here
    return {
        (name, method): [row for row in rows if row["seed"] in seeds[name]]
        for (name, method), rows in chosen.items()
    }


def curves(rows: list[dict]) -> dict:
    """Validation mIoU in per cent, each method at its best rate: {setting: {method: {step: its
    values over the seeds}}}."""
    settings = ("camvid, 20 labels, paper", "camvid, p0, paper", "street, 20 labels, paper")
    pairs = [(name, method) for name in settings for method in MAIN]
    chosen = chosen_runs(rows, {pair: best_rate(rows, pair) for pair in pairs})
    panels = {}
    for (name, method), runs in same_seeds(chosen).items():
        values = panels.setdefault(name, {}).setdefault(method, {})
        for point in " ".join(run["curve"] for run in runs).split():
            step, miou = point.split(":")
            values.setdefault(int(step), []).append(100 * float(miou))
    return panels


def label_curve(rows: list[dict]) -> dict:
    """Test mIoU in per cent of "camvid, N labels, paper": {"CamVid": {method: {N: its values over
    the seeds}}}."""
    settings = [f"camvid, {number} labels, paper" for number in (5, 10, 20, 46, 100, 367)]
    pairs = [(name, method) for name in settings for method in [*MAIN, "supervised + ReCo"]]
    bands = {}
    for (name, method), runs in same_seeds(chosen_runs(rows, dict.fromkeys(pairs, 0.04))).items():
        values = [100 * float(run["test miou"]) for run in runs]
        bands.setdefault(method, {})[int(name.split()[1])] = values
    return {"CamVid": bands} if bands else {}


def draw_panels(panels: dict[str, dict[str, dict]], xlabel: str, ylabel: str, file: Path) -> None:
    """A panel per title, in it per label the mean and range of {x: values}. The axis of a number
    of images is logarithmic."""
    need(panels, f"--figure: {file.with_name('results.csv')} has no run for {file.name}")
    labels = list(dict.fromkeys(label for bands in panels.values() for label in bands))
    shape = dict(ncols=len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False)
    figure, axes = pyplot.subplots(**shape, layout="constrained")
    for axis, (title, bands) in zip(axes[0], panels.items(), strict=True):
        for label, values in bands.items():
            x, colour = list(values), f"C{labels.index(label)}"
            low, mean, high = ([f(v) for v in values.values()] for f in (min, statistics.mean, max))
            axis.plot(x, mean, color=colour, label=label, marker=".")
            axis.fill_between(x, low, high, color=colour, alpha=0.15)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if "images" in xlabel:
            numbers = sorted({number for values in bands.values() for number in values})
            axis.set_xscale("log")
            axis.set_xticks(numbers, labels=map(str, numbers))
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, file)


def draw_masks(setting: str, rate: float, seed: int, file: Path) -> None:
    """Six test images in a row, below them the truth and each method's masks."""
    networks = {m: models.load(folder_of(setting, m, rate, seed)) for m in MAIN}
    arguments = networks[MAIN[0]].config["arguments"]
    source = load_source(arguments["dataset"], arguments["data_path"])
    samples = [source.test[i] for i in spread_indices(len(source.test), 6)]
    pairs = [source.read(sample) for sample in samples]
    rows = {"image": [image for image, _ in pairs]}
    rows["truth"] = [paint(label, source.palette) for _, label in pairs]
    for method, network in networks.items():
        masks = [torch.from_numpy(network.predict(image)) for image, _ in pairs]
        rows[method] = [paint(mask, source.palette) for mask in masks]
    height, width = rows["image"][0].shape[-2:]
    size = (2 * len(pairs), 2 * len(rows) * height / width)
    figure, axes = pyplot.subplots(len(rows), len(pairs), figsize=size, layout="constrained")
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title)
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    save(figure, file)


def save(figure, file: Path) -> None:
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
    print(file)


FIGURES = {  # of docs/results.md
    "curves": lambda rows, file: draw_panels(curves(rows), "step", "validation mIoU", file),
    "labels": lambda rows, file: draw_panels(
        label_curve(rows), "labelled images", "test mIoU", file
    ),
    "camvid": lambda rows, file: draw_masks("camvid, 20 labels, paper", 0.04, 1, file),
    "streets": lambda rows, file: draw_masks("street, 20 labels, paper", 0.2, 0, file),
}


# ----------------------------------------------------------------------------------------- script
def parse_options() -> Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    what = "data sets (street, camvid, tiles) or settings"
    add("--only", nargs="+", default=["street"], metavar="TEXT", help=what)
    names = [*METHODS, *ABLATIONS]
    add("--methods", nargs="+", choices=names, metavar="NAME", help="default: those of the setting")
    add("--lr", type=positive_float, help="of every run; default: each method's best on validation")
    add("--seeds", nargs="+", type=natural, default=[0, 1, 2], metavar="N", help="of each method")
    add("--results", type=Path, default=RUNS, metavar="DIR", help="for CSV, table and figures")
    add("--figure", choices=list(FIGURES), help="draw this figure of docs/results.md, run nothing")
    add("--jobs", type=positive, default=cores(), help="runs at a time, one thread each")
    return parser.parse_args()


def main() -> None:
    args = parse_options()
    if args.figure:
        file = args.results / f"{args.figure}.png"
        return FIGURES[args.figure](read_rows(args.results), file)
    pairs = [(name, method) for name in SETTINGS for method in SETTINGS[name].methods]
    for text in args.only:
        known = any(text in (name.split(",")[0], name) for name in SETTINGS)
        need(known, f"--only {text}: is none of {'; '.join(SETTINGS)}")
    wanted = [(n, m) for n, m in pairs if {n.split(",")[0], n} & set(args.only)]
    wanted = [(n, m) for n, m in wanted if m in (args.methods or [m])]
    methods, only = (", ".join(words) for words in (args.methods or [], args.only))
    need(wanted, f"--methods {methods}: none of them is run in {only}")
    if not args.lr:
        tuned = dict.fromkeys(choose_at(*pair) for pair in wanted)
        run_missing(args, [(*pair, rate, 0) for pair in tuned for rate in SETTINGS[pair[0]].rates])
    rows = read_rows(args.results)
    rates = {pair: args.lr or best_rate(rows, choose_at(*pair)) for pair in wanted}
    run_missing(args, [(*pair, rates[pair], seed) for seed in args.seeds for pair in wanted])
    tables = make_tables(chosen_runs(read_rows(args.results), rates))
    write(args.results / "tables.md", lambda file: file.write(f"{tables}\n".encode()))
    print(tables)


if __name__ == "__main__":
    launch(main)
