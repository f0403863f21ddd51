"""The paper's claims on the embedded streets, measured: methods, label budgets, partial labels, sampling; three seeds each.

    python experiments.py                            # the table: what is missing of it, a run per core with one thread each; stop and go on at will
    python experiments.py --only "20 labels, long"   # a part of it, or something beyond it; also --only "ClassMix + ReCo" or "p0: supervised"
    python experiments.py --list                     # what it would run, and what is there
    python experiments.py --results docs             # go on from the committed results, and write there

Same split, same first weights and same number of steps per seed for every method. The learning rate of a method is chosen among two or three by
the validation scenes at seed 0; the table is measured on the test scenes. Supervised runs report the student, the others the teacher, each the
best of its validations. Every finished run is a line of results.csv, and is not run again; the folder holds besides results.md and, with
matplotlib installed, curves.png; streets.png shows images, truth and predictions.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import evaluate
import processes
import run
import transforms
from errors import need

SEEDS, RUNS, HANDWRITING = (0, 1, 2), Path("runs/experiments"), "dataset/handwriting"
RECO = ["train_semi.py", "--reco"]
METHODS = {
    "supervised": ["train_supervised.py"],
    "supervised + ReCo": ["train_supervised.py", "--reco"],
    "CutMix": ["train_semi.py", "--mixing-strategy", "cutmix"],
    "ClassMix": ["train_semi.py"],
    "ClassMix + ReCo": RECO,
}
MAIN = ["supervised", "ClassMix", "ClassMix + ReCo"]
VARIANTS = {  # of ClassMix + ReCo, at its rate
    "random queries, random keys": [*RECO, "--reco-random-queries", "--reco-random-keys"],
    "random queries, active keys": [*RECO, "--reco-random-queries"],
    "active queries, random keys": [*RECO, "--reco-random-keys"],
    "32 queries": [*RECO, "--reco-num-queries", "32"],
    "32 negatives": [*RECO, "--reco-num-negatives", "32"],
    "independent draws": [*RECO, "--reco-sampling", "independent"],
    "teacher keys": [
        *RECO,
        "--reco-variant",
        "teacher-keys",
    ],  # these three after `git apply docs/variants.patch`
    "moving-average prototypes": [*RECO, "--reco-variant", "moving-prototypes"],
    "weighted negatives": [*RECO, "--reco-variant", "weighted-negatives"],
    "separate passes": RECO,  # without --joint-forward, as train_semi.py does by default
}
# How long, with which network, and the rates to choose from. LIGHT, half the width and half the batch of the quick start, is what the command runs by itself:
# its runs fit into two hours on two slow cores. It alone passes labelled and unlabelled images through the student together (README, "How it works":
# it costs mIoU; "separate passes" shows how much).
SMALL = ["--channels", "32", "--low-channels", "16"]
LIGHT = dict(
    steps=1000,
    rates=(0.1, 0.2),
    network=SMALL,
    script={
        "train_semi.py": ["--batch-size", "4", "--joint-forward"],
        "train_supervised.py": ["--batch-size", "8"],
    },
)
LONG = dict(
    steps=2000,
    rates=(0.1, 0.2),
    network=[*SMALL, "--crop-size", "48"],
    script={"train_semi.py": ["--batch-size", "4"], "train_supervised.py": ["--batch-size", "8"]},
)
SPARSE = LONG | dict(rates=(0.05, 0.1, 0.2))  # few labelled pixels in a batch: noisier gradients
HAND = dict(
    steps=2000,
    rates=(0.2, 0.4),
    network=["--num-workers", "0"],
    script={"train_semi.py": ["--warmup-iterations", "600"]},
)
HAND_LIGHT = dict(
    steps=2000,
    rates=(0.2, 0.4),
    network=[*SMALL, "--crop-size", "48", "--num-workers", "0"],  # the teacher starts late
    script={
        "train_semi.py": ["--batch-size", "4", "--warmup-iterations", "600"],
        "train_supervised.py": ["--batch-size", "8"],
    },
)
QUICK = dict(
    steps=3000, rates=(0.2, 0.4), network=[], script={}
)  # the quick start's own network, batch and length
BEYOND = ["independent draws", "teacher keys", "moving-average prototypes", "weighted negatives"]
DIGITS = [
    "--dataset",
    "folder",
    "--data-path",
    HANDWRITING,
    "--recipe",
    "street",
    "--num-labeled",
    "60",
]
SETTINGS = {  # the labels, the methods compared on them, how, and the setting whose choice of the rate holds here
    "20 labels": (["--num-labeled", "20"], [*METHODS, *VARIANTS], LIGHT, "20 labels"),
    "100 labels": (["--num-labeled", "100"], list(METHODS), LIGHT, "20 labels"),
    "p0": (["--label-ratio", "p0"], MAIN, LIGHT, "p0"),
    "p5": (["--label-ratio", "p5"], [*MAIN, *BEYOND], LIGHT, "p0"),
    "20 labels, long": (["--num-labeled", "20"], MAIN, LONG, "20 labels, long"),
    "100 labels, long": (["--num-labeled", "100"], MAIN, LONG, "20 labels, long"),
    "p0, long": (["--label-ratio", "p0"], MAIN, SPARSE, "p0, long"),
    "p5, long": (["--label-ratio", "p5"], MAIN, SPARSE, "p0, long"),
    "20 labels, quick start": (["--num-labeled", "20"], MAIN, QUICK, "20 labels, quick start"),
    "handwriting": (DIGITS, MAIN, HAND, "handwriting"),
    "handwriting, light": (DIGITS, MAIN, HAND_LIGHT, "handwriting, light"),
}
SCENES = "20 labels, quick start"  # the setting that streets.png shows
PAIRS = [(setting, method) for setting, (_, methods, *_) in SETTINGS.items() for method in methods]
FIELDS = [
    "setting",
    "method",
    "lr",
    "seed",
    "purpose",
    "validation miou",
    "test miou",
    "test boundary iou",
    "steps to 90 % of ClassMix",
    "seconds",
    "curve",
    "arguments",
]
LOCK = threading.Lock()


def arguments_of(setting: str, method: str, rate: float, seed: int) -> list[str]:
    (script, *options), (labels, _, how, _) = (
        METHODS.get(method) or VARIANTS[method],
        SETTINGS[setting],
    )
    own = [
        word
        for word in how["script"].get(script, [])
        if not (word == "--joint-forward" and method == "separate passes")
    ]
    return [
        script,
        *options,
        *labels,
        *how["network"],
        *own,
        "--lr",
        f"{rate:g}",
        "--seed",
        str(seed),
        "--iterations",
        str(how["steps"]),
        "--val-interval",
        "250",
        "--log-with",
        "none",
    ]


def tuned_on(setting: str, method: str) -> tuple[str, str]:
    """Where the rate of a method is chosen. A variant takes that of ReCo."""
    return SETTINGS[setting][3], method if method in METHODS else "ClassMix + ReCo"


def folder_of(setting: str, method: str, rate: float, seed: int) -> Path:
    return RUNS / f"{setting}-{method}-lr{rate:g}-seed{seed}".replace(" ", "").replace(",", "")


def measure(results: Path, setting: str, method: str, rate: float, seed: int) -> dict:
    """The line of results.csv of a run, which is trained and evaluated on the test scenes unless the line is there already."""
    words = arguments_of(setting, method, rate, seed)
    known = {row["arguments"]: row for row in read_results(results)}
    if " ".join(words) in known:
        return known[" ".join(words)]
    folder, begun = folder_of(setting, method, rate, seed), time.monotonic()
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",  # and let malloc keep what a step frees: the next one needs it (6 % faster)
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**31),
        "MALLOC_TOP_PAD_": str(2**26),
    }
    goes_on = (folder / "config.json").exists()
    for command in (
        [*words, "--out-dir", folder, *(["--resume"] if goes_on else [])],
        ["evaluate.py", folder, "--split", "test", "--num-workers", "0", "--batch-size", "50"],
    ):
        done = subprocess.run(
            [sys.executable, *map(str, command)], env=env, capture_output=True, text=True
        )
        need(
            not done.returncode,
            f"{' '.join(map(str, command))}: failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}",
        )
    history, test = (
        json.loads((folder / "history.json").read_text()),
        json.loads((folder / "evaluation-test.json").read_text()),
    )
    row = {
        "setting": setting,
        "method": method,
        "lr": f"{rate:g}",
        "seed": str(seed),
        "validation miou": f"{max(h['miou'] for h in history):.4f}",
        "test miou": f"{test['miou']:.4f}",
        "test boundary iou": f"{test['boundary_iou']:.4f}",
        "seconds": "" if goes_on else str(round(time.monotonic() - begun)),
        "curve": " ".join(f"{h['step']}:{h['miou']:.4f}" for h in history),
        "arguments": " ".join(words),
    }
    with LOCK:  # two runs may end together
        write_results(results, [*read_results(results), row])
    return row


def read_results(results: Path) -> list[dict]:
    file = results / "results.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def write_results(results: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run.write(results / "results.csv", lambda file: file.write(text.getvalue().encode()))


def curve_of(row: dict) -> dict[int, float]:
    """Validation mIoU by step."""
    return {
        int(step): float(value)
        for step, value in (point.split(":") for point in row["curve"].split())
    }


def main() -> None:
    parser = run.Parser(description=__doc__, formatter_class=run.Formatter)
    parser.add_argument(
        "--only",
        metavar="TEXT",
        nargs="+",
        help="settings, methods, or pairs as --list prints them",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RUNS,
        metavar="DIR",
        help="where results.csv and the figures are; runs that stand in it are not run again",
    )
    parser.add_argument(
        "--jobs", type=run.positive, default=os.cpu_count(), help="runs at a time, one thread each"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the comparisons with the number of runs that are there, and stop",
    )
    args = parser.parse_args()
    wanted = [
        pair
        for pair in PAIRS
        if (
            {*pair, ": ".join(pair)} & set(args.only)
            if args.only
            else SETTINGS[pair[0]][2] is LIGHT and pair[1] in METHODS
        )
    ]
    need(
        wanted,
        f"--only {' '.join(args.only or [])}: fits none of {', '.join(map(': '.join, PAIRS))}",
    )
    retired = next(
        (
            pair
            for row in read_results(args.results)
            if (pair := (row["setting"], row["method"])) not in PAIRS
        ),
        None,
    )
    need(
        not retired,
        f"{args.results / 'results.csv'}: holds runs of {': '.join(retired or ())}, which is no setting any more; remove these lines",
    )
    tuned = sorted({tuned_on(*pair) for pair in wanted}, key=PAIRS.index)
    if args.list:
        there = [(row["setting"], row["method"]) for row in read_results(args.results)]
        print(
            "\n".join(
                f"{': '.join(pair):50s} {there.count(pair)} of {len(SEEDS) + (len(SETTINGS[pair[0]][2]['rates']) - 1) * (pair in tuned)} runs"
                for pair in wanted
            )
        )
        return
    if (
        any(HANDWRITING in SETTINGS[setting][0] for setting, _ in wanted)
        and not Path(HANDWRITING).exists()
    ):
        subprocess.run([sys.executable, "examples/handwriting.py", HANDWRITING], check=True)
    jobs = [(*pair, rate, 0) for pair in tuned for rate in SETTINGS[pair[0]][2]["rates"]]
    bar = tqdm(total=len(jobs) + len(wanted) * len(SEEDS), unit="run")

    def one(job) -> None:
        measure(args.results, *job)
        bar.update()

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(one, jobs))
            best = best_rates(read_results(args.results))
            list(
                pool.map(
                    one, [(*pair, best[tuned_on(*pair)], seed) for pair in wanted for seed in SEEDS]
                )
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    bar.close()
    report(args.results)


def best_rates(rows: list[dict]) -> dict[tuple[str, str], float]:
    """For each (setting, method) that was tuned the rate with the best validation mIoU at seed 0."""
    first = sorted(
        (row for row in rows if row["seed"] == "0"), key=lambda row: float(row["validation miou"])
    )
    return {(row["setting"], row["method"]): float(row["lr"]) for row in first}


def report(results: Path) -> None:
    """Write results.csv with what only the whole tells (purpose, steps to 90 % of ClassMix), results.md and the pictures."""
    rows = read_results(results)
    best = best_rates(rows)
    for row in rows:
        row["purpose"] = (
            "table"
            if float(row["lr"]) == best[tuned_on(row["setting"], row["method"])]
            else "choice of the rate"
        )
    table = {
        (row["setting"], row["method"], row["seed"]): row
        for row in rows
        if row["purpose"] == "table"
    }
    for row in rows:  # how soon a run is where ClassMix of the same seed ends
        ends = table.get((row["setting"], "ClassMix", row["seed"]))
        if ends and row["curve"] and ends["curve"]:
            goal = 0.9 * list(curve_of(ends).values())[-1]
            row["steps to 90 % of ClassMix"] = next(
                (step for step, value in curve_of(row).items() if value >= goal), "never"
            )
    write_results(
        results,
        sorted(
            rows,
            key=lambda row: (PAIRS.index((row["setting"], row["method"])), row["lr"], row["seed"]),
        ),
    )

    lines = [
        "Test mIoU, mean and range of the seeds; below, every mean with its rate and boundary IoU.",
        "",
        *pivot(table, SETTINGS, METHODS),
        "",
        *pivot(table, ["ClassMix + ReCo", *VARIANTS], ["20 labels", "p5"]),
        "",
        "| setting | method | rate | seeds | test mIoU | boundary IoU | steps to 90 % of ClassMix |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting, method in PAIRS:
        runs = [
            table[setting, method, str(seed)]
            for seed in SEEDS
            if (setting, method, str(seed)) in table
        ]
        if runs:
            lines.append(
                f"| {setting} | {method} | {runs[0]['lr']} | {len(runs)} | {spread(runs, 'test miou')} | {spread(runs, 'test boundary iou')} | "
                f"{', '.join(str(row['steps to 90 % of ClassMix']) for row in runs)} |"
            )
    (results / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw_curves(results, table)
    draw_streets(
        results,
        {
            method: float(table[SCENES, method, "0"]["lr"])
            for method in MAIN
            if (SCENES, method, "0") in table
        },
    )


def pivot(table: dict, rows, columns) -> list[str]:
    """Mean test mIoU of what has been run with all seeds. `rows` and `columns`: settings and methods, or methods and settings."""
    cells = {
        frozenset(pair): spread(runs, "test miou")
        for pair in PAIRS
        if len(runs := [row for key, row in table.items() if key[:2] == pair]) == len(SEEDS)
    }
    rows = [r for r in rows if any(frozenset((r, c)) in cells for c in columns)]
    columns = [c for c in columns if any(frozenset((r, c)) in cells for r in rows)]
    if not rows:
        return []
    lines = [
        ["", *columns],
        ["---"] * (1 + len(columns)),
        *([r, *(cells.get(frozenset((r, c)), "") for c in columns)] for r in rows),
    ]
    return [f"| {' | '.join(line)} |" for line in lines]


def spread(runs: list[dict], field: str) -> str:
    values = [100 * float(row[field]) for row in runs]
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def draw_curves(results: Path, table: dict) -> None:
    """curves.png: validation mIoU over the steps for each setting, mean and range of the seeds, of what has been run with all of them."""
    try:
        import matplotlib
    except ImportError:
        return print("no figure of the curves: pip install matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    curves = {
        (s, m): runs
        for s in SETTINGS
        for m in METHODS
        if len(
            runs := [
                curve_of(row) for key, row in table.items() if key[:2] == (s, m) and row["curve"]
            ]
        )
        == len(SEEDS)
    }
    settings = list(dict.fromkeys(s for s, _ in curves))
    if not settings:
        return
    columns = min(4, len(settings))
    rows = -(-len(settings) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(4 * columns, 3.6 * rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(settings) :]:
        axis.axis("off")
    for axis, setting in zip(axes.flat, settings):
        for colour, method in enumerate(METHODS):
            if runs := curves.get((setting, method)):
                steps = sorted(set.intersection(*map(set, runs)))
                values = [[100 * curve[step] for curve in runs] for step in steps]
                axis.plot(steps, [statistics.mean(v) for v in values], color=f"C{colour}")
                axis.fill_between(
                    steps,
                    [min(v) for v in values],
                    [max(v) for v in values],
                    alpha=0.15,
                    color=f"C{colour}",
                )
        axis.set(title=setting, xlabel="step")
        axis.grid(alpha=0.3)
    for left in axes[:, 0]:
        left.set_ylabel("validation mIoU (mean, range of seeds)")
    figure.legend(
        handles=[
            Line2D([], [], color=f"C{colour}", label=method)
            for colour, method in enumerate(METHODS)
        ],
        loc="outside lower center",
        ncols=len(METHODS),
    )
    figure.savefig(results / "curves.png", dpi=110, bbox_inches="tight")


@torch.no_grad()
def draw_streets(results: Path, rates: dict[str, float], scenes=(3, 11, 24, 42, 57, 80)) -> None:
    """streets.png: image, truth and the prediction of each method (seed 0) of some test scenes."""
    if not rates:
        return
    source, networks = data.load_source("street", None), []
    for method, rate in rates.items():
        folder = folder_of(SCENES, method, rate, 0)
        if not (folder / "model.safetensors").exists():
            return print(f"no picture of the scenes: {folder} is not there")
        networks.append(run.build_model(run.read_config(folder)).eval())
        networks[-1].load_state_dict(run.read_weights(folder / "model.safetensors"))
    columns = []
    for i in scenes:
        image, label = source.read(source.test[i])
        predictions = [
            evaluate.predict_probabilities(network, transforms.to_float(image[None], "cpu")).argmax(
                dim=1
            )[0]
            for network in networks
        ]
        pictures = [
            run.panel(p, height=160)
            for p in (image, *(run.paint(x, source.palette) for x in (label, *predictions)))
        ]
        columns.append(torch.cat(pictures, dim=1))
    Image.fromarray(torch.cat(columns, dim=2).permute(1, 2, 0).numpy()).save(
        results / "streets.png"
    )


if __name__ == "__main__":
    processes.launch(main)
