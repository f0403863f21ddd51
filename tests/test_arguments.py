"""The options of a run as the recipes, the backbone and the command line make them."""

import json

import pytest

from data import RECIPES
from engine import options
from inputs.errors import UserError


def parse(*words: str):
    return options.parse(options.training_parser("", "train_supervised.py"), list(words))


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


def test_a_vit_has_one_stride():
    with pytest.raises(UserError, match="--output-stride has no meaning with test_vit"):
        parse("--backbone", "test_vit", "--output-stride", "8")


def test_a_backbone_that_cannot_be_dilated(capsys):
    words = "--backbone", "repvit_m0_9", "--decoder-stride", "4"
    assert parse(*words).output_stride == 32
    assert "repvit_m0_9 cannot be dilated: --output-stride 32, not 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="try --output-stride 32"):
        parse(*words, "--output-stride", "16")
    with pytest.raises(UserError, match="yields no feature pyramid"):
        parse("--backbone", "mambaout_femto", "--decoder-stride", "4")


def test_partial_labels_are_on_every_image():
    assert parse("--label-ratio", "p0", "--num-labeled", "0").num_labeled == 0
    with pytest.raises(UserError, match="exclude each other"):
        parse("--label-ratio", "p0", "--num-labeled", "5")


def test_going_on_from_a_run_keeps_how_it_saw_its_pictures(tmp_path):
    seen = {"crop_size": [40, 56], "scale": [0.8, 1.2], "max_size": 480}
    run = {"dataset": "folder", "script": "train_semi.py", "recipe": "street", **seen}
    config = {
        "arguments": run,
        "model": {"backbone": "test_resnet", "num_classes": 2},
        "classes": ["a", "b"],
        "palette": [[0, 0, 0], [9, 9, 9]],
        "crop_size": seen["crop_size"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--dataset", "folder", "--data-path", "x", "--init-from", str(tmp_path)]
    args = parse(*words)
    assert {name: getattr(args, name) for name in seen} == seen
    args = parse(*words, "--max-size", "600", "--crop-size", "48")
    assert (args.max_size, args.crop_size, args.scale) == (600, [48, 48], [0.8, 1.2])
    args = parse(*words, "--recipe", "camvid")
    assert (args.max_size, args.crop_size) == (1024, [224, 224])


def test_the_help_tells_the_defaults_of_the_recipes(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    street = RECIPES["street"]
    assert f"training steps (camvid: 2000, street: {street['iterations']}, others: 40000)" in text
    assert f"street: {street['crop_size'][0]}, others: 321" in text
