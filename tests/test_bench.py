"""bench.py: the step by part, the loss alone, and what several processes exchange."""

import json
import math

import pytest
import torch

import bench
import trees

TINY = "--channels 8 --low-channels 8 --rep-dim 8 --crop-size 32 --batch-size 2 --steps 1"


@pytest.fixture(autouse=True)
def small_losses(monkeypatch):
    monkeypatch.setattr(bench, "LOSS_SIZES", [("small", (2, 8, 16, 16), 5)])
    monkeypatch.setattr(bench, "GROWTH_SIZES", [("more classes", (2, 8, 16, 16), 9)])


@pytest.mark.parametrize("name", ["train_semi.py", "train_supervised.py"])
def test_steps_by_part(name, script, tmp_path):
    file = tmp_path / "bench.json"
    trace = tmp_path / "new" / "trace.json"
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
    assert reco["ReCo share"] > plain["ReCo share"]
    assert reco["GFLOP"] > plain["GFLOP"] > 0 and not results["loaders"]
    used = reco["GFLOP"] / reco["step"] / reco["matrix GFLOP/s"]
    assert reco["share of matrix rate"] == pytest.approx(used)
    assert any(
        "convolution" in event["name"] for event in json.loads(trace.read_text())["traceEvents"]
    )


@pytest.mark.parametrize("groups", [1, 8])
def test_a_gradient_has_the_operations_of_two_forward_passes(groups):
    convolution = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups)
    images = torch.randn(2, 8, 10, 10, requires_grad=True)
    with bench.count_operations() as forward:
        out = convolution(images)
    with bench.count_operations() as backward:
        out.sum().backward()
    per_output = 2 * 3 * 3 * 8 // groups
    assert forward.get_total_flops() == out.numel() * per_output
    assert backward.get_total_flops() == 2 * out.numel() * per_output


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
    assert few["classes"] == 5 and many["extra MB"] > few["extra MB"] > 0
    assert many["exchanged MB"] > few["exchanged MB"] > 0


def test_what_is_exchanged_is_counted():
    """Sums and two counts of each class and process, two draws for each key, the keys."""
    inputs = bench.loss_inputs((2, 8, 16, 16), 5, "cpu")
    expected = 5 * 8 + 2 * 2 * 5 + 2 * 5 * 512 + 5 * 512 * 8
    assert bench.exchanged_bytes(*inputs) == 4 * expected
    assert not torch.distributed.is_initialized()


def test_the_memory_of_a_process_by_system(monkeypatch):
    on_linux = bench.peak_memory(torch.device("cpu"))
    monkeypatch.setattr(bench.sys, "platform", "darwin")  # the same count, of bytes
    assert bench.peak_memory(torch.device("cpu")) == pytest.approx(on_linux / 1024, rel=0.1)
    monkeypatch.setattr(bench, "resource", None)  # Windows has no such module
    assert math.isnan(bench.peak_memory(torch.device("cpu")))
