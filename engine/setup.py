"""The start of a run: device, optimiser, learning rate, seeds, and the line that describes it."""

import argparse
import os
import shlex
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch import nn

from engine.checkpoint import read_config
from engine.processes import COLLECTIVE_LIMIT, cores, start_server
from inputs.errors import UserError, first_line, need, note
from inputs.labels import Split, fingerprint
from inputs.source import Source


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate with the run's precision, tracker and time limit for collectives; UserError for a
    missing file or a launch that cannot work."""
    for option in () if args.resume else ("labeled_list", "backbone_weights"):
        path = getattr(args, option)  # check it now: it is read after the data set
        need(
            path is None or Path(path).is_file(),
            f"--{option.replace('_', '-')} {path}: no such file",
        )
    if args.num_workers:
        start_server()
    # A resumed run keeps its precision unless the launcher sets one ("no" is its default);
    # check_resumed refuses another
    default_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no"
    try:
        accelerator = Accelerator(
            mixed_precision=getattr(args, "mixed_precision", None) if default_precision else None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=None if args.log_with == "none" else args.log_with,
            project_dir=".",
            dynamo_backend="inductor" if args.compile else None,
            kwargs_handlers=[
                # No broadcast of batch-norm statistics at every forward: the second forward of a
                # step would change what the first keeps for its gradient. record.py shares them
                # before a validation. Supervised warm-up steps leave the representation unused
                DistributedDataParallelKwargs(
                    broadcast_buffers=False,
                    find_unused_parameters=args.reco and getattr(args, "warmup_iterations", 0) > 0,
                ),
                InitProcessGroupKwargs(timeout=COLLECTIVE_LIMIT),
            ],
        )
    except (ImportError, ValueError) as error:
        raise UserError(
            f"Accelerate's settings cannot work here ({first_line(error)}); change those of "
            "`accelerate config`, `accelerate launch` or the ACCELERATE_... variables"
        ) from None
    check_launch(accelerator)
    set_up_device(accelerator)
    return accelerator


def check_launch(accelerator: Accelerator) -> None:
    """UserError for a launch that cannot work."""
    processes = accelerator.num_processes
    launched = int(os.environ.get("WORLD_SIZE", 1))
    need(
        launched == processes,
        f"{launched} processes were launched, but Accelerate sees {processes}: without GPUs set "
        "ACCELERATE_USE_CPU=1, or launch one process",
    )
    need(
        accelerator.distributed_type == "NO" or accelerator.distributed_type.startswith("MULTI_"),
        f"Accelerate's {accelerator.distributed_type.value} cannot work here; use MULTI_GPU",
    )
    need(
        accelerator.mixed_precision != "fp16" or accelerator.device.type != "cpu",
        "mixed precision fp16 needs a GPU; on a CPU train with bf16 or without",
    )


def set_up_device(accelerator: Accelerator) -> None:
    """Threads of a CPU, a note on Apple's GPUs, TF32 and cuDNN's autotuner."""
    device = accelerator.device.type
    # `accelerate launch` sets one thread if the user sets none; plain python uses all cores
    one_thread = os.environ.get("OMP_NUM_THREADS") == "1"
    by_accelerate = one_thread and "ACCELERATE_MIXED_PRECISION" in os.environ
    if device == "cpu" and accelerator.num_processes == 1 and by_accelerate:
        torch.set_num_threads(cores())
    if device == "mps":
        note(
            "not tested on Apple's GPUs; if it fails or learns nothing, train on the CPU with "
            "ACCELERATE_USE_CPU=1"
        )
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def new_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, as in the paper, or AdamW. The backbone may have its own learning
    rate (`lr_scale` times that of the heads); a frozen backbone (0) is left out."""
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


def learning_rate(base: float, step: int, iterations: int) -> float:
    """Polynomial decay of power 0.9 with a floor of 1e-6 (a smaller base stays). It depends on the
    step only, not on the number of processes."""
    return max(base * (1 - step / iterations) ** 0.9, min(base, 1e-6))


def start_step(
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    step: int,
    micro_step: int,
) -> np.random.Generator:
    """Set the learning rate of a step and the seed of a micro-step. All draws are a function of
    (seed, micro-step, rank): torch's generator for sampling and mixing, the returned one for
    augmentation."""
    rate = learning_rate(args.lr, step, args.iterations)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    sequence = np.random.SeedSequence([args.seed, 7, micro_step, accelerator.process_index])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)


def check_resumed(accelerator: Accelerator, folder: Path, source: Source, split: Split) -> None:
    """UserError if processes, precision, classes or data differ from those of the run."""
    config = read_config(folder)
    saved = config["arguments"]
    differing = [
        f"{name.replace('_', ' ')} {value} (the run: {saved[name]})"
        for name, value in launch_settings(accelerator).items()
        if saved[name] != value
    ]
    data = fingerprint(source, split)
    differing += [f"other {part}" for part in data if data[part] != config["data"][part]]
    if config["classes"] != source.classes:
        differing.append("the classes (classes.txt has changed)")
    need(
        not differing,
        f"--resume {folder}: {', '.join(differing)} would change the result; restore what the run "
        f"had, or start a new one with --init-from {folder}",
    )


def launch_settings(accelerator: Accelerator) -> dict:
    """The launcher's settings, for config.json."""
    precision = accelerator.mixed_precision
    return {"processes": accelerator.num_processes, "mixed_precision": precision}


def start_line(
    args: argparse.Namespace,
    accelerator: Accelerator,
    folder: Path,
    source: Source,
    config: dict,
    split: Split,
    loaders: list,
) -> str:
    """Data, network, device, global batch and learning rate of a run in one line."""
    processes, steps = accelerator.num_processes, accelerator.gradient_accumulation_steps
    kind = ""
    if args.label_ratio:
        kind = f" with {args.label_ratio} partial labels"
    elif split.partial:
        kind = " with sparse masks: the partial-label recipe is on"
    images = f"{len(split.labelled)} labelled{kind}"
    if len(loaders) > 1:
        images += f" + {len(split.unlabelled)} unlabelled"
    batches = " + ".join(str(loader.sampler.batch_size * processes * steps) for loader in loaders)
    if steps > 1:
        batches += f" (gradient accumulation over {steps} micro-batches)"
    rate = f"{args.optimizer}, learning rate {args.lr:g}"
    if args.backbone_lr_scale == 0:
        rate += ", backbone frozen"
    elif args.backbone_lr_scale != 1:
        rate += f", backbone {args.lr * args.backbone_lr_scale:g}"
    device, precision = accelerator.device.type, accelerator.mixed_precision
    hardware = f"{device} x {processes}, precision {'fp32' if precision == 'no' else precision}"
    if processes > 1 and device == "cuda":
        hardware += ", SyncBatchNorm"
    return " | ".join(
        [
            f"{source.name}: {images}, {len(source.val)} validation images, "
            f"{len(source.classes)} classes",
            f"{args.method}, {args.model} on {args.backbone}, "
            f"{config['parameters'] / 1e6:.1f} M parameters",
            hardware,
            f"global batch {batches}, {rate}",
            f"writes to {folder}",
        ]
    )


def resume_command(args: argparse.Namespace, folder: Path) -> str:
    """The command that resumes the run, on as many processes and the same kind of device."""
    options = f"--out-dir {shlex.quote(str(folder))} --resume"
    processes, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes > here:
        return f"the command of every machine, with {options}"
    launcher = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
    on_cpu = "ACCELERATE_USE_CPU=1 " if parse_flag_from_env("ACCELERATE_USE_CPU") else ""
    return f"{on_cpu}{launcher} {args.script} {options}"
