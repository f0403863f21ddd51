"""bench.py: the step by part, the loss alone, and what several processes exchange."""

import json

import pytest
import torch

import bench

TINY = "--channels 8 --low-channels 8 --rep-dim 8 --crop-size 32 --batch-size 2 --steps 1"


@pytest.fixture(autouse=True)
def small_losses(monkeypatch):
    monkeypatch.setattr(bench, "LOSS_SIZES", [("small", (2, 8, 16, 16), 5)])
    monkeypatch.setattr(bench, "GROWTH_SIZES", [("more classes", (2, 8, 16, 16), 9)])


@pytest.mark.parametrize("name", ["train_semi.py", "train_supervised.py"])
def test_steps_by_part(name, script, tmp_path):
    file = tmp_path / "bench.json"
    status, out, err = script(bench, "--script", name, *TINY.split(), "--json", file)
    assert status == 0, err
    plain, reco = json.loads(file.read_text())["steps"]
    assert plain["method"] + "-reco" == reco["method"] and f"street {reco['method']}" in out
    parts = set(bench.PARTS) - ({"teacher"} if name == "train_supervised.py" else set())
    assert all(reco["seconds"][part] > 0 for part in parts)
    assert 0 < sum(reco["seconds"].values()) <= 1.01 * reco["step"]
    assert reco["ReCo share"] > plain["ReCo share"]


def test_the_loss_alone_and_how_it_grows(script, tmp_path):
    file = tmp_path / "bench.json"
    status, _, err = script(bench, "--loss-only", "--steps", "1", "--json", file)
    assert status == 0, err
    results = json.loads(file.read_text())
    assert not results["steps"]
    few, many = results["loss"]
    assert few["classes"] == 5 and many["extra MB"] > few["extra MB"] > 0
    assert many["exchanged MB"] > few["exchanged MB"] > 0


def test_what_is_exchanged_is_counted():
    """Sums and two counts of each class and process, two draws for each key, the keys."""
    inputs = bench.loss_inputs((2, 8, 16, 16), 5, "cpu")
    expected = 5 * 8 + 2 * 2 * 5 + 2 * 5 * 512 + 5 * 512 * 8
    assert bench.exchanged_bytes(*inputs) == 4 * expected
    assert not torch.distributed.is_initialized()
