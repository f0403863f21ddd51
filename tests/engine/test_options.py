"""The options of a run as the recipes, the backbone and the command line make them."""

import json
import re

import pytest
import timm

import train_semi
import train_supervised
from data import RECIPES
from engine import options
from inputs.errors import UserError


def parse(*words: str):
    parser = options.training_parser("", "train_supervised.py", RECIPES)
    return options.parse(parser, RECIPES, list(words))


@pytest.mark.parametrize(
    ("words", "optimizer", "lr", "decay", "scale", "crop"),
    [
        ("", "sgd", 0.2, 5e-4, 1, [48, 48]),
        ("--backbone resnet18", "sgd", 0.2, 5e-4, 1, [48, 48]),
        ("--optimizer adamw", "adamw", 2e-4, 0.01, 1, [48, 48]),
        ("--backbone deit_tiny_patch16_224 --pretrained", "adamw", 2e-4, 0.01, 1 / 40, [48, 48]),
        (
            "--backbone vit_tiny_patch16_224",
            "adamw",
            2e-4,
            0.01,
            1,
            [48, 48],
        ),  # from random weights
        ("--backbone vit_small_patch14_dinov2", "adamw", 2e-4, 0.01, 1, [42, 42]),
        ("--backbone vit_tiny_patch16_224 --optimizer sgd --lr 0.1", "sgd", 0.1, 5e-4, 1, [48, 48]),
        (
            "--backbone vit_tiny_patch16_224 --pretrained --lr 1e-3 --weight-decay 0"
            " --backbone-lr-scale 0 --crop-size 50",
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


def test_every_vit_of_timm_names_its_patch():
    names = [n for n in timm.list_models() if n.startswith(("vit_small_p", "deit", "vit_base_p"))]
    assert len(names) > 50 and all("patch" in name for name in names)


def test_the_default_rate_follows_the_global_batch(monkeypatch, capsys):
    assert parse("--batch-size", "8").lr == pytest.approx(0.4)  # the recipe's: 0.2 for 4
    assert "learning rate 0.4 = 0.2 x 8/4" in capsys.readouterr().out
    assert parse("--batch-size", "8", "--lr", "0.3").lr == 0.3
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert parse("--batch-size", "8").lr == pytest.approx(2.4)
    assert parse("--batch-size", "8", "--lr", "0.3").lr == 0.3


def test_the_papers_method_on_any_data():
    """Published settings have it, and --paper gives it to others, whose recipe stays."""
    off = dict(balanced_sampling=False, class_balance=0)
    off |= dict(average_statistics=False)
    for name in ("cityscapes", "pascal", "sun"):
        assert RECIPES[name].items() >= off.items()
    for script in (train_semi, train_supervised):
        for words in ([], ["--dataset", "folder"], ["--dataset", "camvid"]):
            ours, paper = (vars(script.parse_options([*words, *w])) for w in ([], ["--paper"]))
            assert (
                paper == ours | off | {"paper": True} and paper["iterations"] == ours["iterations"]
            )
            assert ours["balanced_sampling"] and ours["average_statistics"]
    chosen = train_semi.parse_options(["--paper", "--class-balance", "0.3"])
    assert chosen.class_balance == 0.3 and not chosen.balanced_sampling


def test_supervised_training_doubles_the_labelled_batch():
    supervised, semi = train_supervised.parse_options([]), train_semi.parse_options([])
    assert supervised.batch_size == 2 * semi.batch_size and supervised.lr == semi.lr


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--reco-weight 2", "--reco-weight has no effect without --reco"),
        ("--reco-threshold 0.9", "--reco-threshold has no effect without --reco"),
        ("--max-size 99", "--max-size has no effect without --dataset folder"),
        ("--cache-dir x", "--cache-dir has no effect without a data set on disk"),
    ],
)
def test_an_option_without_effect_prints_a_note(words, note, capsys):
    parse(*words.split())
    assert capsys.readouterr().out == f"note: {note}\n"


def test_the_options_reach_the_loss():
    words = "--reco --reco-temp 0.3 --reco-num-queries 5 --reco-num-negatives 6 "
    settings = options.reco_options(parse(*words.split(), "--reco-threshold", "0.9"))
    assert settings == dict(
        temperature=0.3,
        num_queries=5,
        num_negatives=6,
        strong_threshold=0.9,
        active_queries=True,
        active_keys=True,
        return_stats=True,
    )
    settings = options.reco_options(parse("--reco", "--reco-random-queries", "--reco-random-keys"))
    assert not settings["active_queries"] and not settings["active_keys"]


def test_partial_labels_are_on_every_image():
    assert parse("--label-ratio", "p0", "--num-labeled", "0").num_labeled == 0
    with pytest.raises(UserError, match="exclude each other"):
        parse("--label-ratio", "p0", "--num-labeled", "5")


def test_init_from_keeps_the_sizes_at_which_the_run_saw_its_images(tmp_path):
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


def test_the_help_shows_the_defaults_of_the_recipes(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert out.startswith("usage: train_supervised.py [options]\n\n")
    text = " ".join(out.split())
    street = RECIPES["street"]
    assert f"training steps (street: {street['iterations']}, camvid: 2000, others: 40000)" in text
    assert "street: 48, camvid: 224, cityscapes: 512, others: 321" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init-from", ""], "--init-from: the value is empty"),
        (["--batch-size", "1099511627776"], "is not an integer from 1 to 65536"),
        (["--crop-size", "8"], "--crop-size 8 8: one side or height and width, 32 or more"),
        (["--scale", "2", "1"], "--scale 2.0 1.0: MIN must not exceed MAX"),
    ],
)
def test_impossible_values_are_refused(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(*words)
