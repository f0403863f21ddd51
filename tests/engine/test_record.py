"""The record of a run: which weights are kept, and when a run must stop."""

from types import SimpleNamespace

import pytest
import torch

from engine import record
from inputs.errors import UserError


def test_the_best_on_validation_is_kept(tmp_path, monkeypatch):
    """By mIoU alone, of the first network, and of equal ones the earlier."""
    results = {"accuracy": 0.5, "iou": [0.5]}
    scores = iter(
        [(0.3, 0.9), (0.9, 0.9), (0.5, 0.1), (0.1, 0), (0.5, 0.2), (0.9, 1), (0.4, 0.95), (1, 1)]
    )

    def evaluated(*_, **__):
        miou, boundary = next(scores)
        return {**results, "miou": miou, "boundary_iou": boundary}, torch.zeros(1, 1)

    monkeypatch.setattr(record, "evaluate", evaluated)
    written = []
    monkeypatch.setattr(
        record.checkpoint, "write_weights", lambda folder, network: written.append(network)
    )
    run = object.__new__(record.Record)
    run.val_loader, run.networks = None, {"teacher": "the teacher", "student": "the student"}
    run.bar, run.main, run.control, run.accelerator = object(), True, None, None
    run.best, run.history, run.folder = None, [], tmp_path
    run.source = SimpleNamespace(classes=["a"])
    run.check_weights = run.report_validation = lambda *_: None
    kept = []
    for run.step in (1, 2, 3, 4):
        written.clear()
        run.validate()
        kept.append(list(written))
    assert kept == [["the teacher"], ["the teacher"], [], []]
    assert run.best["step"] == 2 and [e["miou"] for e in run.history] == [0.3, 0.5, 0.5, 0.4]


def test_weights_that_are_not_finite_stop_the_run():
    run, model = object.__new__(record.Record), torch.nn.Linear(2, 2)
    run.step, run.pending = 3, []
    run.parts = {"model": model}
    run.check_weights()
    model.bias.data[1] = float("nan")
    with pytest.raises(UserError, match="weights were not finite after step 2"):
        run.check_weights()
