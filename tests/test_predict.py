"""predict.py: any picture, any size, the mask where it belongs, and what is done with a file that is none."""
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import Constant, Pointwise, make_run, script  # noqa: F401 (script is a fixture)
from torch.nn import functional as F

import data
import predict
import run
import trees
from evaluate import predict_probabilities


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("street"))


def load(folder):
    return run.load_trained(predict.argparse_free(folder), "cpu") if hasattr(predict, "argparse_free") else None


def scene(index=0, size=None):
    image = Image.fromarray(data.street_scene("test", index)[0].permute(1, 2, 0).numpy())
    return image.resize(size) if size else image


def mask_of(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)
