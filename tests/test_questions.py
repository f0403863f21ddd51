"""What docs/questions.md tells a reader to change works: applied to a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import trees
from cli import ENVIRONMENT, ROOT, SMALL

TEXT = (ROOT / "docs" / "questions.md").read_text()


def code_below(title: str, kind: str) -> str:
    """The first code block after a question."""
    return re.search(rf"```{kind}\n(.*?)```", TEXT[TEXT.index(f"**{title}.**") :], re.DOTALL)[1]


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for package in ("inputs", "engine"):
        shutil.copytree(ROOT / package, folder / package)
    return folder


def train(copy, *words) -> subprocess.CompletedProcess:
    options = ["--batch-size", "2", "--iterations", "2", "--log-interval", "1"]
    options += ["--reco-threshold", "0.3"]  # from random weights nothing is surer
    done = subprocess.run(
        [sys.executable, "train_semi.py", "--reco", *words, *options, *SMALL],
        cwd=copy,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def losses(copy, *words) -> dict[str, float]:
    """The losses of the last step, as the progress bar shows them."""
    shown = re.findall(r"(\w+)=([\d.]+)", train(copy, *words).stderr)
    return {name: float(value) for name, value in shown}


@pytest.mark.parametrize(
    ("title", "file", "lines", "changed"),
    [
        ("Another term in ReCo", "reco.py", 1, "reco"),
        ("A second strongly augmented view", "train_semi.py", 8, "unsup"),
    ],
)
def test_a_change_of_the_method(copy, tmp_path, title, file, lines, changed):
    diff = code_below(title, "diff")
    assert re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE) == [file]
    assert len(re.findall(r"^\+(?!\+\+)", diff, re.MULTILINE)) <= lines
    data = ["--dataset", "folder", "--data-path", trees.folder(tmp_path / "data", size=(48, 48))]
    before = losses(copy, *data, "--out-dir", tmp_path / "before")
    subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    after = losses(copy, *data, "--out-dir", tmp_path / "after")
    assert after.keys() == before.keys() and after[changed] != before[changed]


def test_another_data_set(copy, tmp_path):
    diff = code_below("Another data set", "diff")
    assert re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE) == ["data.py"]
    subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for part, number in (("training", 4), ("validation", 2)):
        for i in range(number):
            image = rng.integers(0, 256, (60, 80, 3), np.uint8)
            trees.save(data / "images" / part / f"ADE_{i}.jpg", image)
            label = np.repeat(rng.integers(0, 151, (6, 8), np.uint8), 10, 0).repeat(10, 1)
            trees.save(data / "annotations" / part / f"ADE_{i}.png", label)
    words = "--dataset", "ade", "--data-path", data, "--num-labeled", "2", "--out-dir"
    done = train(copy, *words, tmp_path / "run")
    assert "2 labelled + 2 unlabelled" in done.stdout and "150 classes" in done.stdout


def insert(file, after: str, code: str) -> None:
    text = file.read_text()
    assert text.count(after) == 1, (file, after)
    file.write_text(text.replace(after, f"{after}{code}"))


def test_another_mixing_and_another_loss(copy, tmp_path):
    branch = '    if strategy == "classmix":\n        return class_mask(labels)\n'
    insert(copy / "mixing.py", branch, code_below("Another mixing", "python"))
    insert(copy / "mixing.py", "STRATEGIES = (", '"stripes", ')
    loss = code_below("Another loss", "python")
    loss = "".join(f"    {line}" for line in loss.splitlines(keepends=True))
    insert(copy / "train_semi.py", "    loss, stats = supervised + unsupervised, {}\n", loss)
    insert(copy / "train_semi.py", "    curves = {\n", '        "loss/dice": dice,\n')
    data = ["--dataset", "folder", "--data-path", trees.folder(tmp_path / "data", size=(48, 48))]
    words = [*data, "--mixing-strategy", "stripes", "--out-dir", tmp_path / "run"]
    assert 0 < losses(copy, *words)["dice"] < 1
