"""The options of a run as the recipes, the backbone and the command line make them."""

import pytest

import arguments
import options


def parse(*words: str):
    return arguments.parse(options.training_parser("", "train_supervised.py"), list(words))


@pytest.mark.parametrize(
    ("words", "optimizer", "lr", "decay", "scale", "crop"),
    [
        ("", "sgd", 0.2, 5e-4, 1, [48, 48]),
        ("--backbone resnet18", "sgd", 0.2, 5e-4, 1, [48, 48]),
        ("--optimizer adamw", "adamw", 2e-4, 0.01, 1, [48, 48]),
        ("--backbone test_vit --pretrained", "adamw", 2e-4, 0.01, 1 / 40, [48, 48]),
        ("--backbone test_vit", "adamw", 2e-4, 0.01, 1, [48, 48]),  # from random weights
        ("--backbone vit_small_patch14_dinov2", "adamw", 2e-4, 0.01, 1, [42, 42]),
        ("--backbone test_vit --optimizer sgd --lr 0.1", "sgd", 0.1, 5e-4, 1, [48, 48]),
        (
            "--backbone test_vit --pretrained --lr 1e-3 --weight-decay 0 --backbone-lr-scale 0"
            " --crop-size 50",
            "adamw",
            1e-3,
            0,
            0,
            [50, 50],
        ),
    ],
)
def test_the_backbone_chooses_the_optimizer(words, optimizer, lr, decay, scale, crop):
    args = parse(*words.split())
    assert (args.optimizer, args.lr, args.weight_decay) == (optimizer, lr, decay)
    assert (args.backbone_lr_scale, args.crop_size) == (scale, crop)
