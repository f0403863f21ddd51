"""Compare the methods: train what is missing, write one CSV, tables and figures.

python experiments.py                                        # the streets: no download
python experiments.py --only camvid                          # photographs (docs/results.md)
python experiments.py --only "camvid, 20 labels" --seeds 0   # one setting, one seed
python experiments.py --only camvid --list                   # the runs wanted and done
python experiments.py --results docs                         # go on from the committed results

For one seed all methods have the same labelled images, first weights and number of steps. The
learning rate of a method is the one with the best validation mIoU at seed 0; tables show the test
images. A finished run is a line of results.csv and is not run again; a killed one is resumed.
"""

import csv
import io
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

import numpy as np
from PIL import Image
from tqdm import tqdm

import street
from errors import UserError, need
from figures import draw_label_curve, draw_panels, draw_rows
from files import write
from options import Formatter, Parser, natural, positive

ROOT, RUNS = Path(__file__).parent, Path("runs/experiments")
CAMVID_PATH, CAMVID_WEIGHTS = "dataset/CamVid", "dataset/lite0.safetensors"
CAMVID = f"--dataset camvid --data-path {CAMVID_PATH} --backbone-weights {CAMVID_WEIGHTS}"
DIGITS = "--dataset folder --data-path dataset/handwriting --recipe street --iterations 2000"
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


class Setting(NamedTuple):
    options: str  # data set, labels, and what differs from the recipe
    methods: list[str]
    rates: tuple[float, ...]
    semi_options: str = ""  # of train_semi.py alone
    tuned_on: str = ""  # the setting whose choice of the rate is taken (default: its own)


def camvid(labels: str, methods: list[str], tuned_on: str = "") -> Setting:
    return Setting(f"{CAMVID} {labels}", methods, (0.01, 0.02, 0.04), tuned_on=tuned_on)


SETTINGS = {
    "street, 20 labels": Setting("--num-labeled 20", MAIN, (0.1, 0.2, 0.4)),
    "street, p0": Setting("--label-ratio p0", MAIN, (0.05, 0.1, 0.2)),
    "camvid, 5 labels": camvid("--num-labeled 5", MAIN, "camvid, 20 labels"),
    "camvid, 10 labels": camvid("--num-labeled 10", MAIN, "camvid, 20 labels"),
    "camvid, 20 labels": camvid("--num-labeled 20", [*METHODS, *ABLATIONS]),
    "camvid, 46 labels": camvid("--num-labeled 46", MAIN, "camvid, 20 labels"),
    "camvid, 100 labels": camvid("--num-labeled 100", MAIN, "camvid, 20 labels"),
    "camvid, 367 labels": camvid("--num-labeled 0", ["supervised + ReCo", *MAIN]),
    "camvid, p0": camvid("--label-ratio p0", MAIN),
    "handwriting, 60 labels": Setting(
        f"{DIGITS} --num-labeled 60", MAIN, (0.2, 0.4), "--warmup-iterations 600"
    ),
}
PAIRS = [(name, method) for name, setting in SETTINGS.items() for method in setting.methods]
PICTURES = {"street, 20 labels": "streets.png", "camvid, 20 labels": "camvid.png"}
SCENES = (3, 11, 24, 42, 57, 80)  # test scenes of streets.png
FIELDS = ["setting", "method", "lr", "seed", "validation miou", "test miou", "test boundary iou"]
FIELDS += ["seconds", "curve", "arguments", "commit"]
LOCK = threading.Lock()


# ------------------------------------------------------------------------------------------- runs
def arguments_of(name: str, method: str, rate: float, seed: int) -> list[str]:
    """The command line of a run: what decides its result, and nothing of this machine."""
    setting = SETTINGS[name]
    words = (METHODS | ABLATIONS)[method].split() + setting.options.split()
    if words[0] == "train_semi.py":
        words += setting.semi_options.split()
    return [*words, "--lr", f"{rate:g}", "--seed", str(seed), "--log-with", "none"]


def folder_of(name: str, method: str, rate: float, seed: int) -> Path:
    return RUNS / f"{name}-{method}-lr{rate:g}-seed{seed}".replace(",", "").replace(" ", "-")


def tuned_pair(name: str, method: str) -> tuple[str, str]:
    """Where the rate of a method is chosen. An ablation takes that of ClassMix + ReCo."""
    return SETTINGS[name].tuned_on or name, method if method in METHODS else "ClassMix + ReCo"


def run_script(script: str, *words) -> None:
    """Run a script with one thread, on a GPU if there is one (ACCELERATE_USE_CPU=1: never)."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or ["killed"])[-1]
    need(done.returncode == 0, f"{' '.join(command[1:])}: failed: {last}")


def git_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def measure(args, name: str, method: str, rate: float, seed: int) -> None:
    """Train one run, evaluate it on the test images and add its line to results.csv."""
    folder = folder_of(name, method, rate, seed)
    words = arguments_of(name, method, rate, seed)
    begun, resumed = time.monotonic(), (folder / "config.json").exists()
    here = {CAMVID_PATH: args.data_path, CAMVID_WEIGHTS: args.backbone_weights}
    local = [here.get(word, word) for word in words]
    local += ["--num-workers", "0", "--out-dir", folder]
    run_script(*local, *(["--resume"] if resumed else []))
    run_script("evaluate.py", folder, "--split", "test", "--num-workers", "0")
    history = json.loads((folder / "history.json").read_text())
    test = json.loads((folder / "evaluation-test.json").read_text())
    row = {
        "setting": name,
        "method": method,
        "lr": f"{rate:g}",
        "seed": str(seed),
        "validation miou": f"{max(entry['miou'] for entry in history):.4f}",
        "test miou": f"{test['miou']:.4f}",
        "test boundary iou": f"{test['boundary_iou']:.4f}",
        "seconds": "" if resumed else str(round(time.monotonic() - begun)),
        "curve": " ".join(f"{entry['step']}:{entry['miou']:.4f}" for entry in history),
        "arguments": " ".join(words),
        "commit": git_commit(),
    }
    with LOCK:  # two runs may end together
        write_rows(args.results, [*read_rows(args.results), row])


def run_missing(args, jobs: list[tuple]) -> None:
    """Each job (setting, method, rate, seed) that has no line yet, --jobs at a time."""
    done = {(row["setting"], row["arguments"]) for row in read_rows(args.results)}
    jobs = [job for job in jobs if (job[0], " ".join(arguments_of(*job))) not in done]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), unit="run") as bar:
        for _ in pool.map(lambda job: measure(args, *job), jobs):  # a failure cancels the rest
            bar.update()


# ---------------------------------------------------------------------------------------- results
def read_rows(results: Path) -> list[dict]:
    file = results / "results.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def write_rows(results: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(results / "results.csv", lambda file: file.write(text.getvalue().encode()))


def best_rate(rows: list[dict], name: str, method: str) -> float | None:
    """The rate with the best validation mIoU at seed 0, where this method's rate is chosen."""
    where = tuned_pair(name, method)
    first = [r for r in rows if (r["setting"], r["method"]) == where and r["seed"] == "0"]
    best = max(first, key=lambda row: float(row["validation miou"]), default=None)
    return best and float(best["lr"])


def chosen_runs(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The runs of each (setting, method) of the table at the chosen rate, by seed."""
    chosen = {}
    for pair in PAIRS:
        rate = best_rate(rows, *pair)
        runs = [r for r in rows if (r["setting"], r["method"]) == pair and float(r["lr"]) == rate]
        if runs:
            chosen[pair] = sorted(runs, key=lambda row: int(row["seed"]))
    return chosen


def spread(runs: list[dict], field: str = "test miou") -> str:
    """Mean and range over the seeds in per cent; the number of seeds where it is not three."""
    values = [100 * float(row[field]) for row in runs]
    text = f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    return text if len(runs) == 3 else f"{text}, n = {len(runs)}"


def make_tables(chosen: dict) -> str:
    """Markdown: test mIoU of settings by methods, then every cell with rate and boundary IoU."""
    names = [name for name in SETTINGS if any(pair[0] == name for pair in chosen)]
    columns = [m for m in METHODS | ABLATIONS if any(pair[1] == m for pair in chosen)]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name in names:
        cells = [spread(chosen[name, m]) if (name, m) in chosen else "" for m in columns]
        lines.append([name, *cells])
    head = ["setting", "method", "rate", "test mIoU", "boundary IoU", "minutes a run"]
    detail = [head, ["---"] * len(head)]
    for (name, method), runs in chosen.items():
        times = [int(row["seconds"]) for row in runs if row["seconds"]]
        minutes = f"{statistics.mean(times) / 60:.0f}" if times else ""
        scores = [spread(runs), spread(runs, "test boundary iou")]
        detail.append([name, method, runs[0]["lr"], *scores, minutes])
    tables = ["\n".join(f"| {' | '.join(cells)} |" for cells in t) for t in (lines, detail)]
    return "Test mIoU in per cent, mean (min to max) over the seeds.\n\n" + "\n\n".join(tables)


# ---------------------------------------------------------------------------------------- figures
def curves(chosen: dict) -> dict:
    """Validation mIoU of the runs by setting, method and step."""
    panels = {}
    for (name, method), runs in chosen.items():
        values = panels.setdefault(name, {}).setdefault(method, {})
        for point in " ".join(row["curve"] for row in runs).split():
            step, miou = point.split(":")
            values.setdefault(int(step), []).append(100 * float(miou))
    return panels


def label_curve(chosen: dict) -> dict:
    """Test mIoU of the runs on CamVid by method and number of labelled photographs."""
    bands = {}
    for (name, method), runs in chosen.items():
        if name.startswith("camvid") and name.endswith("labels") and method in MAIN:
            values = [100 * float(row["test miou"]) for row in runs]
            bands.setdefault(method, {})[int(name.split()[1])] = values
    return bands


def read_scenes(args, name: str) -> tuple[list[Path], list[np.ndarray]]:
    """Six test images of a setting as files, and their labels uint8 [H, W]."""
    if name.startswith("camvid"):
        files = sorted(Path(args.data_path, "test").glob("*.png"))[20::39]  # of 233
        labels = [file.parent.with_name("testannot") / file.name for file in files]
        return files, [np.array(Image.open(label)) for label in labels]
    scenes = [street.scene("test", index) for index in SCENES]
    folder = RUNS / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, _) in zip(SCENES, scenes, strict=True):
        Image.fromarray(image).save(folder / f"{index}.png")
    return [folder / f"{index}.png" for index in SCENES], [label for _, label in scenes]


def predict_scenes(args, chosen: dict, name: str) -> dict[str, list[np.ndarray]]:
    """Image, truth and the prediction of each method at seed 0, as far as its run is here."""
    rates = {m: float(chosen[name, m][0]["lr"]) for m in MAIN if (name, m) in chosen}
    runs = {method: folder_of(name, method, rate, 0) for method, rate in rates.items()}
    runs = {method: run for method, run in runs.items() if (run / "model.safetensors").exists()}
    if not runs:
        return {}
    files, labels = read_scenes(args, name)
    config = json.loads((next(iter(runs.values())) / "config.json").read_text())
    palette = np.zeros((256, 3), np.uint8)  # void is black
    palette[: len(config["palette"])] = config["palette"]
    rows = {"image": [np.array(Image.open(file)) for file in files]}
    rows["truth"] = [palette[label] for label in labels]
    for method, run in runs.items():
        run_script("predict.py", run, *files, "--out-dir", run / "predictions")
        masks = [run / "predictions" / f"{file.stem}.png" for file in files]
        rows[method] = [np.array(Image.open(mask).convert("RGB")) for mask in masks]
    return rows


def report(args) -> None:
    """Tables (tables.md, and printed) and figures of what has been run."""
    chosen, folder = chosen_runs(read_rows(args.results)), args.results
    tables = make_tables(chosen)
    write(folder / "tables.md", lambda file: file.write(f"{tables}\n".encode()))
    print(tables)
    methods = {pair: runs for pair, runs in chosen.items() if pair[1] in METHODS}
    draw_panels(curves(methods), "step", "validation mIoU", folder / "curves.png")
    if bands := label_curve(chosen):
        draw_label_curve(bands, folder / "labels.png")
    for name, file in PICTURES.items():
        if rows := predict_scenes(args, chosen, name):
            draw_rows(rows, folder / file)


# ----------------------------------------------------------------------------------------- script
def parse_options() -> Namespace:
    parser = Parser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    what = "data sets (street, camvid, handwriting), settings, methods, or pairs as --list has them"
    add("--only", nargs="+", default=["street"], metavar="TEXT", help=what)
    add("--seeds", nargs="+", type=natural, default=[0, 1, 2], metavar="N", help="seeds of a pair")
    add("--results", type=Path, default=RUNS, metavar="DIR", help="for CSV, tables and figures")
    add("--jobs", type=positive, default=os.cpu_count(), help="runs at a time, one thread each")
    add("--data-path", default=CAMVID_PATH, metavar="DIR", help="where CamVid lies")
    what = "ImageNet weights for CamVid's backbone, from examples/lite_weights.py"
    add("--backbone-weights", default=CAMVID_WEIGHTS, metavar="FILE", help=what)
    add("--list", action="store_true", help="print the runs that are wanted and done, and stop")
    return parser.parse_args()


def main() -> None:
    args = parse_options()
    only = set(args.only)
    wanted = [(n, m) for n, m in PAIRS if only & {n.split(",")[0], n, m, f"{n}: {m}"}]
    need(wanted, f"--only {' '.join(args.only)}: fits none of {'; '.join(SETTINGS)}")
    tuned = dict.fromkeys(tuned_pair(*pair) for pair in wanted)
    search = [(*pair, rate, 0) for pair in tuned for rate in SETTINGS[pair[0]].rates]
    if args.list:
        done = [(row["setting"], row["method"]) for row in read_rows(args.results)]
        for pair in dict.fromkeys([*tuned, *wanted]):
            rates = len(SETTINGS[pair[0]].rates) if pair in tuned else 0
            print(f"{': '.join(pair):52s} {done.count(pair)} runs done; rates to try: {rates}")
        return
    digits = Path("dataset/handwriting")
    if any(name.startswith("handwriting") for name, _ in wanted) and not digits.exists():
        run_script("examples/handwriting.py", digits)
    run_missing(args, search)
    rows = read_rows(args.results)
    table = [(*pair, best_rate(rows, *pair), seed) for seed in args.seeds for pair in wanted]
    run_missing(args, table)
    report(args)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"experiments.py: {error}", file=sys.stderr)
        sys.exit(2)
