"""The checkpoints that the authors of the paper publish (DeepLabV3+, ResNet-101), ready to use."""

from pathlib import Path

from torch import Tensor

from checkpoint import load_weights, read_torch
from data import SOURCES
from errors import need
from models import Segmenter, convert_reco_checkpoint
from recipes import RECIPES

# that the authors' code trains on (they offer files of the first two)
DATASETS = ("cityscapes", "pascal", "sun")


def load_published(file: str, dataset: str | None) -> Segmenter:
    """The network of a published checkpoint in eval mode. The file does not say what it was
    trained on: `dataset` does. Raises UserError for a file that does not fit."""
    need(
        dataset in DATASETS,
        f"--checkpoint needs --dataset {', '.join(DATASETS)}: the file does not say what it was "
        "trained on",
    )
    state = read_torch(Path(file))
    need(
        isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()),
        f"{file}: is no dictionary of tensors, as the published checkpoints are",
    )
    source = SOURCES[dataset]
    config = {
        "model": {"num_classes": len(source.classes), "backbone": "resnet101", "rep_dim": 256},
        "classes": source.classes,
        "palette": source.palette,
        "crop_size": RECIPES[dataset]["crop_size"] * 2,
        "arguments": {"dataset": dataset, "script": "the authors' code", "max_size": None},
    }
    model = Segmenter(config)
    load_weights(model, convert_reco_checkpoint(state), file)
    return model.eval()
