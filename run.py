"""Start of a run: devices, network, optimiser, learning rate, seeds, and the line that says so."""

import argparse
import os
import shlex
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from timm.layers import convert_sync_batchnorm
from torch import nn

from checkpoint import load_weights, read_config, read_weights
from data import Source
from devices import memory_format
from errors import UserError, first_line, need, note
from labels import Division, fingerprint
from models import DeepLabV3Plus
from processes import COLLECTIVE_LIMIT, cores, start_server


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate with the run's precision, tracker and time limit for collectives."""
    for option in () if args.resume else ("labeled_list", "backbone_weights"):
        path = getattr(args, option)  # it is read only after the data set
        need(
            path is None or Path(path).is_file(),
            f"--{option.replace('_', '-')} {path}: no such file",
        )
    if args.num_workers:
        start_server()
    # a resumed run keeps its precision (the launcher says "no" where nothing was asked for;
    # check_resumed refuses another)
    unasked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no"
    accelerator = Accelerator(
        mixed_precision=getattr(args, "mixed_precision", None) if unasked else None,
        log_with=None if args.log_with == "none" else args.log_with,
        project_dir=".",
        dynamo_backend="inductor" if args.compile else None,
        kwargs_handlers=[
            # rank 0's batch-norm statistics go round before a validation (record.py): sent at every
            # forward they would change what the first of two keeps for its gradient, which
            # PyTorch 2.11 refuses
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=COLLECTIVE_LIMIT),
        ],
    )
    device, processes = accelerator.device.type, accelerator.num_processes
    need(
        accelerator.mixed_precision != "fp16" or device != "cpu",
        "mixed precision fp16 needs a GPU; on a CPU train with bf16 or without",
    )
    need(
        not (args.reco and args.reco_sampling == "independent") or processes == 1,
        "--reco-sampling independent runs on one process only: its keys are too many to exchange",
    )
    # `accelerate launch` allows one thread where nobody said how many, plain python all
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if device == "cpu" and processes == 1 and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(cores())
    if device == "mps":
        note(
            "on Apple's GPU this was not tested; should it fail, or learn nothing, "
            "ACCELERATE_USE_CPU=1 trains on the CPU"
        )
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return accelerator


def new_model(
    args: argparse.Namespace, source: Source, accelerator: Accelerator, fresh: bool = True
) -> tuple[DeepLabV3Plus, dict]:
    """The network on the device and what config.json says of it; with its first weights (`fresh`),
    or without, where a checkpoint brings them."""
    torch.manual_seed(args.seed)
    shape = dict(
        num_classes=len(source.classes),
        backbone=args.backbone,
        rep_dim=args.rep_dim if args.model == "reconet" else None,
        output_stride=args.output_stride,
        decoder_stride=args.decoder_stride,
        channels=args.channels,
        low_channels=args.low_channels,
        aspp_rates=args.aspp_rates,
    )
    pretrained = args.pretrained and fresh and not args.init_from
    weights = args.backbone_weights if pretrained else None
    model = DeepLabV3Plus(**shape, pretrained=pretrained, backbone_weights=weights)
    check_crop(model, args)
    if args.init_from and fresh:
        init_from(model, Path(args.init_from), source.classes)
    config = {
        "model": {
            **shape,
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": source.classes,
        "palette": source.palette,
        "crop_size": args.crop_size,
        "size": source.size,
        "arguments": vars(args),
    }
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # a process holds few images: batch norm takes its statistics from those of all.
        # timm's conversion keeps the activations of its own norm layers
        model = convert_sync_batchnorm(model)
    if args.backbone_lr_scale == 0:
        model.freeze_backbone()
    device = accelerator.device
    return model.to(device, memory_format=memory_format(device)), config


def check_crop(model: DeepLabV3Plus, args: argparse.Namespace) -> None:
    """UserError where nothing is left of the training crop in the depth of the backbone."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *args.crop_size))
    except Exception as error:  # whatever the backbone's code raises
        sides = " ".join(map(str, args.crop_size))
        reason = first_line(error)
        raise UserError(
            f"--crop-size {sides} does not suit --backbone {args.backbone} ({reason}); take a "
            "larger crop, or another backbone"
        ) from error
    model.train()


def init_from(model: DeepLabV3Plus, folder: Path, classes: list[str]) -> None:
    """The weights of a finished run of the same classes (--init-from). The head of the
    representation begins at random where the run has none."""
    need(
        read_config(folder)["classes"] == classes,
        f"--init-from {folder}: was trained on other classes than those of this data set",
    )
    weights = read_weights(folder / "model.safetensors")
    ours, theirs = (
        {key for key in state if key.startswith("representation.")}
        for state in (model.state_dict(), weights)
    )
    if not ours:
        weights = {key: value for key, value in weights.items() if key not in theirs}
    elif not theirs:
        weights |= {key: value for key, value in model.state_dict().items() if key in ours}
    load_weights(model, weights, f"--init-from {folder}")


def new_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, as in the paper, or AdamW. The backbone's rate may be another
    (`lr_scale` times the heads'); a frozen backbone is not the optimiser's."""
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0}]
    if args.backbone_lr_scale != 1:
        own = list(model.backbone.parameters())
        heads = [p for n, p in model.named_parameters() if not n.startswith("backbone.")]
        groups = [{"params": heads, "lr_scale": 1.0}]
        if args.backbone_lr_scale > 0:
            groups.append({"params": own, "lr_scale": args.backbone_lr_scale})
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options)


def base_learning_rate(args: argparse.Namespace, processes: int) -> float:
    """--lr as given; the recipe's in proportion to the global batch."""
    if args.lr_given:
        return args.lr
    return args.lr * args.batch_size * processes / args.recipe_batch


def learning_rate(base: float, step: int, iterations: int) -> float:
    """Polynomial decay of power 0.9 with a floor of 1e-6, or of a base below that; a function of
    the step, so it ends where it should on any number of processes."""
    return max(base * (1 - step / iterations) ** 0.9, min(base, 1e-6))


def set_learning_rate(optimizer, args, accelerator: Accelerator, step: int) -> float:
    """Give the optimiser the rate of a step (from 0), and return that of the heads."""
    base = base_learning_rate(args, accelerator.num_processes)
    rate = learning_rate(base, step, args.iterations)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)  # older checkpoints have none
    return rate


def seed_step(seed: int, step: int, rank: int) -> np.random.Generator:
    """Everything drawn in a step is a function of (seed, step, process): torch is seeded for the
    sampling and the mixing, the generator returned draws the augmentation."""
    sequence = np.random.SeedSequence([seed, 7, step, rank])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)


def check_resumed(
    accelerator: Accelerator, folder: Path, source: Source, division: Division
) -> None:
    """UserError where processes, precision, classes or data are not those of the run."""
    config = read_config(folder)
    saved = config["arguments"]
    now = {
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    differing = [
        f"{name.replace('_', ' ')} {value} (the run: {saved[name]})"
        for name, value in now.items()
        if saved[name] != value
    ]
    data = fingerprint(source, division)
    before = config.get("data", {})  # a run of an older version has none, or fewer parts
    differing += [f"other {part}" for part in data if data[part] != before.get(part, data[part])]
    if config["classes"] != source.classes:
        differing.append("the classes (classes.txt has changed)")
    need(
        not differing,
        f"--resume {folder}: {', '.join(differing)} would change the result; put back what the run "
        f"had, or begin a new one with --init-from {folder}",
    )


def start_line(
    args, accelerator: Accelerator, folder: Path, source: Source, config, division, loaders
) -> str:
    """Data, network, devices, global batch and rate of a run in one line."""
    kind = ""
    if args.label_ratio:
        kind = f" with {args.label_ratio} partial labels"
    elif division.partial:
        kind = " with sparse masks: the partial-label recipe is on"
    semi, processes = hasattr(args, "mixing_strategy"), accelerator.num_processes
    images = f"{len(division.labelled)} labelled{kind}"
    batches = " + ".join(str(loader.sampler.batch_size * processes) for loader in loaders)
    if semi:
        images += f" + {len(division.unlabelled)} unlabelled"
    rate = f"{args.optimizer}, {describe_rates(args, processes)}"
    device, precision = accelerator.device.type, accelerator.mixed_precision
    hardware = f"{device} x {processes}, precision {'fp32' if precision == 'no' else precision}"
    if processes > 1 and device == "cuda":
        hardware += ", SyncBatchNorm"
    size = f"{config['parameters'] / 1e6:.1f} M parameters"
    return " | ".join(
        [
            f"{source.name}: {images}, {len(source.val)} validation images, "
            f"{len(source.classes)} classes",
            f"{args.method}, {args.model} on {args.backbone}, {size}",
            hardware,
            f"global batch {batches}, {rate}",
            f"writes to {folder}",
        ]
    )


def describe_rates(args: argparse.Namespace, processes: int) -> str:
    """The learning rates of heads and backbone, and where they come from."""
    base, batch = base_learning_rate(args, processes), args.batch_size * processes
    text = f"learning rate {base:g}"
    if not args.lr_given and batch != args.recipe_batch:
        text += f" = {args.lr:g} x {batch}/{args.recipe_batch}, in proportion to the batch"
        text += "; --lr overrides"
    if args.backbone_lr_scale == 0:
        text += ", backbone frozen"
    elif args.backbone_lr_scale != 1:
        text += f", backbone {base * args.backbone_lr_scale:g}"
    return text


def resume_command(args: argparse.Namespace, folder: Path) -> str:
    """How to go on with the run, on as many processes of the same kind."""
    options = f"--out-dir {shlex.quote(str(folder))} --resume"
    processes, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes > here:
        return f"the command of every machine, with {options}"
    launcher = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    on_cpu = "ACCELERATE_USE_CPU=1 " if parse_flag_from_env("ACCELERATE_USE_CPU") else ""
    return f"{on_cpu}{launcher} {args.script} {options}"
