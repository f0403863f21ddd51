"""Supervised training from full or partial labels, with or without the regional contrast loss.

python train_supervised.py                                       # street, 20 labelled scenes, on whatever is there
accelerate launch train_supervised.py --reco
accelerate launch train_supervised.py --dataset cityscapes --data-path dataset/cityscapes --num-labeled 150 --val-interval 500 --model reconet
accelerate launch train_supervised.py --dataset cityscapes --data-path dataset/cityscapes --label-ratio p1 --seed 0 --val-interval 500 --model reconet
"""

import torch
from torch.nn import functional as F

import data
import processes
import run
from data import IGNORE
from models import upsample
from reco import reco_loss


def supervised_loss(logits: torch.Tensor, label: torch.Tensor, accelerator=None) -> torch.Tensor:
    """Mean cross-entropy over the labelled pixels; 0, not NaN, where there are none. logits [B, C, H, W], label [B, H, W] int64, 255 = ignored.
    With several processes their mean is the loss of the whole batch: each divides by the mean number of labelled pixels."""
    return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum") / mean_count(
        label != IGNORE, accelerator
    )


def mean_count(mask: torch.Tensor, accelerator=None) -> torch.Tensor:
    """Number of True pixels, the mean over the processes, at least a thousandth."""
    count = mask.sum().float()
    return (accelerator.reduce(count, "mean") if accelerator else count).clamp_min(1e-3)


def train_step(
    batch, student, optimizer, accelerator, args, rng, mark=lambda part: None
) -> tuple[dict, dict]:
    """One step on a batch (images uint8 [B, 3, h, w], labels uint8 [B, h, w], ...) on the host. Returns what the curves show (name -> float []) and
    what the pictures show, as tensors that nobody has waited for yet; `mark` is told when a part of the step is done (bench.py times them)."""
    device = accelerator.device
    images, label = data.to_float(batch[0], device), batch[1].to(device, non_blocking=True).long()
    mark("data")
    images, label, _ = data.augment(images, label, None, rng)
    images = data.normalise(images)
    mark("augmentation")

    logits, rep = student(images)  # [B, C, h, w], [B, D, h, w]
    supervised = supervised_loss(upsample(logits, label.shape[-2:]), label, accelerator)
    parts = {"loss/supervised": supervised.detach()}
    loss = supervised
    shown = {"images": images, "label": label, "confidence": (label != IGNORE).float()}
    mark("student forward")

    if args.reco:  # queries and keys from the labelled pixels alone
        small = data.shrink_label(label, rep.shape[-2:])
        contrast, stats = reco_loss(
            rep,
            small,
            logits.detach().softmax(dim=1),
            small != IGNORE,
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
    mark("optimiser + EMA")
    return {"loss/total": loss.detach(), **parts}, shown


def main() -> None:
    args = run.parse(run.training_parser(__doc__, semi=False), semi=False)
    accelerator = run.start_accelerator(args)
    folder = run.choose_folder(args, accelerator)

    source = data.load_source(args.dataset, args.data_path, args.max_size, args.cache_dir)
    labelled, _, partial = data.divide(
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
    student, optimizer = accelerator.prepare(model, optimizer)  # student: `model`, wrapped
    record = run.Record(args, accelerator, folder, source, config, labelled, None, partial, state)
    if state:
        record.restore(state, model, optimizer)
    loader = record.loader(labelled, stream=0, scale=tuple(args.scale))

    student.train()
    if args.init_from and not state:
        record.validate(
            {"student": model}
        )  # what the run starts from is its model until others are better
    for step, batch in enumerate(loader, start=record.step):
        rate = run.learning_rate(record.base_rate, step, args.iterations)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = run.seed_step(args.seed, step, accelerator.process_index)
        parts, shown = train_step(batch, student, optimizer, accelerator, args, rng)
        record.add(step, rate, parts)
        if record.validation_due:
            record.validate({"student": model}, shown)
        if record.saving_due:
            record.save(model, optimizer)
    record.finish(model)


if __name__ == "__main__":
    processes.launch(main)
