"""Trained networks as a hub repository: saved and loaded on disk; the hub itself is never asked."""

import json
import time

import numpy as np
import pytest
import torch

import models
import predict
import train_supervised
import trees
from inputs.errors import UserError

TINY = """--dataset folder --recipe street --batch-size 2 --channels 8 --low-channels 8 --rep-dim 8
    --crop-size 32 --log-with none --num-workers 0 --iterations 1"""


@pytest.fixture
def run(script, tmp_path):
    data = trees.folder(tmp_path / "data", size=(32, 40))
    words = [*TINY.split(), "--data-path", data, "--num-labeled", "4", "--out-dir"]
    assert script(train_supervised, *words, tmp_path / "run")[0] == 0
    return tmp_path / "run"


def test_a_network_is_saved_and_loaded_as_on_the_hub(run, tmp_path):
    model, image = models.load(run), np.random.randint(0, 255, (40, 50, 3), np.uint8)
    folder = tmp_path / "repository"
    model.save_pretrained(folder, model_card_kwargs={"license": "cc-by-4.0"})
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    for again in (models.load(folder), models.Segmenter.from_pretrained(folder)):
        assert not again.training and again.classes == model.classes
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
        assert (again.predict(image) == model.predict(image)).all()

    text = (folder / "config.json").read_text()
    assert str(tmp_path) not in text and "data_path" not in text  # nothing of this machine
    card = (folder / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "pipeline_tag: image-segmentation" in card
    miou = json.loads((run / "history.json").read_text())[0]["miou"]
    assert f"validation mIoU: {100 * miou:.2f} %" in card and "labels: 4 labelled images" in card
    assert all(f"| {i} | {name} |" in card for i, name in enumerate(model.classes))
    model.save_pretrained(tmp_path / "second")
    assert "license" not in (tmp_path / "second" / "README.md").read_text()


def test_a_name_on_the_hub_goes_where_a_folder_goes(run, script, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "fetch", lambda name: asked.append(name) or run)
    picture = trees.save(tmp_path / "photo.png", np.zeros((40, 50, 3), np.uint8))
    status, _, err = script(predict, "somebody/streets", picture, "--out-dir", tmp_path / "masks")
    assert status == 0 and asked == ["somebody/streets"], err
    assert (tmp_path / "masks" / "photo.png").exists()


def test_the_labels_of_a_card():
    described = {
        "4 labelled images": {"num_labeled": 4},
        "every label of the data set": {"num_labeled": 0},
        "the images of split.txt": {"num_labeled": 0, "labeled_list": "/home/me/split.txt"},
        "partial labels (p1) on every image": {"label_ratio": "p1", "num_labeled": 0},
    }
    for text, arguments in described.items():
        assert models.describe_labels(arguments) == text
        public = models.public_config({"arguments": arguments})["arguments"]
        assert "/home" not in str(public) and models.describe_labels(public) == text


def test_names_and_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert models.is_hub_name("somebody/streets")
    for name in ("runs/typo", "typo", "/absent/run", "a/b/c", "../absent", "./absent"):
        assert not models.is_hub_name(name), name


def test_a_name_that_cannot_be_had_is_one_line_soon():
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"^somebody/streets: no such folder, and .*hub"):
        models.load("somebody/streets")
    assert time.monotonic() - begun < 10


def test_without_a_connection_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **o: (tmp_path, o)[0])
    assert models.fetch("somebody/streets") == tmp_path
