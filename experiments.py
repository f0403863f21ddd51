"""The paper's comparisons on the embedded streets, measured: methods, label budgets, partial labels, at three seeds each.

    python experiments.py                        # everything that is missing, two runs at a time with one thread each; stop and go on at will
    python experiments.py --only "20 labels"     # a part of it; also --only "ClassMix + ReCo" or --only "p0: supervised"
    python experiments.py --list                 # what it would run

Same split, same first weights and same number of steps per seed for every method. The learning rate of each method and setting is chosen among
RATES by the validation scenes at seed 0; the table is measured on the test scenes. Supervised runs report the student, the others the teacher, each
the best of its validations. Writes docs/results.csv (every run, those of the choice of the rate too), docs/results.md and, with matplotlib installed,
docs/curves.png; docs/streets.png shows images, truth and predictions.
"""
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import evaluate
import run

STEPS, INTERVAL, SEEDS, RATES = 1500, 250, (0, 1, 2), (0.2, 0.4)
RUNS, DOCS = Path("runs/experiments"), Path("docs")
METHODS = {
    "supervised": ["train_supervised.py"],
    "supervised + ReCo": ["train_supervised.py", "--reco"],
    "CutMix": ["train_semi.py", "--mixing-strategy", "cutmix"],
    "ClassMix": ["train_semi.py"],
    "ClassMix + ReCo": ["train_semi.py", "--reco"],
}
SETTINGS = {  # the labels, and the methods compared on them
    "20 labels": (["--num-labeled", "20"], list(METHODS)),
    "100 labels": (["--num-labeled", "100"], list(METHODS)),
    "p0": (["--label-ratio", "p0"], ["supervised", "ClassMix", "ClassMix + ReCo"]),
    "p5": (["--label-ratio", "p5"], ["supervised", "ClassMix", "ClassMix + ReCo"]),
}
FIELDS = ["setting", "method", "lr", "seed", "purpose", "validation miou", "test miou", "test boundary iou", "steps to 90 % of ClassMix", "seconds", "arguments"]


def folder_of(setting: str, method: str, rate: float, seed: int) -> Path:
    return RUNS / f"{setting}-{method}-lr{rate:g}-seed{seed}".replace(" ", "")


def train(setting: str, method: str, rate: float, seed: int) -> dict:
    """One run with its evaluation on the test scenes, unless it is there already. Returns its row of the CSV."""
    folder = folder_of(setting, method, rate, seed)
    script, *options = METHODS[method]
    words = [*options, *SETTINGS[setting][0], "--lr", f"{rate:g}", "--seed", str(seed), "--iterations", str(STEPS), "--val-interval", str(INTERVAL), "--log-with", "none"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    begun, clock, arguments = time.monotonic(), folder / "seconds.json", " ".join([script, *words])
    measured = json.loads(clock.read_text()) if clock.exists() else {"arguments": arguments, "seconds": 0}
    if measured["arguments"] != arguments:
        raise data.UserError(f"{folder}: was measured with other arguments ({measured['arguments']}); move it away")
    if not (folder / "evaluation-test.json").exists():
        resume = ["--resume"] if (folder / "config.json").exists() else []
        for command in ([script, *words, "--out-dir", folder, *resume], ["evaluate.py", folder, "--split", "test", "--num-workers", "0", "--batch-size", "50"]):
            done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True)
            if done.returncode:
                raise data.UserError(f"{' '.join(map(str, command))}: failed: {done.stderr.strip().splitlines()[-1]}")
            measured["seconds"] += time.monotonic() - begun
            begun = time.monotonic()
            run.write_json(clock, measured)
    history, test = json.loads((folder / "history.json").read_text()), json.loads((folder / "evaluation-test.json").read_text())
    return {"setting": setting, "method": method, "lr": rate, "seed": seed, "validation miou": max(h["miou"] for h in history), "test miou": test["miou"],
            "test boundary iou": test["boundary_iou"], "seconds": round(measured["seconds"]), "arguments": arguments, "history": history}


def main() -> None:
    parser = run.Parser(description=__doc__, formatter_class=run.Formatter)
    parser.add_argument("--only", metavar="TEXT", nargs="+", help="settings, methods, or pairs as --list prints them")
    parser.add_argument("--jobs", type=run.positive, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    args = parser.parse_args()
    pairs = [(setting, method) for setting, (_, methods) in SETTINGS.items() for method in methods
             if not args.only or {setting, method, f"{setting}: {method}"} & set(args.only)]
    if not pairs:
        raise data.UserError(f"--only {' '.join(args.only)}: fits none of {', '.join(f'{s}: {m}' for s, (_, ms) in SETTINGS.items() for m in ms)}")
    if args.list:
        print("\n".join(f"{setting}: {method}" for setting, method in pairs), f"\neach at rates {RATES} (seed 0), then at the best one for seeds {SEEDS}")
        return
    rows, bar = [], tqdm(total=len(pairs) * (len(RATES) + len(SEEDS) - 1), unit="run")

    def measure(job) -> dict:
        row = train(*job)
        bar.update()
        return row
    with ThreadPoolExecutor(args.jobs) as pool:
        tuning = list(pool.map(measure, [(*pair, rate, 0) for pair in pairs for rate in RATES]))
        best = {pair: max((r for r in tuning if (r["setting"], r["method"]) == pair), key=lambda r: r["validation miou"])["lr"] for pair in pairs}
        final = list(pool.map(measure, [(*pair, best[pair], seed) for pair in pairs for seed in SEEDS if seed]))
    bar.close()
    for row in tuning + final:
        row["purpose"] = "table" if row["lr"] == best[row["setting"], row["method"]] else "choice of the rate"
        rows.append(row)
    table = [r for r in rows if r["purpose"] == "table"]
    for row in rows:  # how soon a run is where ClassMix ends
        ends = [r["history"][-1]["miou"] for r in table if (r["setting"], r["method"], r["seed"]) == (row["setting"], "ClassMix", row["seed"])]
        row["steps to 90 % of ClassMix"] = next((h["step"] for h in row["history"] if h["miou"] >= 0.9 * ends[0]), "") if ends else ""
    write_results(rows, table, pairs)


def spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def write_results(rows: list[dict], table: list[dict], pairs: list) -> None:
    DOCS.mkdir(exist_ok=True)
    with open(DOCS / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, **{k: f"{row[k]:.4f}" for k in FIELDS if "iou" in k}} for row in rows)
    lines = ["| setting | method | rate | test mIoU | boundary IoU | steps to 90 % of ClassMix |", "|---|---|---|---|---|---|"]
    for pair in pairs:
        runs = [r for r in table if (r["setting"], r["method"]) == pair]
        steps = [r["steps to 90 % of ClassMix"] for r in runs]
        lines.append(f"| {pair[0]} | {pair[1]} | {runs[0]['lr']:g} | {spread([r['test miou'] for r in runs])} | {spread([r['test boundary iou'] for r in runs])} | "
                     f"{', '.join(str(s) if s else 'never' for s in steps)} |")
    (DOCS / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    setting = pairs[0][0]
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        print("no figure of the curves: pip install matplotlib")
    else:
        pyplot.figure(figsize=(7, 4))
        for method in [m for s, m in pairs if s == setting]:
            runs = [r["history"] for r in table if (r["setting"], r["method"]) == (setting, method)]
            steps = [h["step"] for h in runs[0]]
            values = [[100 * history[i]["miou"] for history in runs] for i in range(len(steps))]
            line, = pyplot.plot(steps, [statistics.mean(v) for v in values], label=method)
            pyplot.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
        pyplot.xlabel("step")
        pyplot.ylabel("validation mIoU (mean and range of seeds)")
        pyplot.title(f"streets, {setting}")
        pyplot.legend()
        pyplot.grid(alpha=0.3)
        pyplot.savefig(DOCS / "curves.png", dpi=120, bbox_inches="tight")
    draw_streets(setting, table, [m for s, m in pairs if s == setting and m in ("supervised", "ClassMix", "ClassMix + ReCo")])


@torch.no_grad()
def draw_streets(setting: str, table: list[dict], methods: list[str], scenes=(3, 11, 24, 42, 57, 80)) -> None:
    """docs/streets.png: rows image, truth and each method's prediction (seed 0) of some test scenes."""
    source = data.load_source("street", None)
    networks = [run.build_model(run.read_config(folder)) for folder in (folder_of(setting, m, next(r["lr"] for r in table if (r["setting"], r["method"]) == (setting, m)), 0)
                                                                        for m in methods)]
    for network, method in zip(networks, methods):
        rate = next(r["lr"] for r in table if (r["setting"], r["method"]) == (setting, method))
        network.load_state_dict(run.read_weights(folder_of(setting, method, rate, 0) / "model.safetensors"))
        network.eval()
    columns = []
    for i in scenes:
        image, label = source.read(source.test[i])
        predictions = [evaluate.predict_probabilities(network, data.to_float(image[None], "cpu")).argmax(dim=1)[0] for network in networks]
        pictures = [run.panel(p, height=160) for p in (image, *(run.paint(x, source.palette) for x in (label, *predictions)))]
        columns.append(torch.cat(pictures, dim=1))
    Image.fromarray(torch.cat(columns, dim=2).permute(1, 2, 0).numpy()).save(DOCS / "streets.png")


if __name__ == "__main__":
    run.launch(main)
