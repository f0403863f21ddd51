"""Semi-supervised training: mean teacher, image mixing and the regional contrast loss, from full or
partial labels.

    python train_semi.py --reco                          # street, 20 labelled images
    accelerate launch train_semi.py --reco
    accelerate launch train_semi.py --reco --dataset cityscapes --data-path DIR --num-labeled 150
    accelerate launch train_semi.py --reco --dataset cityscapes --data-path DIR --label-ratio p0
"""

import argparse

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import train_supervised
from data import RECIPES, load_source
from engine import checkpoint
from engine.loaders import Loader, training_loader, validation_loader
from engine.options import (
    natural,
    parse,
    reco_options,
    share,
    size,
    training_parser,
)
from engine.processes import launch
from engine.record import Record
from engine.setup import new_optimizer, start_accelerator, start_step
from inputs.files import IGNORE
from inputs.labels import Split, split_train
from inputs.source import Source
from inputs.transforms import (
    augment,
    batch_scale_crop,
    shrink_known,
    shrink_label,
    to_device,
    to_float,
    upsample,
)
from mixing import STRATEGIES, mix
from models import MeanTeacher, new_model
from reco import class_shares, class_weights, reco_loss, supervised_loss, unsupervised_loss


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__, "train_semi.py", RECIPES)
    add = parser.add_argument_group("mean teacher and mixing").add_argument
    add("--mixing-strategy", choices=STRATEGIES, default="classmix", help="how images are mixed")
    add("--weak-threshold", type=share, default=0.7, help="ReCo ignores pseudo-labels below it")
    add(
        "--labeled-batch-size",
        type=size,
        metavar="N",
        help="labelled images per step and process (--batch-size; with partial labels twice that)",
    )
    add(
        "--warmup-iterations",
        type=natural,
        help="supervised steps before the unlabelled images join; from random weights (0)",
    )
    return parse(parser, RECIPES, argv)


@torch.no_grad()
def pseudo_label(
    teacher: MeanTeacher, images: Tensor, label_l: Tensor, accelerator: Accelerator, balance: float
) -> tuple[Tensor, Tensor]:
    """The teacher's prediction: images [B, 3, H, W] -> label int64 [B, H, W], the class of the
    highest probability, and confidence [B, H, W], that probability.

    A loss with class weights makes rare classes more likely than they are. A pixel is ignored
    (label 255, confidence 0) if another class wins without the weights, those of label_l (not in
    the paper)."""
    with accelerator.autocast():
        logits, _ = teacher.label(images)
    prob = upsample(logits.float(), images.shape[-2:]).softmax(dim=1)
    confidence, label = prob.max(dim=1)
    weight = class_weights(label_l, prob.shape[1], balance)
    if weight is not None:
        same = (prob / weight[:, None, None]).argmax(dim=1) == label
        label, confidence = torch.where(same, label, IGNORE), confidence * same
    return label, confidence


@torch.no_grad()
def strong_view(
    images: Tensor,
    label: Tensor,
    confidence: Tensor,
    known: Tensor,
    args: argparse.Namespace,
    rng: np.random.Generator,
    partial: bool,
    fill: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's view of pseudo-labelled images: scale, crop, mixing, colour, blur, flip.

    images [B, 3, H, W]; label, confidence and known [B, H, W]. Pixels of known classes (partial
    labels; 255 = unknown) replace the pseudo-label, with confidence 1. fill [3, 1, 1] is the
    colour that CutOut paints. Returns the four at the size of the crop."""
    maps = (label, IGNORE, False), (confidence, 0.0, False), (known, IGNORE, partial)
    view = batch_scale_crop(images, maps, tuple(args.crop_size), tuple(args.scale), rng)
    images, label, confidence, known = view
    label = torch.where(known != IGNORE, known, label)
    confidence = torch.where(known != IGNORE, 1.0, confidence)
    images, *maps = mix(images, label, confidence, args.mixing_strategy, fill, known)
    return augment(images, maps, rng)


@torch.no_grad()
def reco_targets(
    logits_l: Tensor,
    label_l: Tensor,
    label_u: Tensor,
    confidence: Tensor,
    known_u: Tensor,
    rep_size: tuple[int, int],
    weak_threshold: float,
    partial: bool,
) -> tuple[Tensor, Tensor]:
    """The label of each pixel and whether ReCo uses it, [A + B, h, w] each, at the size of rep:
    labelled pixels, and pseudo-labels of at least the weak threshold.

    logits_l [A, C, H, W] and label_l [A, H, W] of the labelled images; label_u, confidence and
    known_u [B, H, W]. partial: on labelled images also the student's own confident predictions."""
    valid_l = label_l != IGNORE
    known = torch.cat([label_l, known_u])
    if partial:
        student_confidence, prediction = logits_l.softmax(dim=1).max(dim=1)
        label_l = torch.where(valid_l, label_l, prediction)
        valid_l = valid_l | (student_confidence >= 0.97)
    label = shrink_label(torch.cat([label_l, label_u]), rep_size)
    valid = shrink_label(torch.cat([valid_l, confidence >= weak_threshold]), rep_size)
    if partial:  # nearest sampling alone would lose most known pixels (not in the paper)
        known = shrink_known(known, rep_size)
        label = torch.where(known != IGNORE, known, label)
        valid = valid | (known != IGNORE)
    return label, valid & (label != IGNORE)


def train_step(
    batch_l: tuple[Tensor, ...],
    batch_u: tuple[Tensor, ...],
    student: nn.Module,
    teacher: MeanTeacher,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    args: argparse.Namespace,
    rng: np.random.Generator,
    partial: bool = False,
) -> tuple[dict[str, Tensor], dict]:
    """One step on a labelled and an unlabelled CPU batch, which may differ in size: images uint8
    [B, 3, h, w], labels uint8 [B, h, w], ...

    partial  the labels are sparse, and the unlabelled batch has known pixels too
    Returns the curves and the images to plot, without GPU synchronisation."""
    # 1. move to the device, augment the labelled images
    images_l, images_u = (to_float(batch[0], accelerator.device) for batch in (batch_l, batch_u))
    label_l, known_u = (to_device(b[1], accelerator.device).long() for b in (batch_l, batch_u))
    images_l, label_l = augment(images_l, [label_l], rng)

    # 2. the teacher's pseudo-labels, and a strong view for the student
    pseudo = pseudo_label(teacher, images_u, label_l, accelerator, args.class_balance)
    view = images_u, *pseudo, known_u, args, rng, partial, teacher.model.mean[0]
    images_u, label_u, confidence, known_u = strong_view(*view)

    # 3. supervised and unsupervised loss; each batch has its own batch-norm statistics
    logits_l, rep_l = student(images_l)  # [A, C, h, w], [A, D, h, w]
    logits_u, rep_u = student(images_u)  # [B, C, h, w], [B, D, h, w]
    full_l, full_u = (upsample(logits, label_l.shape[-2:]) for logits in (logits_l, logits_u))
    supervised = supervised_loss(full_l, label_l, args.class_balance)
    pseudo_labelled = full_u, label_u, confidence, args.reco_threshold, args.class_balance
    unsupervised, eta = unsupervised_loss(*pseudo_labelled)
    loss, stats = supervised + unsupervised, {}

    # 4. ReCo on both batches
    if args.reco:
        targets = full_l, label_l, label_u, confidence, known_u, rep_l.shape[-2:]
        label, valid = reco_targets(*targets, args.weak_threshold, partial)
        prob = torch.cat([logits_l, logits_u]).detach().softmax(dim=1)
        rep = torch.cat([rep_l, rep_u])
        contrast, stats = reco_loss(rep, label, prob, valid, **reco_options(args))
        loss = loss + args.reco_weight * contrast
        stats |= dict(loss=contrast, rep_size=rep.shape[-2:])

    # 5. update the student, then the teacher
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
        teacher.update(accelerator.unwrap_model(student, keep_torch_compile=False))

    curves = {
        "loss/total": loss,
        "loss/supervised": supervised,
        "loss/unsupervised": unsupervised,
        "teacher/eta": eta.mean(),
        "teacher/share above weak threshold": (confidence >= args.weak_threshold).float().mean(),
        "teacher/share above strong threshold": (confidence >= args.reco_threshold).float().mean(),
    }
    C = logits_l.shape[1]
    shares = {"labels": class_shares(label_l, C), "pseudo-labels": class_shares(pseudo[0], C)}
    to_plot = dict(images=[images_l, images_u], label=[label_l, label_u], reco=stats)
    return curves, to_plot | dict(confidence=[label_l != IGNORE, confidence], shares=shares)


def training_loaders(
    args: argparse.Namespace, source: Source, split: Split, accelerator: Accelerator, start: int
) -> list[Loader]:
    """Loaders of the labelled and the unlabelled batches, from step `start` on."""
    # partial labels: twice as many labelled images (not in the paper), as in supervised training,
    # since mixing cuts up the few known pixels of the unlabelled batch
    number = args.labeled_batch_size or args.batch_size * (2 if split.partial else 1)
    balanced = args.balanced_sampling
    labelled = dict(batch_size=number, stream=0, scale=args.scale, balanced=balanced)
    # strong_view scales these, after the teacher has seen them
    unlabelled = dict(batch_size=args.batch_size, stream=1, scale=(1.0, 1.0))
    common = args, accelerator, start
    return [
        training_loader("labelled", source, split.labelled, *common, **labelled),
        training_loader("unlabelled", source, split.unlabelled, *common, **unlabelled),
    ]


def main() -> None:
    args = parse_options()
    accelerator = start_accelerator(args)
    folder = checkpoint.choose_folder(args, accelerator)

    # the data, and which images are labelled
    source = load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    split = split_train(source, args, quiet=not accelerator.is_main_process)

    # the student, its optimiser, and its teacher
    state = checkpoint.load_state(folder) if args.resume else None
    model, config = new_model(args, source, accelerator, fresh=state is None)
    optimizer = new_optimizer(args, model)
    options = dict(compiled=args.compile, average_statistics=args.average_statistics)
    teacher = MeanTeacher(model, **options)
    student, optimizer = accelerator.prepare(model, optimizer)  # `model`, wrapped

    # the run folder, or with --resume its state; the loaders
    record = Record(args, accelerator, folder, source, split, config)
    parts = dict(model=model, optimizer=optimizer, teacher=teacher, scaler=accelerator.scaler)
    record.restore(state, **parts)
    loaders = training_loaders(args, source, split, accelerator, record.step)
    val_loader = validation_loader(args, source, accelerator)
    record.start(loaders, val_loader, teacher=teacher.model, student=model)

    student.train()
    for step, micro_step, (batch_l, batch_u) in record.batches(loaders):
        rng = start_step(args, optimizer, accelerator, step, micro_step)
        common = optimizer, accelerator, args, rng, split.partial
        with accelerator.accumulate(student):
            if step < args.warmup_iterations:
                values = train_supervised.train_step(batch_l, student, *common, reco=False)
                if accelerator.sync_gradients:
                    teacher.update(model, statistics=True)
            else:
                values = train_step(batch_l, batch_u, student, teacher, *common)
        record.after_step(*values)
    record.finish()


if __name__ == "__main__":
    launch(main)
