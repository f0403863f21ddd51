"""bench.py: the step by part, the loss, the loaders, and the prediction of a run."""

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


def cells(text: str) -> list[str]:
    starts = range(24, len(text), 17)
    return [text[:24].strip(), *(text[i : i + 17].strip() for i in starts)]


def table(out: str, first: str) -> list[list[str]]:
    """Header and rows of the printed table whose first column is `first`."""
    part = next(part for part in out.split("\n\n") if part.startswith(first))
    return [cells(text) for text in part.splitlines() if not text.startswith("note:")]


@pytest.mark.parametrize("name, images", [("train_semi.py", 4), ("train_supervised.py", 2)])
def test_steps_by_part(name, images, script, tmp_path):
    trace = tmp_path / "trace.json"
    weights = ["--backbone-weights", tmp_path / "not_read.safetensors"]  # as in the run's own line
    words = ["--script", name, *TINY.split(), *weights, "--trace", trace]
    status, out, err = script(bench, *words)
    assert status == 0, err
    header, *rows = table(out, "ms")
    plain, reco = (dict(zip(header, row, strict=True)) for row in rows)
    assert plain.pop("ms") + "-reco" == reco.pop("ms")
    plain, reco = ({key: float(value) for key, value in row.items()} for row in (plain, reco))
    zero = {"to device", *(["teacher"] if name == "train_supervised.py" else [])}  # or rounded to 0
    assert all(reco[part] > 0 for part in bench.PARTS if part not in zero)
    milliseconds = sum(reco[part] for part in bench.PARTS if part != "step")
    assert 0.5 * reco["step"] < milliseconds < 1.01 * reco["step"] + 0.5  # 0.5: rounding
    assert reco["images/s"] == pytest.approx(1000 * images / reco["step"], rel=0.05)
    assert plain["ReCo"] == 0 and reco["peak MB"] > 50
    assert reco["operations"] > plain["operations"] > 100 and "loaders" not in out
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("convolution" in event["name"] for event in events)
    status, out, err = script(bench, *words)
    assert status == 2 and not out and "trace.json: exists" in err and err.count("\n") == 1


def test_no_part_is_timed_within_another(script, monkeypatch):
    """So the parts of a step can be added up."""
    open_parts = []
    timed = bench.Clock.timed

    def call_timed(clock, part, function):
        def call(*arguments, **options):
            assert part == "step" or open_parts == ["step"], (part, open_parts)
            open_parts.append(part)
            result = function(*arguments, **options)
            open_parts.pop()
            return result

        return timed(clock, part, call)

    monkeypatch.setattr(bench.Clock, "timed", call_timed)
    status, _, err = script(bench, *TINY.split(), "--reco", "--label-ratio", "p0")
    assert status == 0 and not open_parts, err


def test_operations_are_counted_forward_and_backward():
    x = torch.ones(3, requires_grad=True)
    with bench.CountOperations() as operations:
        y = (x.view(3, 1) * 2).sum()  # multiply and sum; the view does not count
        assert operations.number == 2
        y.backward()  # ones, multiply (expand and view are views)
    assert operations.number == 4


def test_the_loaders(script, tmp_path):
    data = trees.camvid(tmp_path / "data")
    words = ["--dataset", "camvid", "--data-path", data, "--num-labeled", "2"]
    words += ["--num-workers", 1, "--cache-dir", tmp_path / "cache"]
    status, out, err = script(bench, *words, "--backbone", "test_resnet", *TINY.split())
    assert status == 0, err
    rate = out.split("loaders of 1 processes each: ")[1].split()
    assert float(rate[0]) > 0 and rate[1] == "images/s"


def test_the_loss(script):
    status, out, err = script(bench, "--loss-only", "--steps", "1")
    assert status == 0, err
    header, row = table(out, "the loss")
    assert header == ["the loss", "rep", "classes", "ms"] and "optimiser" not in out
    assert row[:3] == ["small", "2x8x16x16", "5"] and float(row[3]) > 0


def test_prediction(script, tmp_path):
    run, images = make_run(tmp_path / "run"), trees.folder(tmp_path / "data") / "images" / "train"
    status, out, err = script(bench, "--predict", run, images)
    assert status == 0, err
    whole, forward = out.removeprefix("6 images: ").split(" images/s; forward passes only: ")
    assert float(whole) > 0 and float(forward) > 0


def test_the_memory_of_a_process_by_system(monkeypatch):
    on_linux = bench.peak_memory(torch.device("cpu"))
    monkeypatch.setattr(bench.sys, "platform", "darwin")  # the same count, of bytes
    assert bench.peak_memory(torch.device("cpu")) == pytest.approx(on_linux / 1024, rel=0.1)
    monkeypatch.setattr(bench.sys, "platform", "win32")
    assert math.isnan(bench.peak_memory(torch.device("cpu")))
