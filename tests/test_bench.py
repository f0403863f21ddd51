"""bench.py: the step by part, the loss alone, the loaders, and the prediction of a run."""

import json
import math

import pytest
import torch

import bench
import trees
from test_evaluate import make_run

TINY = "--channels 8 --crop-size 32 --batch-size 2 --steps 1"


@pytest.fixture(autouse=True)
def small_losses(monkeypatch):
    monkeypatch.setattr(bench, "LOSS_SIZES", [("small", (2, 8, 16, 16), 5)])
    monkeypatch.setattr(bench, "GROWTH_SIZES", [("more classes", (2, 8, 16, 16), 9)])


@pytest.mark.parametrize("name", ["train_semi.py", "train_supervised.py"])
def test_steps_by_part(name, script, tmp_path):
    file, trace = tmp_path / "bench.json", tmp_path / "trace.json"
    weights = ["--backbone-weights", tmp_path / "not_read.safetensors"]  # as in the run's own line
    words = ["--script", name, *TINY.split(), *weights, "--json", file, "--trace", trace]
    status, out, err = script(bench, *words)
    assert status == 0, err
    results = json.loads(file.read_text())
    plain, reco = results["steps"]
    assert plain["method"] + "-reco" == reco["method"] and f"street {reco['method']}" in out
    parts = set(bench.PARTS) - ({"teacher"} if name == "train_supervised.py" else set())
    assert all(reco["seconds"][part] > 0 for part in parts)
    assert 0 < sum(reco["seconds"].values()) <= 1.01 * reco["step"]
    assert reco["ReCo share"] > plain["ReCo share"] == 0
    assert reco["operations"] > plain["operations"] > 100 and not results["loaders"]
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("convolution" in event["name"] for event in events)
    status, out, err = script(bench, *words)
    assert status == 2 and not out and "bench.json: exists" in err and err.count("\n") == 1


def test_operations_are_counted_forward_and_backward():
    x = torch.ones(3, requires_grad=True)
    with bench.CountOperations() as operations:
        y = (x.view(3, 1) * 2).sum()  # a view is no work: multiply, sum
        assert operations.number == 2
        y.backward()  # ones, multiply (expand and view are views)
    assert operations.number == 4


def test_watched_functions_are_timed_once_and_restored():
    class Thing:
        def outer(self):
            return self.inner()

        def inner(self):
            return "result"

    thing, clock = Thing(), bench.Clock(torch.device("cpu"))
    with clock.watch([(thing, "outer", "a"), (thing, "inner", "b")]):
        assert thing.outer() == "result" and set(clock.parts) == {"a"}  # not also for b
        assert thing.inner() == "result" and set(clock.parts) == {"a", "b"}
    assert not vars(thing)


def test_the_loaders_alone(script, tmp_path):
    data, file = trees.camvid(tmp_path / "data"), tmp_path / "bench.json"
    words = ["--dataset", "camvid", "--data-path", data, "--num-labeled", "2"]
    words += ["--num-workers", 1, "--cache-dir", tmp_path / "cache", "--json", file]
    network = ["--backbone", "test_resnet", *TINY.split()]
    status, out, err = script(bench, *words, *network)
    assert status == 0, err
    row = json.loads(file.read_text())["loaders"][0]
    assert row["num workers"] == 1 and row["cache"] and row["images per second"] > 0
    assert f"loaders of 1 processes each: {row['images per second']:.1f} images/s" in out


def test_the_loss_alone_and_how_it_grows(script, tmp_path):
    file = tmp_path / "bench.json"
    status, _, err = script(bench, "--loss-only", "--steps", "1", "--json", file)
    assert status == 0, err
    results = json.loads(file.read_text())
    assert not results["steps"]
    few, many = results["loss"]
    assert (few["classes"], many["classes"]) == (5, 9) and few["seconds"] > 0
    assert few["rep MB"] == 2 * 8 * 16 * 16 * 4 / 2**20 and few["peak memory MB"] > 0


def test_prediction(script, tmp_path):
    run, images = make_run(tmp_path / "run"), trees.folder(tmp_path / "data") / "images" / "train"
    file = tmp_path / "bench.json"
    status, out, err = script(bench, "--predict", run, images, "--json", file)
    assert status == 0, err
    row = json.loads(file.read_text())
    assert row["images"] == 6 and "6 images: " in out
    assert row["share"] == pytest.approx(row["whole"] / row["network"]) and row["whole"] > 0


def test_the_memory_of_a_process_by_system(monkeypatch):
    on_linux = bench.peak_memory(torch.device("cpu"))
    monkeypatch.setattr(bench.sys, "platform", "darwin")  # the same count, of bytes
    assert bench.peak_memory(torch.device("cpu")) == pytest.approx(on_linux / 1024, rel=0.1)
    monkeypatch.setattr(bench, "resource", None)  # Windows has no such module
    assert math.isnan(bench.peak_memory(torch.device("cpu")))
