"""Supervised training from full or partial labels, with or without the regional contrast loss.

python train_supervised.py                           # street, 20 labelled images
accelerate launch train_supervised.py --reco
accelerate launch train_supervised.py --dataset cityscapes --data-path DIR --num-labeled 150
accelerate launch train_supervised.py --dataset cityscapes --data-path DIR --label-ratio p1
"""

import argparse

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data import RECIPES, load_source
from engine import checkpoint
from engine.loaders import Loader, training_loader, validation_loader
from engine.options import parse, reco_options, training_parser
from engine.processes import launch
from engine.record import Record
from engine.setup import new_optimizer, start_accelerator, start_step
from inputs.files import IGNORE
from inputs.labels import Split, split_train
from inputs.source import Source
from inputs.transforms import augment, shrink_known, shrink_label, to_device, to_float, upsample
from models import new_model
from reco import reco_loss, supervised_loss


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    # as many images per step as in train_semi.py, all of them labelled
    recipes = {name: r | {"batch_size": 2 * r["batch_size"]} for name, r in RECIPES.items()}
    return parse(training_parser(__doc__, "train_supervised.py", recipes), recipes, argv)


def train_step(
    batch: tuple[Tensor, ...],
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    args: argparse.Namespace,
    rng: np.random.Generator,
    partial: bool = False,
    reco: bool = True,
) -> tuple[dict[str, Tensor], dict]:
    """One step on a CPU batch: images uint8 [B, 3, h, w], labels uint8 [B, h, w], ...

    partial  the labels are sparse
    reco     False: no ReCo, even with --reco (the warm-up of train_semi.py)
    Returns the curves and the images to plot, without GPU synchronisation."""
    # 1. move to the device, augment
    images = to_float(batch[0], accelerator.device)
    label = to_device(batch[1], accelerator.device).long()
    images, label = augment(images, [label], rng)

    # 2. supervised loss
    logits, rep = student(images)  # [B, C, h, w], [B, D, h, w]
    full = upsample(logits, label.shape[-2:])
    supervised = supervised_loss(full, label, args.class_balance)
    loss, stats = supervised, {}

    # 3. ReCo on the labelled pixels
    if args.reco and reco:
        small = (shrink_known if partial else shrink_label)(label, rep.shape[-2:])  # [B, h, w]
        prob = logits.detach().softmax(dim=1)
        contrast, stats = reco_loss(rep, small, prob, small != IGNORE, **reco_options(args))
        loss = loss + args.reco_weight * contrast
        stats |= dict(loss=contrast, rep_size=rep.shape[-2:])

    # 4. update the student
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    curves = {"loss/total": loss, "loss/supervised": supervised}
    return curves, dict(images=[images], label=[label], confidence=[label != IGNORE], reco=stats)


def training_loaders(
    args: argparse.Namespace, source: Source, split: Split, accelerator: Accelerator, start: int
) -> list[Loader]:
    """The loader of the labelled batches, from step `start` on."""
    options = dict(batch_size=args.batch_size, stream=0, scale=args.scale)
    common = args, accelerator, start
    options["balanced"] = args.balanced_sampling
    return [training_loader("labelled", source, split.labelled, *common, **options)]


def main() -> None:
    args = parse_options()
    accelerator = start_accelerator(args)
    folder = checkpoint.choose_folder(args, accelerator)

    # the data, and which images are labelled
    source = load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    split = split_train(source, args, quiet=not accelerator.is_main_process)

    # the student and its optimiser
    state = checkpoint.load_state(folder) if args.resume else None
    model, config = new_model(args, source, accelerator, fresh=state is None)
    optimizer = new_optimizer(args, model)
    student, optimizer = accelerator.prepare(model, optimizer)  # `model`, wrapped

    # the run folder, or with --resume its state; the loaders
    record = Record(args, accelerator, folder, source, split, config)
    record.restore(state, model=model, optimizer=optimizer, scaler=accelerator.scaler)
    loaders = training_loaders(args, source, split, accelerator, record.step)
    record.start(loaders, validation_loader(args, source, accelerator), student=model)

    student.train()
    for step, micro_step, (batch,) in record.batches(loaders):
        rng = start_step(args, optimizer, accelerator, step, micro_step)
        with accelerator.accumulate(student):
            values = train_step(batch, student, optimizer, accelerator, args, rng, split.partial)
        record.after_step(*values)
    record.finish()


if __name__ == "__main__":
    launch(main)
