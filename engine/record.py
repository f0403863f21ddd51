"""The record of a run: progress, curves, validation, images, and the run folder."""

import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from engine import checkpoint, pictures
from engine.evaluation import evaluate, table
from engine.loaders import Loader
from engine.processes import COLLECTIVE_LIMIT, Stop, speak_for_itself
from engine.setup import check_resumed, launch_settings, resume_command, start_line
from inputs.errors import UserError, need
from inputs.files import write_json
from inputs.labels import Split, fingerprint
from inputs.source import Source


class Record:
    """What a run keeps from step to step (step, curves, history, best validation), and where it
    reports it: progress bar, tracker, TensorBoard, the run folder. It trains nothing."""

    def __init__(
        self,
        args,
        accelerator: Accelerator,
        folder: Path,
        source: Source,
        split: Split,
        config: dict,
    ):
        self.args, self.accelerator, self.folder = args, accelerator, folder
        self.source, self.split, self.config = source, split, config
        self.main = accelerator.is_main_process
        self.step, self.best, self.history, self.skipped = 0, None, [], 0
        self.pending, self.since = [], time.monotonic()  # (step, names, values) of the curves
        self.bar = self.writer = None
        self.stop = Stop()
        self.control = None  # the group of all ranks on the CPU, for signals
        if accelerator.num_processes > 1:
            limit = COLLECTIVE_LIMIT
            self.control = torch.distributed.new_group(backend="gloo", timeout=limit)

    # ----------------------------------------------------------------------------- before the steps
    def restore(self, state: dict | None, **parts) -> None:
        """Name the parts (model, optimizer, ...) that `after_step` saves. With --resume: check that
        data and launch are the run's, and load the state (None: the run has no checkpoint yet)."""
        self.parts = parts
        if self.args.resume:
            check_resumed(self.accelerator, self.folder, self.source, self.split)
        if state:
            checkpoint.restore(state, self, **parts)
            state.clear()  # it is as large as the networks and the optimiser

    def load_state_dict(self, state: dict) -> None:
        """What `state_dict` returned."""
        self.step, self.best = state["step"], state["best"]
        self.history, self.skipped = state["history"], state["skipped"]
        missing = [not (self.folder / "model.safetensors").exists()]
        broadcast_object_list(missing)  # all ranks act on the first one's answer
        if missing[0]:
            self.best = None  # `start` validates, which writes the weights

    def start(self, loaders: list[Loader], val_loader: Loader, **networks: nn.Module) -> None:
        """Describe the run in one line and start the loader processes. `networks` are evaluated;
        the first one is the model to keep. Only a first validation (see below) writes files."""
        self.loaders, self.val_loader, self.networks = loaders, val_loader, networks
        if not self.args.resume:
            self.config["data"] = fingerprint(self.source, self.split)
        run = self.args, self.accelerator, self.folder, self.source, self.config, self.split
        line = start_line(*run, loaders)
        if self.args.resume:
            line += f" | resumes at step {self.step} of {self.args.iterations}"
        self.say(line)
        speak_for_itself()
        val_loader.start()  # now, so that no validation starts a process
        # --init-from: validate now, its weights are the ones to beat; --resume: model.safetensors
        # is missing
        if self.best is None and (self.args.init_from or self.history):
            self.validate()

    def batches(self, loaders: list[Loader]) -> Iterator[tuple[int, int, tuple]]:
        """Yield (step, micro-step, one batch of each loader) for the remaining steps. A step has
        `gradient_accumulation_steps` micro-steps."""
        micro_steps = self.accelerator.gradient_accumulation_steps
        start = self.step * micro_steps
        for micro_step, batches in enumerate(zip(*loaders, strict=True), start):
            yield micro_step // micro_steps, micro_step, batches

    def open(self) -> None:
        """Open run folder, bar and tracker. This waits for the first step or validation, so that
        bad input found before leaves no files."""
        args = self.args
        if self.main and not args.resume:
            self.write_config()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=args.iterations,
            initial=self.step,
            unit="step",
            disable=not self.main,
            dynamic_ncols=True,
            file=sys.stderr if terminal else LogLines,
            mininterval=0.5 if terminal else 30,
        )
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        if args.log_with != "tensorboard":
            self.accelerator.init_trackers("reco", config=self.plain_arguments())
            return
        options = {"tensorboard": {"purge_step": self.step + 1}}
        self.accelerator.init_trackers("tensorboard", init_kwargs=options)
        if self.main:
            self.writer = self.accelerator.get_tracker("tensorboard", unwrap=True)

    def write_config(self) -> None:
        """Write labeled.txt, which claims the folder, and config.json."""
        checkpoint.hold(self.folder, "".join(f"{s.name}\n" for s in self.split.labelled))
        self.config["arguments"] = {**vars(self.args), **launch_settings(self.accelerator)}
        write_json(self.folder / "config.json", self.config)

    # ----------------------------------------------------------------------------------- every step
    def after_step(self, curves: dict[str, Tensor], to_plot: dict) -> None:
        """After every micro-step, with what `train_step` returns: keep the curves. After a step,
        whatever is due: log, validate, plot, save, stop."""
        if not self.bar:
            self.open()
        curves = curves | reco_curves(to_plot["reco"]) | self.share_curves(to_plot)
        values = torch.stack([value.detach() for value in curves.values()])
        self.pending.append((self.step, tuple(curves), values))  # on the device until they are due
        if not self.accelerator.sync_gradients:  # more micro-steps follow
            return
        self.step += 1
        self.skipped += int(self.accelerator.optimizer_step_was_skipped)
        self.bar.update()
        stop = self.stop_requested()
        if self.is_due(self.args.log_interval):
            self.log_means()
        entered = time.monotonic()
        if self.is_due(self.args.val_interval):
            self.validate()
            self.show(to_plot)
        if self.is_due(self.args.save_interval) or stop:
            self.check_weights()
            if self.main:
                checkpoint.save_state(self.folder, self, **self.parts)
        self.since += time.monotonic() - entered  # exclude this time from images/s
        if stop and self.step < self.args.iterations:
            self.leave(stop)

    def share_curves(self, to_plot: dict) -> dict[str, Tensor]:
        """The share of each class in the labels of a step, and in its pseudo-labels."""
        return {
            f"share/{name}, {of}": share
            for of, shares in to_plot.get("shares", {}).items()
            for name, share in zip(self.source.classes, shares, strict=True)
        }

    def is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.args.iterations

    def stop_requested(self) -> int:
        """The signal that asks for a stop, or 0; the same on every rank."""
        if not self.control:
            return self.stop.signal
        flag = torch.tensor(self.stop.signal)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.control)
        return int(flag)

    def log_means(self) -> None:
        """Log the means since the last call, and show the losses in the bar."""
        self.check_losses()
        columns = {}  # curve -> its values; the names change after the warm-up
        for _, names, values in self.pending:
            for name, value in zip(names, values, strict=True):
                columns.setdefault(name, []).append(value)
        means = torch.stack([torch.stack(column).mean() for column in columns.values()])
        means = self.accelerator.reduce(means, "mean").tolist()
        means = dict(zip(columns, means, strict=True))
        steps = len(self.pending)
        self.pending.clear()
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        batch = sum(loader.sampler.batch_size for loader in self.loaders)
        images = steps * batch * self.accelerator.num_processes
        losses = {name: value for name, value in means.items() if name.startswith("loss/")}
        short = {name.split("/")[1][:5]: f"{value:.3f}" for name, value in losses.items()}
        self.bar.set_postfix(short, refresh=False)
        skipped = {"skipped steps": self.skipped} if self.accelerator.scaler else {}
        rate = self.parts["optimizer"].param_groups[0]["lr"]
        speed = {"learning rate": rate, "images per second": images / seconds}
        self.log({**means, **speed, **skipped})

    def check_losses(self) -> None:
        """UserError if a loss was not finite since the last call of `log_means`. The batch is
        written to the run folder."""
        if not self.pending:
            return
        finite = torch.stack([values.isfinite().all() for _, _, values in self.pending]).tolist()
        if all(finite):
            return
        step, names, values = self.pending[finite.index(False)]
        pairs = zip(names, values.tolist(), strict=True)
        losses = ", ".join(f"{name} {value:g}" for name, value in pairs)
        # a batch is a function of (seed, step), so it can be read again
        k = self.accelerator.gradient_accumulation_steps
        micro_steps = range(step * k, (step + 1) * k)
        batches = [batch_of_step(loader, m) for m in micro_steps for loader in self.loaders]
        name = f"nonfinite-step{step}-process{self.accelerator.process_index}.pt"
        checkpoint.write_torch(self.folder / name, batches)
        raise UserError(
            f"the loss was not finite at step {step} ({losses}); the last good checkpoint "
            f"is kept, the batch is in {self.folder / name}. A smaller --lr, or bf16 instead of "
            "fp16, usually helps"
        )

    def check_weights(self) -> None:
        """UserError if a loss or a weight is not finite, before it gets into a checkpoint."""
        self.check_losses()
        norms = torch.stack(torch._foreach_norm(list(self.parts["model"].parameters())))
        need(
            torch.isfinite(norms).all(),  # the same on every process
            f"the weights were not finite after step {self.step - 1}, though the losses were; the "
            "last good checkpoint is kept. A smaller --lr usually helps",
        )

    def state_dict(self) -> dict:
        """The entries of the checkpoint that `load_state_dict` restores."""
        return {name: getattr(self, name) for name in ("step", "best", "history", "skipped")}

    # ----------------------------------------------------------------------------------- validation
    def validate(self) -> None:
        """Evaluate the networks on all validation images; keep the first one if it is the best so
        far."""
        if not self.bar:
            self.open()
        self.check_weights()
        entry = {"step": self.step}
        for name, network in self.networks.items():
            if self.control:  # evaluate what is saved: rank 0's batch-norm statistics
                for buffer in network.buffers():
                    torch.distributed.broadcast(buffer, 0)
            results, confusion = evaluate(
                network,
                self.val_loader,
                len(self.source.classes),
                self.accelerator,
                progress=f"validating the {name}",
            )
            entry |= {f"{name} {key}": results[key] for key in ("miou", "boundary_iou", "accuracy")}
            if "miou" not in entry:
                entry |= {**results, "confusion": confusion.tolist()}
        entry["kept"] = self.best is None or entry["miou"] > self.best["miou"]
        self.history.append(entry)
        if entry["kept"]:
            self.best = entry
        if self.main:
            if entry["kept"]:
                checkpoint.write_weights(self.folder, next(iter(self.networks.values())))
            write_json(self.folder / "history.json", self.history)
        self.report_validation(entry)

    def report_validation(self, entry: dict) -> None:
        """Print a validation as one line (*: kept) and log it."""
        line = (
            f"step {self.step}: validation mIoU {100 * entry['miou']:.2f}, boundary IoU "
            f"{100 * entry['boundary_iou']:.2f}, pixel accuracy {100 * entry['accuracy']:.2f}"
        )
        line += "".join(
            f", {name} {100 * entry[f'{name} miou']:.2f}" for name in list(self.networks)[1:]
        )
        self.say(line + (" *" if entry["kept"] else ""))
        curves = {k: v for k, v in entry.items() if isinstance(v, float) and " " in k}
        iou = zip(self.source.classes, entry["iou"], strict=True)
        self.log({f"validation/{name}": value for name, value in curves.items()})
        self.log({f"validation IoU/{name}": v for name, v in iou if v is not None})

    def show(self, to_plot: dict) -> None:
        """Log validation images, the training step, confusion matrix and class relations."""
        if not self.writer:
            return
        palette, names = self.source.palette, self.source.classes
        network = next(iter(self.networks.values()))
        images, device = self.val_loader.dataset, self.accelerator.device
        confusion = torch.tensor(self.history[-1]["confusion"])
        figures = {
            "validation": pictures.draw_validation(network, images, palette, device),
            "training": pictures.draw_training(to_plot, palette),
            "confusion (row: truth)": pictures.draw_confusion(confusion, names),
        }
        if to_plot["reco"]:
            relation = pictures.heat_map(to_plot["reco"]["relation"].cpu(), names)
            figures["class relation (row: query class)"] = relation
        for name, figure in figures.items():
            self.writer.add_figure(name, figure, self.step)

    # -------------------------------------------------------------------------------------- the end
    def leave(self, signal: int) -> None:
        """End a run that was asked to stop, after its checkpoint: print how to resume, and exit."""
        self.bar.close()
        self.accelerator.wait_for_everyone()
        self.say(
            f"stopped at step {self.step} of {self.args.iterations}, saved. Resume with: "
            f"{resume_command(self.args, self.folder)}"
        )
        self.close()
        sys.exit(128 + signal)

    def finish(self) -> None:
        """Log the representations, print the best validation and the command for predictions."""
        if self.bar:
            self.bar.close()
        if self.writer:
            if self.args.model == "reconet":
                network, images = next(iter(self.networks.values())), self.val_loader.dataset
                device = self.accelerator.device
                pictures.add_embedding(self.writer, network, images, self.source, device, self.step)
            scores = {f"hparam/{key}": self.best[key] for key in ("miou", "boundary_iou")}
            self.writer.add_hparams(self.plain_arguments(), scores, run_name=".")
        self.say(table(self.best, self.source.classes))
        self.say(
            f"best validation mIoU {100 * self.best['miou']:.2f} at step {self.best['step']} of "
            f"{self.args.iterations}; weights in {self.folder / 'model.safetensors'}\n"
            f"predict with: python predict.py {shlex.quote(str(self.folder))} IMAGE_OR_FOLDER "
            "--out-dir predictions"
        )
        self.close()

    def close(self) -> None:
        """Accelerate's end_training without the end of the process group: `launch` ends that after
        the network is freed."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    # ------------------------------------------------------------------------------ used throughout
    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def log(self, values: dict) -> None:
        self.accelerator.log(values, step=self.step)

    def plain_arguments(self) -> dict:
        """The options that trackers accept: no lists, no None."""
        plain = (int, float, str, bool)
        return {k: v for k, v in vars(self.args).items() if isinstance(v, plain)}


class LogLines:
    """The progress bar in a log file: lines instead of carriage returns."""

    @staticmethod
    def write(text: str) -> None:
        sys.stderr.write(text.replace("\r", "\n"))

    @staticmethod
    def flush() -> None:
        sys.stderr.flush()


def reco_curves(stats: dict) -> dict[str, Tensor]:
    """The curves of ReCo: loss, classes present, hard pixels."""
    if not stats:
        return {}
    return {
        "loss/reco": stats["loss"],
        "reco/classes": stats["num_classes"].float(),
        "reco/hard pixels": stats["num_hard"].sum().float(),
    }


def batch_of_step(loader, step: int) -> list[Tensor]:
    """The batch of a training loader at a micro-step, read once more."""
    return default_collate([loader.dataset[key] for key in loader.sampler.batch(step)])
