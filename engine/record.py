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
    """What a run remembers between steps (step, curves, history, best validation), and where it
    shows it: progress bar, tracker, TensorBoard, the run folder. It trains nothing."""

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
        self.control = None  # exchanges signals between processes without the device
        if accelerator.num_processes > 1:
            limit = COLLECTIVE_LIMIT
            self.control = torch.distributed.new_group(backend="gloo", timeout=limit)

    # ---------------------------------------------------------------------------- before the steps
    def restore(self, state: dict | None, **parts) -> None:
        """With --resume: check that data and launch are the run's, and load the state of record and
        parts (model, optimizer, ...), which `after_step` saves. state: None before the first
        checkpoint."""
        self.parts = parts
        if self.args.resume:
            check_resumed(self.accelerator, self.folder, self.source, self.split)
        if state:
            checkpoint.restore(state, self, **parts)
            state.clear()  # it is as large as the networks and the optimiser

    def start(self, loaders: list[Loader], val_loader: Loader, **networks: nn.Module) -> None:
        """Describe the run in one line and start the loader processes. networks are evaluated; the
        first one is the model to keep. Nothing is written yet."""
        self.loaders, self.val_loader, self.networks = loaders, val_loader, networks
        if not self.args.resume:
            self.config["data"] = fingerprint(self.source, self.split)
        line = start_line(
            self.args,
            self.accelerator,
            self.folder,
            self.source,
            self.config,
            self.split,
            loaders,
        )
        if self.args.resume:
            line += f" | resumes at step {self.step} of {self.args.iterations}"
        self.say(line)
        speak_for_itself()
        val_loader.start()  # now, so that no validation starts a process
        # with --init-from: its weights are the ones to beat; on --resume: model.safetensors is lost
        if self.best is None and (self.args.init_from or self.history):
            self.validate()

    def batches(self, loaders: list[Loader]) -> Iterator[tuple[int, int, tuple]]:
        """(step, micro-step, one batch of each loader) of the steps that remain. An optimiser step
        has `gradient_accumulation_steps` micro-steps."""
        micro_steps = self.accelerator.gradient_accumulation_steps
        start = self.step * micro_steps
        for micro_step, batches in enumerate(zip(*loaders, strict=True), start):
            yield micro_step // micro_steps, micro_step, batches

    def state_dict(self) -> dict:
        names = ("step", "best", "history", "skipped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.best = state["step"], state["best"]
        self.history, self.skipped = state["history"], state["skipped"]
        lost = [not (self.folder / "model.safetensors").exists()]
        broadcast_object_list(lost)  # one answer, since all processes act on it
        if lost[0]:
            self.best = None  # `start` validates, which writes them

    def open(self) -> None:
        """Open run folder, bar and tracker: after the first step (--init-from: before its first
        validation), so that bad input found before leaves nothing behind."""
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
        if args.log_with != "tensorboard":  # none: Accelerate has no tracker then
            self.accelerator.init_trackers("reco", config=self.plain_arguments())
            return
        options = {"tensorboard": {"purge_step": self.step + 1}}
        self.accelerator.init_trackers("tensorboard", init_kwargs=options)
        if self.main:
            self.writer = self.accelerator.get_tracker("tensorboard", unwrap=True)

    def write_config(self) -> None:
        """config.json and labeled.txt"""
        checkpoint.hold(self.folder, "".join(f"{s.name}\n" for s in self.split.labelled))
        self.config["arguments"] = {**vars(self.args), **launch_settings(self.accelerator)}
        write_json(self.folder / "config.json", self.config)

    def plain_arguments(self) -> dict:
        """What trackers take: no lists, no None."""
        plain = (int, float, str, bool)
        return {k: v for k, v in vars(self.args).items() if isinstance(v, plain)}

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def log(self, values: dict) -> None:
        self.accelerator.log(values, step=self.step)

    def is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.args.iterations

    # ------------------------------------------------------------------------------ every step
    def after_step(self, curves: dict[str, Tensor], to_plot: dict) -> None:
        """Whatever follows a step, when it is due: curves, validation, images, the checkpoint, and
        the end of a run that was asked to stop. See `train_step` for the arguments."""
        if not self.bar:
            self.open()
        self.add(curves | reco_curves(to_plot["reco"]))
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
        self.since += time.monotonic() - entered  # images/s is that of training
        if stop and self.step < self.args.iterations:
            self.leave(stop)

    def add(self, curves: dict[str, Tensor]) -> None:
        """Keep the values, on the device, until the logging interval."""
        values = torch.stack([value.detach() for value in curves.values()])
        self.pending.append((self.step, tuple(curves), values))

    def log_means(self) -> None:
        """Log the means since the last time, and show the losses in the bar."""
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

    def stop_requested(self) -> int:
        """The signal that asks for a stop, or 0: the same on every process."""
        if not self.control:
            return self.stop.signal
        flag = torch.tensor(self.stop.signal)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.control)
        return int(flag)

    # ------------------------------------------------------------------- validation and saving
    def validate(self) -> None:
        """Evaluate the networks on every validation image. The first one is reported, and kept if
        it is the best so far."""
        if not self.bar:
            self.open()
        self.check_losses()
        entry = {"step": self.step}
        for name, network in self.networks.items():
            self.share_buffers(network)
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
        better = self.best is None or entry["miou"] > self.best["miou"]
        entry["kept"] = better
        self.history.append(entry)
        if better:
            self.best = entry
        if self.main:
            if better:
                checkpoint.write_weights(self.folder, next(iter(self.networks.values())))
            write_json(self.folder / "history.json", self.history)
        self.report_validation(entry, list(self.networks)[1:], better)

    def report_validation(self, entry: dict, others: list[str], better: bool) -> None:
        """A validation's line on the terminal and its points in the curves."""
        line = (
            f"step {self.step}: validation mIoU {100 * entry['miou']:.2f}, boundary IoU "
            f"{100 * entry['boundary_iou']:.2f}, pixel accuracy {100 * entry['accuracy']:.2f}"
        )
        line += "".join(f", {name} {100 * entry[f'{name} miou']:.2f}" for name in others)
        self.say(line + (" *" if better else ""))
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

    def share_buffers(self, network: nn.Module) -> None:
        """Copy the main process's batch-norm statistics to all, so that all evaluate the network
        that is saved."""
        if self.control:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def check_losses(self) -> None:
        """UserError if a loss was not finite; its batch is written to the run folder."""
        if not self.pending:
            return
        finite = torch.stack([values.isfinite().all() for _, _, values in self.pending]).tolist()
        if all(finite):
            return
        step, names, values = self.pending[finite.index(False)]
        pairs = zip(names, values.tolist(), strict=True)
        losses = ", ".join(f"{name} {value:g}" for name, value in pairs)
        # a batch is a function of (seed, step), so the offending one can be read again
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
        """UserError where weights are not finite: they would spoil the checkpoint."""
        self.check_losses()
        norms = torch.stack(torch._foreach_norm(list(self.parts["model"].parameters())))
        need(
            torch.isfinite(norms).all(),  # the same on every process
            f"the weights were not finite after step {self.step - 1}, though the losses were; the "
            "last good checkpoint is kept. A smaller --lr usually helps",
        )

    # -------------------------------------------------------------------------------- the end
    def leave(self, signal: int) -> None:
        """After a requested stop and the checkpoint: print how to resume, and exit."""
        self.bar.close()
        self.accelerator.wait_for_everyone()
        self.say(
            f"stopped at step {self.step} of {self.args.iterations}, saved. Resume with: "
            f"{resume_command(self.args, self.folder)}"
        )
        self.close()
        sys.exit(128 + signal)

    def finish(self) -> None:
        """Log the representations, print the table of the best validation and what to do next."""
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
        """What Accelerate's end_training does, but for the process group: `launch` ends that, once
        the network is gone."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


class LogLines:
    """The progress bar in a log file: lines instead of carriage returns."""

    @staticmethod
    def write(text: str) -> None:
        sys.stderr.write(text.replace("\r", "\n"))

    @staticmethod
    def flush() -> None:
        sys.stderr.flush()


def reco_curves(stats: dict) -> dict[str, Tensor]:
    """The curves of the contrast loss: its value, the classes present, the hard pixels."""
    if not stats:
        return {}
    return {
        "loss/reco": stats["loss"],
        "reco/classes": stats["num_classes"].float(),
        "reco/hard pixels": stats["num_hard"].sum().float(),
    }


def batch_of_step(loader, step: int) -> list[Tensor]:
    """The batch that a training loader gives at a step, read once more."""
    return default_collate([loader.dataset[key] for key in loader.sampler.batch(step)])
