"""Supervised training from full or partial labels, with or without the regional contrast loss.

    python train_supervised.py                           # street, 20 labelled scenes
    accelerate launch train_supervised.py --reco
    accelerate launch train_supervised.py --dataset cityscapes --data-path dataset/cityscapes \\
        --num-labeled 150 --val-interval 500 --model reconet
    accelerate launch train_supervised.py --dataset cityscapes --data-path dataset/cityscapes \\
        --label-ratio p1 --seed 0 --val-interval 500 --model reconet
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

import checkpoint
import run
from arguments import parse, reco_settings
from data import load_source
from devices import to_device
from labels import divide
from loaders import Loader, training_loader, validation_loader
from mixing import IGNORE
from options import training_parser
from processes import launch
from reco import reco_loss
from record import Record
from transforms import augment, shrink_known, shrink_label, to_float, upsample


def parse_options(argv=None) -> argparse.Namespace:
    return parse(training_parser(__doc__, "train_supervised.py"), argv)


def supervised_loss(logits: Tensor, label: Tensor, accelerator=None) -> Tensor:
    """Mean cross-entropy over the labelled pixels; 0, not NaN, where there are none.

    logits [B, C, H, W], label [B, H, W] int64, 255 = ignored. With several processes their mean is
    the loss of the whole batch: each divides by the mean number of labelled pixels."""
    total = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return total / mean_count(label != IGNORE, accelerator)


def mean_count(mask: Tensor, accelerator=None) -> Tensor:
    """Number of True pixels, the mean over the processes, at least a thousandth."""
    count = mask.sum().float()
    return (accelerator.reduce(count, "mean") if accelerator else count).clamp_min(1e-3)


def train_step(
    batch, student, optimizer, accelerator, args, rng, contrast=True, mark=lambda part: None
) -> tuple[dict, dict]:
    """One step on a batch on the host: images uint8 [B, 3, h, w], labels uint8 [B, h, w], ...

    Returns the losses and counts for the curves (name -> float []) and the tensors for the
    pictures, none of which the host has waited for. `contrast`: with ReCo, if --reco says so.
    `mark` is told when a part of the step is done (bench.py times them)."""
    device = accelerator.device
    images, label = to_float(batch[0], device), to_device(batch[1], device).long()
    mark("data")
    images, label, _ = augment(images, label, None, rng)
    mark("augmentation")

    logits, rep = student(images)  # [B, C, h, w], [B, D, h, w]
    loss = supervised_loss(upsample(logits, label.shape[-2:]), label, accelerator)
    losses = {"loss/supervised": loss.detach()}
    shown = {"images": images, "label": label, "confidence": (label != IGNORE).float()}
    mark("student forward")

    if args.reco and contrast:  # queries and keys from the labelled pixels alone
        shrink = shrink_known if args.partial else shrink_label
        small = shrink(label, rep.shape[-2:])
        prob = logits.detach().softmax(dim=1)
        reco, stats = reco_loss(rep, small, prob, small != IGNORE, **reco_settings(args))
        loss = loss + args.reco_weight * reco
        losses |= reco_curves(reco, stats)
        shown |= reco_pictures(rep, stats)
    elif rep is not None:
        loss = loss + 0 * rep.sum()  # distributed training waits for a gradient of every parameter
    mark("ReCo")

    accelerator.backward(loss)
    mark("backward")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mark("optimiser + EMA")
    return {"loss/total": loss.detach(), **losses}, shown


def reco_curves(loss: Tensor, stats: dict) -> dict[str, Tensor]:
    """What the curves show of the contrast loss: itself, classes present, hard pixels."""
    return {
        "loss/reco": loss.detach(),
        "reco/classes": stats["num_classes"].float(),
        "reco/hard pixels": stats["num_hard"].sum().float(),
    }


def reco_pictures(rep: Tensor, stats: dict) -> dict:
    """What the pictures show of it: the pixels drawn as queries and the class relations."""
    # a class without hard pixels draws some that do not count
    queries = torch.where(stats["query_weight"][:, None] > 0, stats["queries"], -1)
    return {"queries": queries, "relation": stats["relation"], "rep_size": rep.shape[-2:]}


def training_loaders(args, source, division, accelerator, start: int) -> list[Loader]:
    """The labelled batches of the steps from `start` on."""
    options = dict(batch_size=args.batch_size, stream=0, scale=args.scale)
    return [
        training_loader("labelled", source, division.labelled, args, accelerator, start, **options)
    ]


def main() -> None:
    args = parse_options()
    accelerator = run.start_accelerator(args)
    folder = checkpoint.choose_folder(args, accelerator)

    # the data, and which images count as labelled
    source = load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    labels = args.num_labeled, args.label_ratio, args.labeled_list
    division = divide(source, *labels, args.seed, quiet=not accelerator.is_main_process)
    args.partial = division.partial

    # the network and its optimiser
    state = checkpoint.load_state(folder) if args.resume else None
    model, config = run.new_model(args, source, accelerator, fresh=state is None)
    optimizer = run.new_optimizer(args, model)
    student, optimizer = accelerator.prepare(model, optimizer)  # student: `model`, wrapped

    # what there is to go on from
    record = Record(args, accelerator, folder, source, config)
    parts = dict(model=model, optimizer=optimizer, scaler=accelerator.scaler)
    if args.resume:
        run.check_resumed(accelerator, folder, source, division)
    if state:
        checkpoint.restore(state, record, **parts)
    state = None  # as large as the networks and the optimiser

    # batches of the steps that remain
    loaders = training_loaders(args, source, division, accelerator, record.step)
    val_loader = validation_loader(args, source, accelerator)
    record.announce(division, loaders)

    val_loader.start()  # now, so that no validation starts a process
    student.train()
    # the weights of --init-from stay until others are better; lost ones are made again
    if record.best is None and (args.init_from or record.history):
        record.validate({"student": model}, val_loader)
    for step, batch in enumerate(loaders[0], start=record.step):
        rate = run.set_learning_rate(optimizer, args, accelerator, step)
        rng = run.seed_step(args.seed, step, accelerator.process_index)
        losses, shown = train_step(batch, student, optimizer, accelerator, args, rng)
        record.add(step, losses)
        stop = record.stop_requested()
        if record.is_due(args.log_interval):
            record.log_means(rate)
        if record.is_due(args.val_interval):
            with record.paused():
                record.validate({"student": model}, val_loader)
                record.show(model, val_loader.dataset, shown)
        if record.is_due(args.save_interval) or stop:
            with record.paused():
                record.check_weights(model)
                if accelerator.is_main_process:
                    checkpoint.save_state(folder, record, **parts)
        if stop and step + 1 < args.iterations:
            record.leave(stop)
    record.finish(model, val_loader.dataset)


if __name__ == "__main__":
    launch(main)
