"""Semi-supervised training: mean teacher, image mixing and the regional contrast loss, from full or partial labels.

python train_semi.py --reco                                      # street, 20 labelled scenes, on whatever is there
accelerate launch train_semi.py --reco
accelerate launch train_semi.py --dataset cityscapes --data-path dataset/cityscapes --num-labeled 150 --val-interval 500 --model reconet --mixing-strategy classmix --reco
accelerate launch train_semi.py --dataset cityscapes --data-path dataset/cityscapes --label-ratio p0 --seed 0 --val-interval 500 --model reconet --mixing-strategy classmix --reco
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import data
import processes
import run
from data import IGNORE
from mixing import mix
from models import MeanTeacher, upsample
from reco import reco_loss
from train_supervised import mean_count, supervised_loss


def unsupervised_loss(
    logits: Tensor, target: Tensor, confidence: Tensor, strong_threshold: float, accelerator=None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with pseudo-labels, each image weighted by how sure its teacher is (paper, section 3.3).

    logits [B, C, H, W]; target [B, H, W] int64, 255 = ignored; confidence [B, H, W]. eta of an image = its pixels of confidence >=
    strong_threshold / its pixels not ignored. The loss is the mean, over all pixels of the batch with a positive cross-entropy, of
    eta times the pixel's cross-entropy; 0 where there is no such pixel. Returns the loss and eta [B].
    """
    eta = (confidence >= strong_threshold).sum(dim=(1, 2)) / (target != IGNORE).sum(
        dim=(1, 2)
    ).clamp_min(1)
    cross_entropy = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    return (eta[:, None, None] * cross_entropy).sum() / mean_count(
        cross_entropy > 0, accelerator
    ), eta


@torch.no_grad()
def pseudo_label(
    teacher: MeanTeacher, images: Tensor, known: Tensor | None, accelerator
) -> tuple[Tensor, Tensor]:
    """The teacher's argmax and its probability, [B, H, W] each, at full resolution; known pixels ([B, H, W], 255 = unknown) overwrite them."""
    with accelerator.autocast():
        logits, _ = teacher.label(data.normalise(images))
    confidence, label = upsample(logits.float(), images.shape[-2:]).softmax(dim=1).max(dim=1)
    if known is not None:
        label = torch.where(known != IGNORE, known, label)
        confidence = torch.where(known != IGNORE, 1.0, confidence)
    return label, confidence


def train_step(
    step,
    batch_l,
    batch_u,
    student,
    model,
    teacher,
    optimizer,
    accelerator,
    args,
    partial,
    rng,
    mark=lambda part: None,
) -> tuple[dict, dict]:
    """One step on a labelled and an unlabelled batch, each (images uint8 [B, 3, h, w], labels uint8 [B, h, w], ...), on the host.

    Returns what the curves show (name -> float []) and what the pictures show, as tensors that nobody has waited for yet. `student` is `model`
    as Accelerate wraps it; `partial`: the labels are sparse; `mark` is told when a part of the step is done (bench.py times them)."""
    device, warming_up = accelerator.device, step < args.warmup_iterations
    images_l, label_l = (
        data.to_float(batch_l[0], device),
        batch_l[1].to(device, non_blocking=True).long(),
    )
    images_u, known_u = (
        data.to_float(batch_u[0], device),
        batch_u[1].to(device, non_blocking=True).long(),
    )
    mark("data")
    images, label_l, _ = data.augment(images_l, label_l, None, rng)

    if not warming_up:
        # the teacher labels the weakly cropped images, then the student's view of them is made: scale, crop, mix, colour, blur, flip
        mark("augmentation")
        label_u, confidence = pseudo_label(
            teacher, images_u, known_u if partial else None, accelerator
        )
        mark("teacher")
        images_u, label_u, confidence = data.batch_scale_crop(
            images_u, label_u, confidence, tuple(args.crop_size), tuple(args.scale), rng
        )
        images_u, label_u, confidence = mix(
            images_u, label_u, confidence, args.mixing_strategy, fill=data.mean_colour(device)
        )
        images_u, label_u, confidence = data.augment(images_u, label_u, confidence, rng)
        images = torch.cat([images, images_u])
    images = data.normalise(images)
    mark("augmentation")

    # [2B, C, h, w], [2B, D, h, w] at the decoder's stride, labelled images first; [B, ...] while warming up
    if warming_up or args.joint_forward:
        logits, rep = student(images)
    else:  # each with its own batch-norm statistics
        passes = zip(student(images[: len(label_l)]), student(images[len(label_l) :]))
        logits, rep = (None if outputs[0] is None else torch.cat(outputs) for outputs in passes)
    full = upsample(logits, label_l.shape[-2:])
    full_l, full_u = full[: len(label_l)], full[len(label_l) :]
    loss = supervised = supervised_loss(full_l, label_l, accelerator)
    parts = {"loss/supervised": supervised.detach()}
    if not warming_up:
        unsupervised, eta = unsupervised_loss(
            full_u, label_u, confidence, args.reco_threshold, accelerator
        )
        loss = loss + unsupervised
        parts |= {
            "loss/unsupervised": unsupervised.detach(),
            "teacher/eta": eta.mean(),
            "teacher/share above weak threshold": (confidence >= args.weak_threshold)
            .float()
            .mean(),
            "teacher/share above strong threshold": (confidence >= args.reco_threshold)
            .float()
            .mean(),
        }
    shown = {
        "images": images,
        "label": label_l if warming_up else torch.cat([label_l, label_u]),
        "confidence": (label_l != IGNORE).float()
        if warming_up
        else torch.cat([(label_l != IGNORE).float(), confidence]),
    }
    mark("student forward")

    if args.reco and not warming_up:
        size = rep.shape[-2:]
        with torch.no_grad():
            prob = logits.softmax(dim=1)
            reco_label_l, valid_l = label_l, label_l != IGNORE
            if partial:  # beside the known pixels, those of which the student itself is sure
                sure, own = full_l.softmax(dim=1).max(dim=1)
                reco_label_l, valid_l = torch.where(valid_l, label_l, own), valid_l | (sure >= 0.97)
            label = data.shrink_label(torch.cat([reco_label_l, label_u]), size)
            valid = data.shrink_label(torch.cat([valid_l, confidence >= args.weak_threshold]), size)
        contrast, stats = reco_loss(
            rep,
            label,
            prob,
            valid & (label != IGNORE),
            args.reco_temp,
            args.reco_num_queries,
            args.reco_num_negatives,
            2.0 if args.reco_random_queries else args.reco_threshold,
            sampling=args.reco_sampling,
            active_keys=not args.reco_random_keys,
            return_stats=True,
        )
        loss = loss + args.reco_weight * contrast
        parts |= {
            "loss/reco": contrast.detach(),
            "reco/classes": stats["num_classes"].float(),
            "reco/hard pixels": stats["num_hard"].sum().float(),
        }
        shown |= {
            "queries": stats["queries"],
            "relation": stats["relation"],
            "rep_size": rep.shape[-2:],
        }
    elif rep is not None:
        loss = loss + 0 * rep.sum()  # distributed training waits for a gradient of every parameter
    mark("ReCo")

    accelerator.backward(loss)
    mark("backward")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler found an overflow
        teacher.update(model)
    if warming_up:
        teacher.copy_statistics(model)
    mark("optimiser + EMA")
    return {"loss/total": loss.detach(), **parts}, shown


def main() -> None:
    args = run.parse(run.training_parser(__doc__, semi=True), semi=True)
    accelerator = run.start_accelerator(args)
    folder = run.choose_folder(args, accelerator)

    source = data.load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    labelled, unlabelled, partial = data.divide(
        source,
        args.num_labeled,
        args.label_ratio,
        args.labeled_list,
        args.seed,
        quiet=not accelerator.is_main_process,
    )

    state = run.load_checkpoint(folder) if args.resume else None
    model, config = run.new_model(args, source, fresh=state is None)
    model = run.to_device(model, accelerator)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    teacher = MeanTeacher(model, compiled=args.compile)  # a copy of the bare network
    student, optimizer = accelerator.prepare(model, optimizer)  # student: `model`, wrapped
    record = run.Record(
        args, accelerator, folder, source, config, labelled, unlabelled, partial, state
    )
    if state:
        record.restore(state, model, optimizer, teacher)
    loader_l = record.loader(labelled, stream=0, scale=tuple(args.scale))
    loader_u = record.loader(unlabelled, stream=1, scale=(1.0, 1.0))

    student.train()
    if args.init_from and not state:
        record.validate(
            {"teacher": teacher.model, "student": model}
        )  # what the run starts from is its model until others are better
    for step, (batch_l, batch_u) in enumerate(zip(loader_l, loader_u), start=record.step):
        rate = run.learning_rate(record.base_rate, step, args.iterations)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = run.seed_step(args.seed, step, accelerator.process_index)
        parts, shown = train_step(
            step,
            batch_l,
            batch_u,
            student,
            model,
            teacher,
            optimizer,
            accelerator,
            args,
            partial,
            rng,
        )
        record.add(step, rate, parts)
        if record.validation_due:
            record.validate({"teacher": teacher.model, "student": model}, shown)
        if record.saving_due:
            record.save(model, optimizer, teacher)
    record.finish(teacher.model)


if __name__ == "__main__":
    processes.launch(main)
