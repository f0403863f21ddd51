"""What docs/questions.md tells a reader to add works: typed into a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np

import trees
from cli import ENVIRONMENT, ROOT, SMALL


def code_below(title: str) -> str:
    """The first code block after a question."""
    text = (ROOT / "docs" / "questions.md").read_text()
    return re.search(r"```python\n(.*?)```", text[text.index(f"**{title}.**") :], re.DOTALL)[1]


def insert(file, before: str, code: str) -> None:
    text = file.read_text()
    assert text.count(before) == 1, (file, before)
    file.write_text(text.replace(before, f"{code}\n{before}"))


def test_a_data_set_a_mixing_and_a_loss_of_ones_own(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    listing, source, listed, recipe = re.split(r"# in .*\n", code_below("Another data set"))[1:]
    insert(copy / "layouts.py", "def list_camvid(", listing)
    insert(copy / "data.py", '    "camvid": Source(', source)
    insert(copy / "data.py", '    "camvid": layouts.', listed)
    insert(copy / "recipes.py", '    "pascal": PAPER,', recipe)
    mask, branch = code_below("Another mixing").split("    # in `mix`\n")
    insert(copy / "mixing.py", "def class_mask(", mask)
    insert(copy / "mixing.py", "    elif strategy in (", branch)
    text = (copy / "mixing.py").read_text()
    (copy / "mixing.py").write_text(text.replace("STRATEGIES = (", 'STRATEGIES = ("stripes", '))
    loss = "".join(f"    {line}" for line in code_below("Another loss").splitlines(keepends=True))
    insert(copy / "train_semi.py", "    shown = {", loss)

    rng, data = np.random.default_rng(0), tmp_path / "data"
    for part, number in (("training", 4), ("validation", 2)):
        for i in range(number):
            photograph = rng.integers(0, 256, (60, 80, 3), np.uint8)
            trees.save(data / "images" / part / f"ADE_{i}.jpg", photograph)
            label = np.repeat(rng.integers(0, 151, (6, 8), np.uint8), 10, 0).repeat(10, 1)
            trees.save(data / "annotations" / part / f"ADE_{i}.png", label)
    words = f"""train_semi.py --dataset ade --data-path {data} --num-labeled 2 --reco
        --mixing-strategy stripes --batch-size 2 --iterations 2 --log-interval 1 --val-interval 2
        --out-dir {tmp_path / "run"}""".split()
    done = subprocess.run(
        [sys.executable, *words, *SMALL],
        cwd=copy,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 labelled + 2 unlabelled" in done.stdout and "150 classes" in done.stdout
    assert "dice=" in done.stderr  # in the progress bar
