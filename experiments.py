"""Compare the methods: train what is missing, collect one CSV, write tables and figures.

python experiments.py                                        # the streets: no download
python experiments.py --only camvid                          # photographs (docs/results.md)
python experiments.py --only "camvid, 20 labels" --methods supervised ClassMix "ClassMix + ReCo" \\
    --lr 0.04 --seeds 0                                      # of one setting, no other rate
python experiments.py --results docs                         # go on from the committed results
python experiments.py --only camvid --jobs 14                # ... that share a GPU (docs/speed.md)

For one seed all methods have the same labelled images, first weights and number of steps. The
learning rate of a method is the one with the best validation mIoU at seed 0; tables show the test
images. A finished run is a line of results.csv and is not run again; a killed one is resumed.
"""

import json
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import results
from checkpoint import best_miou
from errors import need
from options import natural, new_parser, positive, positive_float
from processes import cores, launch

ROOT, RUNS = Path(__file__).parent, Path("runs/experiments")
METHODS = {
    "supervised": "train_supervised.py",
    "supervised + ReCo": "train_supervised.py --reco",
    "CutMix": "train_semi.py --mixing-strategy cutmix",
    "ClassMix": "train_semi.py",
    "ClassMix + ReCo": "train_semi.py --reco",
    "mean teacher": "train_semi.py --mixing-strategy none",
    "mean teacher + ReCo": "train_semi.py --reco --mixing-strategy none",
}
ABLATIONS = {  # of ClassMix + ReCo, at its rate
    "random queries, random keys": "train_semi.py --reco --reco-random-queries --reco-random-keys",
    "random queries, active keys": "train_semi.py --reco --reco-random-queries",
    "active queries, random keys": "train_semi.py --reco --reco-random-keys",
}
MAIN = ["supervised", "ClassMix", "ClassMix + ReCo"]
TABLE = ["supervised", "supervised + ReCo", "CutMix", "ClassMix", "ClassMix + ReCo"]
# with few known pixels an image, what mixing does
PIXELS = [*MAIN, "mean teacher", "mean teacher + ReCo"]
# what docs/results.md says to download, or to write, first
CAMVID = "--dataset camvid --data-path dataset/CamVid --backbone-weights dataset/lite0.safetensors"
RATES = (0.01, 0.02, 0.04)
DIGITS = (
    "--dataset folder --data-path dataset/handwriting --recipe street --channels 64 "
    "--crop-size 64 --scale 0.8 1.25"
)


class Setting(NamedTuple):
    options: str  # data set, labels, and what differs from the recipe
    rates: tuple[float, ...] = ()  # to choose from; none: as chosen for camvid, 20 labels
    methods: list[str] = MAIN
    semi_options: str = ""  # of train_semi.py alone


SETTINGS = {
    "street, 20 labels": Setting("--num-labeled 20", (0.1, 0.2, 0.4)),
    "street, p0": Setting("--label-ratio p0", (0.05, 0.1, 0.2), PIXELS),
    "camvid, 5 labels": Setting(f"{CAMVID} --num-labeled 5"),
    "camvid, 10 labels": Setting(f"{CAMVID} --num-labeled 10"),
    "camvid, 20 labels": Setting(f"{CAMVID} --num-labeled 20", RATES, [*TABLE, *ABLATIONS]),
    # longer, and as many labelled photographs a step in supervised training as in the others
    "camvid, 20 labels, 4,000 steps": Setting(
        f"{CAMVID} --num-labeled 20 --iterations 4000 --val-interval 1000"
    ),
    "camvid, 20 labels, 4 labelled a step": Setting(
        f"{CAMVID} --num-labeled 20 --batch-size 4", methods=["supervised"]
    ),
    # as many as in supervised training
    "camvid, 20 labels, 8 labelled a step": Setting(
        f"{CAMVID} --num-labeled 20",
        methods=["CutMix", "ClassMix", "ClassMix + ReCo"],
        semi_options="--labeled-batch-size 8",
    ),
    # a stronger network (examples/lite_weights.py --lite 2), nearly whole photographs: for a GPU
    "camvid, 20 labels, Lite2, crops of 352": Setting(
        f"{CAMVID.replace('lite0', 'lite2')} --backbone tf_efficientnet_lite2 --crop-size 352 "
        "--num-labeled 20",
        semi_options="--labeled-batch-size 8",
    ),
    "camvid, 100 labels, 8 labelled a step": Setting(
        f"{CAMVID} --num-labeled 100",
        methods=["ClassMix", "ClassMix + ReCo"],
        semi_options="--labeled-batch-size 8",
    ),
    "camvid, 46 labels": Setting(f"{CAMVID} --num-labeled 46"),
    "camvid, 100 labels": Setting(f"{CAMVID} --num-labeled 100"),
    "camvid, 367 labels": Setting(f"{CAMVID} --num-labeled 0", (), ["supervised + ReCo", *MAIN]),
    "camvid, p0": Setting(f"{CAMVID} --label-ratio p0", RATES, PIXELS),
    "handwriting, 60 labels": Setting(
        f"{DIGITS} --batch-size 8 --iterations 2000 --val-interval 500 --num-labeled 60",
        (0.2, 0.4),
        semi_options="--warmup-iterations 600",
    ),
}
LOCK = threading.Lock()


# ------------------------------------------------------------------------------------------- runs
def arguments_of(name: str, method: str, rate: float, seed: int) -> list[str]:
    """The command line of a run: what decides its result, and nothing of this machine."""
    words = (METHODS | ABLATIONS)[method].split() + SETTINGS[name].options.split()
    if words[0] == "train_semi.py":
        words += SETTINGS[name].semi_options.split()
    return [*words, "--lr", f"{rate:g}", "--seed", str(seed), "--log-with", "none"]


def folder_of(name: str, method: str, rate: float, seed: int) -> Path:
    return RUNS / f"{name}-{method}-lr{rate:g}-seed{seed}".replace(",", "").replace(" ", "-")


def choose_at(name: str, method: str) -> tuple[str, str]:
    """Setting and method whose runs choose the rate. An ablation takes that of ClassMix + ReCo."""
    setting = name if SETTINGS[name].rates else "camvid, 20 labels"
    return setting, method if method in METHODS else "ClassMix + ReCo"


def run_script(script: str, *words) -> None:
    """Run a script with one thread, on a GPU if there is one (ACCELERATE_USE_CPU=1: never)."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or ["killed"])[-1]
    need(done.returncode == 0, f"{' '.join(command[1:])}: failed: {last}")


def measure(args: Namespace, job: tuple) -> None:
    """Train one run, evaluate it on the test images and add its line to results.csv."""
    folder, words = folder_of(*job), arguments_of(*job)
    begun, resumed = time.monotonic(), (folder / "config.json").exists()
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    local = ["--num-workers", "0", "--out-dir", folder, *(["--resume"] if resumed else [])]
    if "--data-path" in words:  # photographs are decoded once, by the first run
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
        results.add_row(args.results, [*job, *scores, seconds, curve, " ".join(words), commit])


def run_missing(args: Namespace, jobs: list[tuple]) -> None:
    """Each job (setting, method, rate, seed) that has no line yet, --jobs at a time."""
    done = {(row["setting"], row["arguments"]) for row in results.read_rows(args.results)}
    jobs = [job for job in jobs if (job[0], " ".join(arguments_of(*job))) not in done]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), unit="run") as bar:
        for _ in pool.map(lambda job: measure(args, job), jobs):  # a failure cancels the rest
            bar.update()


# ----------------------------------------------------------------------------------------- script
def parse_options() -> Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    what = "data sets (street, camvid, handwriting) or settings"
    add("--only", nargs="+", default=["street"], metavar="TEXT", help=what)
    names = [*METHODS, *ABLATIONS]
    add("--methods", nargs="+", choices=names, metavar="NAME", help="default: those of the setting")
    add(
        "--lr", type=positive_float, help="of every run; default: the best on validation, by method"
    )
    add("--seeds", nargs="+", type=natural, default=[0, 1, 2], metavar="N", help="of each method")
    add("--results", type=Path, default=RUNS, metavar="DIR", help="for CSV, tables and figures")
    add("--jobs", type=positive, default=cores(), help="runs at a time, one thread each")
    return parser.parse_args()


def main() -> None:
    args = parse_options()
    pairs = [(name, method) for name in SETTINGS for method in SETTINGS[name].methods]
    for text in args.only:
        known = any(text in (name.split(",")[0], name) for name in SETTINGS)
        need(known, f"--only {text}: fits none of {'; '.join(SETTINGS)}")
    wanted = [(n, m) for n, m in pairs if {n.split(",")[0], n} & set(args.only)]
    wanted = [(n, m) for n, m in wanted if m in (args.methods or [m])]
    methods, only = (", ".join(words) for words in (args.methods or [], args.only))
    need(wanted, f"--methods {methods}: none of them is run in {only}")
    if not args.lr:
        tuned = dict.fromkeys(choose_at(*pair) for pair in wanted)
        run_missing(args, [(*pair, rate, 0) for pair in tuned for rate in SETTINGS[pair[0]].rates])
    rows = results.read_rows(args.results)
    rates = {pair: args.lr or results.best_rate(rows, choose_at(*pair)) for pair in wanted}
    run_missing(args, [(*pair, rates[pair], seed) for seed in args.seeds for pair in wanted])
    rows = results.read_rows(args.results)
    for pair in pairs:  # the others at the chosen rate, or where none was chosen at the best
        rates[pair] = rates.get(pair) or results.best_rate(rows, choose_at(*pair))
        rates[pair] = rates[pair] or results.best_rate(rows, pair)
    chosen = results.chosen_runs(rows, rates)
    folders = {pair: folder_of(*pair, rates[pair], 0) for pair in chosen}
    results.report(chosen, folders, args.results)


if __name__ == "__main__":
    launch(main)
