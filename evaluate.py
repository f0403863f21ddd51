"""Evaluate a trained run: mIoU, IoU per class, pixel accuracy, boundary IoU; a table and JSON.

    python evaluate.py runs/street-classmix-reco-20-seed0        # the run's own validation images
    python evaluate.py RUN --split test
    python evaluate.py RUN --dataset cityscapes --data-path DIR --full-resolution \\
        --sliding-window --flip
    python evaluate.py --checkpoint published_reco.pth --dataset cityscapes --data-path DIR
    accelerate launch --multi_gpu evaluate.py RUN                # several processes
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from data import DATASETS, load_source
from engine.evaluation import evaluate, table
from engine.loaders import evaluation_loader
from engine.options import add_prediction_options, natural, new_parser, positive
from engine.processes import launch
from inputs.errors import UserError, need
from inputs.files import need_no_input, output_file, write_json
from inputs.source import Source
from models import load, load_published


def parse_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="a run folder, or user/name on the Hub")
    add("--checkpoint", metavar="FILE", help="a published ReCo checkpoint (.pth) instead of a run")
    add(
        "--dataset",
        choices=list(DATASETS),
        help="another data set of the same classes (default: the run's); what a checkpoint was "
        "trained on",
    )
    add("--data-path", metavar="DIR", help="its folder (default: the run's)")
    add(
        "--split",
        choices=["val", "test", "train"],
        default="val",
        help="which images (test: street and camvid have one, a folder may)",
    )
    add("--batch-size", type=positive, default=4, help="images at once, if all have the same size")
    add(
        "--num-workers",
        type=natural,
        default=min(2, os.cpu_count() or 1),
        help="processes that read images",
    )
    add(
        "--full-resolution",
        action="store_true",
        help="the network sees the images at the size of their files and is scored there "
        "(Cityscapes: 2048x1024; with --scales 0.5 it sees them as it was trained)",
    )
    add_prediction_options(add)
    add(
        "--json",
        metavar="FILE",
        help="output (default: evaluation-SPLIT.json in the run folder; for a checkpoint or a "
        "model from the Hub in the current folder)",
    )
    add("--overwrite", action="store_true", help="replace an existing output file")
    args = parser.parse_args()
    need(bool(args.run) != bool(args.checkpoint), "name either a run folder or --checkpoint FILE")
    return args


# ----------------------------------------------------------------------------------- evaluation
def choose_json(args: argparse.Namespace) -> Path:
    """The output file; evaluation-SPLIT.json in a run folder is ours and may be replaced."""
    if args.json:
        return output_file("--json", args.json, args.overwrite)
    in_run = bool(args.run) and Path(args.run).is_dir()
    folder = Path(args.run) if in_run else Path()
    name = folder / f"evaluation-{args.split}.json"
    return output_file("--json", name, args.overwrite or in_run)


def load_images(args: argparse.Namespace, config: dict) -> Source:
    """The data set to evaluate on, which must have the model's classes."""
    saved = config["arguments"]
    dataset = args.dataset or saved["dataset"]
    need(
        dataset in DATASETS,
        f"{args.run}: was trained on the data set {dataset}, which data.py does not have; name "
        "another one with --dataset and --data-path",
    )
    own_path = saved.get("data_path") if dataset == saved["dataset"] else None
    source = load_source(dataset, args.data_path or own_path, saved.get("max_size"))
    if source.own_files and config.get("size"):  # as `predict` does, see Segmenter.network_size
        source = replace(source, max_size=max(config["size"]), enlarge=True)
    theirs = [name.lower() for name in source.classes]
    ours = [name.lower() for name in config["classes"]]
    if theirs != ours:
        pairs = zip(theirs, ours, strict=False)
        different = (i for i, (a, b) in enumerate(pairs) if a != b)
        first = next(different, min(len(theirs), len(ours)))
        names = [
            classes[first] if first < len(classes) else "none"
            for classes in (source.classes, config["classes"])
        ]
        raise UserError(
            f"--dataset {dataset}: its {len(theirs)} classes must be the {len(ours)} of the model; "
            f"class {first} differs ({' / '.join(names)})"
        )
    return source


def main() -> None:
    args = parse_options()
    path = choose_json(args)
    accelerator = Accelerator()
    model = load_published(args.checkpoint, args.dataset) if args.checkpoint else load(args.run)
    model.to(accelerator.device)
    source = load_images(args, model.config)
    samples = [sample for sample in getattr(source, args.split) if sample.label]
    need(samples, f"--split {args.split}: {source.name} has no labelled images there")
    weights = args.checkpoint or Path(args.run) / "model.safetensors"
    need_no_input([path], [weights, *(f for s in samples for f in (s.image, s.label))])

    loader = evaluation_loader(
        source, samples, args.batch_size, args.num_workers, accelerator, args.full_resolution
    )
    window = tuple(model.config["crop_size"]) if args.sliding_window else None
    results, confusion = evaluate(
        model,
        loader,
        len(source.classes),
        accelerator,
        progress="evaluating",
        scales=args.scales,
        flip=args.flip,
        window=window,
    )
    if accelerator.is_main_process:
        print(f"{len(samples)} {args.split} images of {source.name}")
        print(table(results, source.classes))
        about = {
            "classes": source.classes,
            "confusion": confusion.tolist(),
            "images": len(samples),
            "processes": accelerator.num_processes,
            "options": vars(args),
        }
        write_json(path, {**results, **about})
        print(f"written to {path}")


if __name__ == "__main__":
    launch(main)
