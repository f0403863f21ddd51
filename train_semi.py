"""Semi-supervised training: mean teacher, image mixing and the regional contrast loss, from full or
partial labels.

    python train_semi.py --reco                          # street, 20 labelled scenes
    accelerate launch train_semi.py --reco
    accelerate launch train_semi.py --dataset cityscapes --data-path dataset/cityscapes \\
        --num-labeled 150 --val-interval 500 --model reconet --mixing-strategy classmix --reco
    accelerate launch train_semi.py --dataset cityscapes --data-path dataset/cityscapes \\
        --label-ratio p0 --seed 0 --val-interval 500 --model reconet --mixing-strategy classmix \\
        --reco
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

import checkpoint
import run
import train_supervised
from arguments import parse, reco_settings
from data import load_source
from devices import to_device
from labels import divide
from loaders import Loader, training_loader, validation_loader
from mixing import IGNORE, STRATEGIES, mix
from models import MeanTeacher
from options import natural, positive, share, training_parser
from processes import launch
from reco import reco_loss
from record import Record
from train_supervised import mean_count, reco_curves, reco_pictures, supervised_loss
from transforms import augment, batch_scale_crop, shrink_known, shrink_label, to_float, upsample

BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


def parse_options(argv=None) -> argparse.Namespace:
    parser = training_parser(__doc__, "train_semi.py")
    add = parser.add_argument_group("mean teacher and mixing").add_argument
    add(
        "--mixing-strategy",
        choices=STRATEGIES,
        default="classmix",
        help="how unlabelled images are mixed (none: not at all)",
    )
    add(
        "--weak-threshold",
        type=share,
        default=0.7,
        help="pseudo-labels of at least this confidence join ReCo",
    )
    add(
        "--labeled-batch-size",
        type=positive,
        metavar="N",
        help="labelled images per step and process where not as many as unlabelled ones (with "
        "partial labels twice as many)",
    )
    add(
        "--warmup-iterations",
        type=natural,
        help="supervised steps before the unlabelled images join (0; needed where a teacher from "
        "random weights never starts)",
    )
    return parse(parser, argv)


def unsupervised_loss(
    logits: Tensor, target: Tensor, confidence: Tensor, strong_threshold: float, accelerator=None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with pseudo-labels, each image weighted by how sure its teacher is (paper,
    section 3.3).

    logits [B, C, H, W]; target [B, H, W] int64, 255 = ignored; confidence [B, H, W]. eta of an
    image = its pixels of confidence >= strong_threshold / its pixels not ignored. The loss is the
    mean, over all pixels of the batch with a positive cross-entropy, of eta times the pixel's
    cross-entropy; 0 where there is no such pixel. Returns the loss and eta [B]."""
    sure = (confidence >= strong_threshold).sum(dim=(1, 2))
    eta = sure / (target != IGNORE).sum(dim=(1, 2)).clamp_min(1)
    cross_entropy = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    total = (eta[:, None, None] * cross_entropy).sum()
    return total / mean_count(cross_entropy > 0, accelerator), eta


def labelled_batch(args: argparse.Namespace) -> int:
    """Labelled images of a step: --labeled-batch-size, or as many as unlabelled ones. With partial
    labels as many as supervised training sees (not in the paper), since the few known pixels of
    the other images are cut up by mixing."""
    return args.labeled_batch_size or args.batch_size * (2 if args.partial else 1)


@torch.no_grad()
def pseudo_label(
    teacher: MeanTeacher, images: Tensor, known: Tensor, accelerator
) -> tuple[Tensor, Tensor]:
    """The teacher's argmax and its probability, [B, H, W] each, at full resolution. Known pixels
    (partial labels; [B, H, W], 255 = unknown) overwrite them, with a confidence of 1, which no
    other pixel has."""
    with accelerator.autocast():
        logits, _ = teacher.label(images)
    prob = upsample(logits.float(), images.shape[-2:]).softmax(dim=1)
    confidence, label = prob.max(dim=1)
    label = torch.where(known != IGNORE, known, label)
    return label, torch.where(known != IGNORE, 1.0, confidence.clamp_max(BELOW_ONE))


def contrast(logits, rep, full_l, label_l, label_u, confidence, partial, args):
    """ReCo over labelled and pseudo-labelled pixels together, at the size of rep.

    logits [A + B, C, h, w] and rep [A + B, D, h, w], the A labelled images first; full_l
    [A, C, H, W] their logits at full size; label_l [A, H, W]; label_u, confidence [B, H, W].
    `partial`: the labels are sparse. Returns the loss and the stats of `reco_loss`."""
    with torch.no_grad():
        size = rep.shape[-2:]
        valid_l = label_l != IGNORE
        if partial:  # beside the known pixels, those of which the student itself is sure
            known = torch.cat([label_l, torch.where(confidence == 1, label_u, IGNORE)])
            sure, own = full_l.softmax(dim=1).max(dim=1)
            label_l = torch.where(valid_l, label_l, own)
            valid_l = valid_l | (sure >= 0.97)
        label = shrink_label(torch.cat([label_l, label_u]), size)
        valid = shrink_label(torch.cat([valid_l, confidence >= args.weak_threshold]), size)
        if partial:  # nearest sampling alone would lose most known pixels (not in the paper)
            known = shrink_known(known, size)
            label = torch.where(known != IGNORE, known, label)
            valid = valid | (known != IGNORE)
        valid = valid & (label != IGNORE)
        prob = logits.softmax(dim=1)
    return reco_loss(rep, label, prob, valid, **reco_settings(args))


def train_step(
    batch_l, batch_u, student, teacher, optimizer, accelerator, args, rng, mark=lambda part: None
) -> tuple[dict, dict]:
    """One step on a labelled and an unlabelled batch on the host, each (images uint8 [B, 3, h, w],
    labels uint8 [B, h, w], ...), of any number B each.

    Returns the losses and shares for the curves (name -> float []) and the tensors for the
    pictures, none of which the host has waited for. `student` is the network as Accelerate wraps
    it; `mark` is told when a part of the step is done (bench.py times them)."""
    device = accelerator.device
    images_l, images_u = to_float(batch_l[0], device), to_float(batch_u[0], device)
    label_l, known = (to_device(batch[1], device).long() for batch in (batch_l, batch_u))
    mark("data")

    # the teacher labels the weakly cropped images; then the student's view of them is made:
    # scale, crop, mix, colour, blur, flip
    images_l, label_l, _ = augment(images_l, label_l, None, rng)
    mark("augmentation")
    label_u, confidence = pseudo_label(teacher, images_u, known, accelerator)
    mark("teacher")
    crop, scale = tuple(args.crop_size), tuple(args.scale)
    view = batch_scale_crop(images_u, label_u, confidence, crop, scale, rng, args.partial)
    view = mix(*view, args.mixing_strategy, fill=teacher.model.mean[0])
    images_u, label_u, confidence = augment(*view, rng)
    mark("augmentation")

    # each batch passes the student with its own batch-norm statistics
    logits_l, rep_l = student(images_l)  # [B, C, h, w], [B, D, h, w]
    logits_u, rep_u = student(images_u)
    full_l, full_u = (upsample(x, label_l.shape[-2:]) for x in (logits_l, logits_u))
    supervised = supervised_loss(full_l, label_l, accelerator)
    unsupervised, eta = unsupervised_loss(
        full_u, label_u, confidence, args.reco_threshold, accelerator
    )
    loss = supervised + unsupervised
    losses = {
        "loss/supervised": supervised.detach(),
        "loss/unsupervised": unsupervised.detach(),
        "teacher/eta": eta.mean(),
        "teacher/share above weak threshold": (confidence >= args.weak_threshold).float().mean(),
        "teacher/share above strong threshold": (confidence >= args.reco_threshold).float().mean(),
    }
    shown = {
        "images": torch.cat([images_l, images_u]),
        "label": torch.cat([label_l, label_u]),
        "confidence": torch.cat([(label_l != IGNORE).float(), confidence]),
    }
    mark("student forward")

    if args.reco:
        logits, rep = torch.cat([logits_l, logits_u]), torch.cat([rep_l, rep_u])
        reco, stats = contrast(
            logits, rep, full_l, label_l, label_u, confidence, args.partial, args
        )
        loss = loss + args.reco_weight * reco
        losses |= reco_curves(reco, stats)
        shown |= reco_pictures(rep, stats)
    elif rep_l is not None:  # distributed training waits for a gradient of every parameter
        loss = loss + 0 * (rep_l.sum() + rep_u.sum())
    mark("ReCo")

    accelerator.backward(loss)
    mark("backward")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler found an overflow
        teacher.update(accelerator.unwrap_model(student, keep_torch_compile=False))
    mark("optimiser + EMA")
    return {"loss/total": loss.detach(), **losses}, shown


def training_loaders(args, source, division, accelerator, start: int) -> list[Loader]:
    """The labelled and the unlabelled batches of the steps from `start` on."""
    common = args, accelerator, start
    labelled = dict(batch_size=labelled_batch(args), stream=0, scale=args.scale)
    # scaled only after the teacher saw them
    unlabelled = dict(batch_size=args.batch_size, stream=1, scale=(1.0, 1.0))
    return [
        training_loader("labelled", source, division.labelled, *common, **labelled),
        training_loader("unlabelled", source, division.unlabelled, *common, **unlabelled),
    ]


def main() -> None:
    args = parse_options()
    accelerator = run.start_accelerator(args)
    folder = checkpoint.choose_folder(args, accelerator)

    # the data, and which images and pixels count as labelled
    source = load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    labels = args.num_labeled, args.label_ratio, args.labeled_list
    division = divide(source, *labels, args.seed, quiet=not accelerator.is_main_process)
    args.partial = division.partial

    # the student, its optimiser, and the teacher: a copy of the bare network
    state = checkpoint.load_state(folder) if args.resume else None
    model, config = run.new_model(args, source, accelerator, fresh=state is None)
    optimizer = run.new_optimizer(args, model)
    teacher = MeanTeacher(model, compiled=args.compile)
    student, optimizer = accelerator.prepare(model, optimizer)  # student: `model`, wrapped

    # what there is to go on from
    record = Record(args, accelerator, folder, source, config)
    parts = dict(model=model, optimizer=optimizer, teacher=teacher, scaler=accelerator.scaler)
    if args.resume:
        run.check_resumed(accelerator, folder, source, division)
    if state:
        checkpoint.restore(state, record, **parts)
    state = None  # as large as the networks and the optimiser

    # batches of the steps that remain
    loaders = training_loaders(args, source, division, accelerator, record.step)
    val_loader = validation_loader(args, source, accelerator)
    record.announce(division, loaders)
    networks = {"teacher": teacher.model, "student": model}  # the first is the one to keep

    val_loader.start()  # now, so that no validation starts a process
    student.train()
    # the weights of --init-from stay until others are better; lost ones are made again
    if record.best is None and (args.init_from or record.history):
        record.validate(networks, val_loader)
    batches = zip(*loaders, strict=True)
    for step, (batch_l, batch_u) in enumerate(batches, start=record.step):
        rate = run.set_learning_rate(optimizer, args, accelerator, step)
        rng = run.seed_step(args.seed, step, accelerator.process_index)
        if step < args.warmup_iterations:
            losses, shown = train_supervised.train_step(
                batch_l, student, optimizer, accelerator, args, rng, contrast=False
            )
            if not accelerator.optimizer_step_was_skipped:
                teacher.update(model)
            teacher.copy_statistics(model)
        else:
            losses, shown = train_step(
                batch_l, batch_u, student, teacher, optimizer, accelerator, args, rng
            )
        record.add(step, losses)
        stop = record.stop_requested()
        if record.is_due(args.log_interval):
            record.log_means(rate)
        if record.is_due(args.val_interval):
            with record.paused():
                record.validate(networks, val_loader)
                record.show(teacher.model, val_loader.dataset, shown)
        if record.is_due(args.save_interval) or stop:
            with record.paused():
                record.check_weights(model)
                if accelerator.is_main_process:
                    checkpoint.save_state(folder, record, **parts)
        if stop and step + 1 < args.iterations:
            record.leave(stop)
    record.finish(teacher.model, val_loader.dataset)


if __name__ == "__main__":
    launch(main)
