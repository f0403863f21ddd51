"""experiments.py: table and figures follow from results.csv; a run in it is not repeated."""

import json
import shutil

import pytest
from PIL import Image

import experiments
from cli import ROOT
from experiments import FIELDS, Setting
from inputs.errors import UserError

RECO, NAME = "ClassMix + ReCo", "street, 20 labels, paper"
TINY = "--channels 16 --crop-size 48 --batch-size 2 --num-labeled 2"


def line(method: str, lr: str, seed: int, validation: float, test: float, setting=NAME) -> dict:
    scores = {
        "validation miou": f"{validation}",
        "test miou": f"{test}",
        "test boundary iou": "0.2",
    }
    curve = {"curve": f"250:{validation / 2} 500:{validation}", "seconds": "120"}
    head = {"setting": setting, "method": method, "lr": lr, "seed": str(seed)}
    return dict.fromkeys(FIELDS, "") | head | scores | curve


ROWS = [
    line(RECO, "0.1", 0, 0.50, 0.60),
    line(RECO, "0.2", 0, 0.55, 0.52),  # better on validation, though not on the test images
    line(RECO, "0.2", 2, 0.50, 0.56),
    line(RECO, "0.2", 1, 0.50, 0.54),
    line("ClassMix", "0.1", 0, 0.40, 0.45),
    line("random queries, active keys", "0.1", 0, 0.9, 0.9, "camvid, 20 labels, paper"),
    line("random queries, active keys", "0.2", 0, 0.2, 0.33, "camvid, 20 labels, paper"),
    line(RECO, "0.1", 0, 0.30, 0.30, "camvid, 20 labels, paper"),
    line(RECO, "0.2", 0, 0.35, 0.31, "camvid, 20 labels, paper"),
    line(RECO, "0.1", 0, 0.99, 0.99, "camvid, 5 labels, paper"),
    line(RECO, "0.2", 0, 0.25, 0.21, "camvid, 5 labels, paper"),
    line("supervised", "0.1", 0, 0.5, 0.5, "a setting of the past"),
]


def chosen_runs() -> dict:
    pairs = [(n, m) for n, setting in experiments.SETTINGS.items() for m in setting.methods]
    choose_at = experiments.choose_at
    return experiments.chosen_runs(
        ROWS, {p: experiments.best_rate(ROWS, choose_at(*p)) for p in pairs}
    )


def test_the_rate_is_chosen_on_validation_images_at_seed_0():
    chosen = chosen_runs()
    assert [(r["lr"], r["seed"]) for r in chosen[NAME, RECO]] == [("0.2", s) for s in "012"]
    ablation = chosen["camvid, 20 labels, paper", "random queries, active keys"]
    assert [row["test miou"] for row in ablation] == ["0.33"]  # at the rate of ClassMix + ReCo
    five = chosen["camvid, 5 labels, paper", RECO]
    assert [row["test miou"] for row in five] == ["0.21"]  # at the rate of 20 labels
    assert all("past" not in name for name, _ in chosen)


def test_tables_have_mean_and_range_and_say_how_many_seeds():
    lines = experiments.make_tables(chosen_runs()).splitlines()
    assert "|  | ClassMix | ClassMix + ReCo | random queries, active keys |" in lines
    assert f"| {NAME} | 45.0 (45.0 to 45.0), n = 1 | 54.0 (52.0 to 56.0) |  |" in lines
    cells = "| 54.0 (52.0 to 56.0) | 20.0 (20.0 to 20.0) | 2 |"
    assert f"| {NAME} | {RECO} | 0.2 {cells}" in lines


def test_rows_are_written_and_read_as_they_are(tmp_path):
    for row in ROWS:
        experiments.add_row(tmp_path, row.values())
    assert experiments.read_rows(tmp_path) == ROWS
    assert experiments.read_rows(tmp_path / "nothing") == []


def test_curves_are_grouped_by_setting_method_and_step():
    panels = experiments.curves(ROWS)
    assert panels[NAME]["ClassMix"] == {250: [20.0], 500: [40.0]}
    # the other method has three seeds; only the one that both have is compared
    assert panels[NAME][RECO] == {250: [pytest.approx(27.5)], 500: [pytest.approx(55.0)]}


def test_test_scores_are_grouped_by_method_and_labels():
    rows = [row | {"lr": "0.04"} for row in ROWS if row["lr"] == "0.2" and row["method"] == RECO]
    assert experiments.label_curve(rows) == {"CamVid": {RECO: {5: [21.0], 20: [31.0]}}}
    assert experiments.label_curve([]) == {}


def test_command_lines_name_what_decides_the_result():
    name = "camvid, 20 labels, paper, 8 labelled a step"
    words = experiments.arguments_of(name.removesuffix(", 8 labelled a step"), "supervised", 0.2, 1)
    assert words[0] == "train_supervised.py" and "--labeled-batch-size" not in words
    semi = experiments.arguments_of(name, RECO, 0.2, 1)
    assert semi[:2] == ["train_semi.py", "--reco"]
    assert "--labeled-batch-size 8 --lr 0.2 --seed 1" in " ".join(semi)


def test_figures_of_the_committed_results(tmp_path, monkeypatch):
    shutil.copy(ROOT / "docs" / "results.csv", tmp_path)
    for name, width in (("curves", 1300), ("labels", 400)):
        command = ["experiments.py", "--results", str(tmp_path), "--figure", name]
        monkeypatch.setattr("sys.argv", command)
        experiments.main()
        assert Image.open(tmp_path / f"{name}.png").width > width
    rows = experiments.read_rows(tmp_path)
    assert {row["machine"] for row in rows} == {"CPU core", "H100", "H200"}
    monkeypatch.setattr("sys.argv", [*command[:-1], "camvid"])
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    with pytest.raises(UserError, match="camvid-20-labels-paper-supervised-lr0"):
        experiments.main()
    (tmp_path / "results.csv").unlink()
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match=r"results.csv has no run for labels.png"):
        experiments.main()


def test_a_run_is_made_once_and_reported(tmp_path, monkeypatch):
    methods = ["supervised", RECO]
    tiny = Setting(f"{TINY} --iterations 2 --val-interval 2", (0.1, 0.2), methods)
    monkeypatch.setattr(experiments, "SETTINGS", {NAME: tiny})
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    command = ["experiments.py", "--results", str(tmp_path), "--seeds", "0"]
    monkeypatch.setattr("sys.argv", [*command, "--methods", "supervised", "--lr", "0.2"])
    experiments.main()
    (row,) = experiments.read_rows(tmp_path)
    assert row["curve"].split(":")[0] == "2" and 0 < float(row["test miou"]) < 1
    assert "--iterations 2" in row["arguments"] and str(tmp_path) not in row["arguments"]
    mean = f"{100 * float(row['test miou']):.1f}"
    assert f"| {NAME} | {mean} ({mean} to {mean}), n = 1 |" in (tmp_path / "tables.md").read_text()
    assert row["machine"] == "CPU core" and row["commit"]
    monkeypatch.setattr(experiments, "MAIN", ["supervised"])
    experiments.FIGURES["streets"](None, tmp_path / "streets.png")
    assert Image.open(tmp_path / "streets.png").width > 1000

    folder = experiments.folder_of(NAME, "supervised", 0.2, 0)
    tested = json.loads((folder / "evaluation-test.json").read_text())
    assert tested["options"]["split"] == "test" and tested["images"] == 500

    before = (tmp_path / "results.csv").read_bytes()
    monkeypatch.setattr(experiments, "measure", None)  # nothing is left to be run
    experiments.main()
    assert (tmp_path / "results.csv").read_bytes() == before


def test_the_table_shows_what_was_asked_for(tmp_path, monkeypatch):
    """Also if no run chose the rate, and if another rate is better."""
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")

    def measure(args, job):
        words = " ".join(experiments.arguments_of(*job))
        row = line(job[1], str(job[2]), job[3], 0.3, 0.321, job[0]) | {"arguments": words}
        experiments.add_row(args.results, row.values())

    monkeypatch.setattr(experiments, "measure", measure)
    command = ["experiments.py", "--results", str(tmp_path)]

    def table(*words) -> str:
        monkeypatch.setattr("sys.argv", [*command, *words])
        experiments.main()
        return (tmp_path / "tables.md").read_text()

    ablation = "random queries, random keys"
    assert ablation in table(
        "--only", "camvid, 20 labels, paper", "--lr", "0.3", "--seeds", "1", "--methods", ablation
    )
    assert "camvid, 5 labels, paper" in table(
        "--only", "camvid, 5 labels, paper", "--lr", "0.3", "--seeds", "1"
    )
    better = line(RECO, "0.2", 0, 0.9, 0.9)
    experiments.add_row(tmp_path, better.values())
    experiments.add_row(tmp_path, line("ClassMix", "0.2", 0, 0.9, 0.9).values())
    shown = table("--only", NAME, "--lr", "0.3", "--seeds", "0", "--methods", RECO)
    assert f"| {NAME} | {RECO} | 0.3 | 32.1 (32.1 to 32.1), n = 1 |" in shown
    assert "ClassMix |" not in shown and "camvid" not in shown  # which was not asked for


@pytest.mark.parametrize("name, cached", [(NAME, False), ("camvid, 20 labels, paper", True)])
def test_images_are_decoded_once_for_all_runs(name, cached, tmp_path, monkeypatch):
    commands = []

    def run_script(*words):
        commands.append(" ".join(map(str, words)))
        raise UserError("not run")

    monkeypatch.setattr(experiments, "run_script", run_script)
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    for seed in range(2):
        with pytest.raises(UserError):
            experiments.measure(None, (name, RECO, 0.2, seed))
    assert [f"--cache-dir {tmp_path / 'cache'}" in command for command in commands] == 2 * [cached]
    assert all("cache" not in word for word in experiments.arguments_of(name, RECO, 0.2, 0))


def test_a_failure_is_reported(tmp_path, monkeypatch):
    broken = Setting("--backbone no_such_network", (0.2,), ["supervised"])
    monkeypatch.setattr(experiments, "SETTINGS", {NAME: broken})
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setattr("sys.argv", ["experiments.py", "--results", str(tmp_path)])
    with pytest.raises(UserError, match=r"train_supervised.py.*failed.*no_such_network"):
        experiments.main()
    monkeypatch.setattr("sys.argv", ["experiments.py", "--only", NAME, "p7"])
    with pytest.raises(UserError, match="p7: is none of"):
        experiments.main()
    monkeypatch.setattr("sys.argv", ["experiments.py", "--only", NAME, "--methods", "CutMix"])
    with pytest.raises(UserError, match="CutMix: none of them is run in street"):
        experiments.main()
