"""config.json and weights of a run: what is wrong is one line that names the file."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import models
import trees
from cli import fork
from engine import checkpoint
from inputs.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = trees.folder(folder / "data", size=(32, 40))
    words = f"""train_supervised.py --dataset folder --data-path {data} --recipe street
        --crop-size 32 --channels 8 --batch-size 2 --num-workers 0 --log-with none --iterations 1
        --out-dir {folder / "run"}""".split()
    done = fork(*words)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def restored(run):
    """The folder of the run; its files are restored after the test."""
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    yield run
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", []),
        ("classes", ["a", 2, "c"]),
        ("palette", None),
        ("palette", [[0, 0, 0], [0, 0, 256], [1, 1, 1]]),
        ("crop_size", [32.0, 32.0]),
        ("crop_size", [True, 32]),
        ("size", 5),
        ("model", "resnet"),
        ("model.num_classes", 4),
        ("model.backbone", 18),
        ("model.aspp_rates", [0, 0, 0]),
        ("model.mean", [0.5, 0.5]),
        ("model.mean", [0.5, 0.5, float("nan")]),
        ("model.std", [0.5, 0.5, 0]),
        ("arguments.max_size", "64"),
        ("arguments.dataset", None),
    ],
)
def test_a_wrong_entry_of_the_config_is_named(name, value, restored):
    config = json.loads((restored / "config.json").read_text())
    *parents, key = name.split(".")
    entry = config
    for parent in parents:
        entry = entry[parent]
    entry[key] = value
    (restored / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: is damaged \(.*{name}") as error:
        checkpoint.read_config(restored)
    assert "\n" not in str(error.value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_value_in_the_config_is_a_network_or_one_line(data, restored):
    """Of an entry that is read the value is refused, or a network of the run's size is built."""
    config = json.loads((restored / "config.json").read_bytes())
    changed, entry = copy.deepcopy(config), None
    entry = data.draw(st.sampled_from([changed, changed["model"], changed["arguments"]]))
    key = data.draw(st.sampled_from(sorted(entry)))
    entry[key] = data.draw(anything)
    path = restored / "config.json"
    try:
        path.write_text(json.dumps(changed))
        model = models.load(restored)
        assert len(model.classes) == len(model.palette) == config["model"]["num_classes"]
        assert min(model.network_size(40, 48)) >= 32
    except UserError as error:
        assert "\n" not in str(error) and str(restored) in str(error)
    finally:
        path.write_text(json.dumps(config))


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[]", b"null", b"\xff", b"1" * 5000])
def test_a_damaged_config_is_one_line(content, restored):
    (restored / "config.json").write_bytes(content)
    done = fork("evaluate.py", restored)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "config.json: is damaged (" in done.stderr


def test_weights_that_are_not_finite_are_refused(restored, tmp_path):
    path = restored / "model.safetensors"
    weights = load_file(path)
    for value in (float("nan"), float("inf")):
        weights["classifier.3.weight"][0, 0] = value
        save_file(weights, path)
        trees.save(tmp_path / "a.png", torch.zeros(20, 24, 3, dtype=torch.uint8).numpy())
        done = fork("predict.py", restored, tmp_path / "a.png", "--out-dir", tmp_path / "out")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "model.safetensors: is damaged (classifier.3.weight has values" in done.stderr
        assert not (tmp_path / "out" / "a.png").exists()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"miou": "high"}]', "[" * 100_000])
def test_a_damaged_history_is_one_line(content, tmp_path):
    assert checkpoint.best_miou(tmp_path) is None
    (tmp_path / "history.json").write_text(content)
    with pytest.raises(UserError, match=r"history\.json: is damaged"):
        checkpoint.best_miou(tmp_path)


def test_the_best_validation_is_the_last_that_was_kept(tmp_path):
    history = [{"miou": m, "kept": kept} for m, kept in ((0.9, True), (0.5, True), (0.6, False))]
    (tmp_path / "history.json").write_text(json.dumps(history))
    assert checkpoint.best_miou(tmp_path) == 0.5
