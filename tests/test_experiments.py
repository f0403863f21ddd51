"""experiments.py in short: a run is measured once, tables and pictures follow from results.csv."""

import csv

import pytest

import experiments
from errors import UserError
from run import read_config

SETTING = "20 labels"
ONLY = [f"{SETTING}: ClassMix + ReCo"]


def test_measures_resumes_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(experiments.LIGHT, "steps", 2)
    monkeypatch.setitem(experiments.LIGHT, "rates", (0.2,))
    monkeypatch.setattr(experiments, "SEEDS", (0,))
    monkeypatch.setattr(experiments, "SCENES", SETTING)
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(
        "sys.argv", ["experiments.py", "--results", str(tmp_path / "results"), "--only", *ONLY]
    )
    experiments.main()
    file = tmp_path / "results" / "results.csv"
    rows = list(csv.DictReader(file.open()))
    assert [f"{row['setting']}: {row['method']}" for row in rows] == ONLY
    for row in rows:
        assert (
            row["purpose"] == "table"
            and 0 < float(row["test miou"]) < 1
            and 0 < float(row["test boundary iou"]) < 1
            and int(row["seconds"]) > 0
        )
        assert [point.split(":")[0] for point in row["curve"].split()] == [
            "2"
        ] and "--iterations 2" in row["arguments"]
    assert read_config(experiments.folder_of(SETTING, "ClassMix + ReCo", 0.2, 0))["arguments"][
        "joint_forward"
    ]
    variant = experiments.arguments_of(SETTING, "active queries, random keys", 0.2, 0)
    assert [word for word in variant if word not in rows[0]["arguments"].split()] == [
        "--reco-random-keys"
    ]
    assert (
        tmp_path / "results" / "streets.png"
    ).stat().st_size > 10_000 and f"| {SETTING} | ClassMix + ReCo | 0.2 | 1 |" in (
        report := (tmp_path / "results" / "results.md").read_text()
    )
    assert (
        f"| {SETTING} | {100 * float(rows[0]['test miou']):.1f} (" in report
    )  # settings by methods, first of all

    before = file.read_bytes()
    monkeypatch.setattr(experiments.subprocess, "run", None)  # a second call finds everything there
    experiments.main()
    assert file.read_bytes() == before

    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["experiments.py", "--list"])
    experiments.main()
    assert (
        "p5: ClassMix + ReCo" in (listed := capsys.readouterr().out)
        and "long" not in listed
        and "draws" not in listed
    )  # without --only: the table alone
    monkeypatch.setattr("sys.argv", ["experiments.py", "--only", "p7"])
    with pytest.raises(UserError, match="p7: fits none of"):
        experiments.main()


def test_a_failed_run_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setitem(
        experiments.METHODS, "supervised", ["train_supervised.py", "--backbone", "no_such_network"]
    )
    with pytest.raises(UserError, match="train_supervised.py.*failed.*no_such_network"):
        experiments.measure(tmp_path, "20 labels", "supervised", 0.2, 0)
