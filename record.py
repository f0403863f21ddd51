"""The record of a run: what it remembers between its steps, and where it shows it."""

import contextlib
import shlex
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

import pictures
from checkpoint import hold, write_torch, write_weights
from data import Source
from errors import UserError, need
from files import write_json
from labels import Division, fingerprint
from metrics import evaluate, table
from processes import COLLECTIVE_LIMIT, Stop, speak_for_itself
from run import base_learning_rate, resume_command, start_line


class Record:
    """What a run remembers between its steps (step, curves, history, best validation), and where
    it shows them: bar, tracker, TensorBoard, the run's folder. It trains nothing."""

    def __init__(self, args, accelerator: Accelerator, folder: Path, source: Source, config: dict):
        self.args, self.accelerator, self.folder = args, accelerator, folder
        self.source, self.config = source, config
        self.main, processes = accelerator.is_main_process, accelerator.num_processes
        self.step, self.best, self.history, self.skipped = 0, None, [], 0
        self.sums, self.since = {}, time.monotonic()
        self.bar = self.writer = None
        self.first_bad = BadStep()
        self.stop = Stop()
        # carries a signal round without the device
        self.control = None
        if processes > 1:
            limit = COLLECTIVE_LIMIT
            self.control = torch.distributed.new_group(backend="gloo", timeout=limit)

    def state_dict(self) -> dict:
        names = ("step", "best", "history", "skipped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.best = state["step"], state["best"]
        self.history, self.skipped = state["history"], state["skipped"]
        lost = [not (self.folder / "model.safetensors").exists()]
        broadcast_object_list(lost)  # one answer, for what follows is done by all processes
        if lost[0]:
            self.best = None  # so the run begins with a validation, which writes them

    def announce(self, division: Division, loaders: list) -> None:
        """Before the first step: what the run is, in one line. Nothing is written yet."""
        self.labelled, self.loaders = division.labelled, loaders
        if not self.args.resume:
            self.config["data"] = fingerprint(self.source, division)
        line = start_line(
            self.args, self.accelerator, self.folder, self.source, self.config, division, loaders
        )
        if self.args.resume:
            line += f" | goes on at step {self.step} of {self.args.iterations}"
        self.say(line)
        speak_for_itself()

    def open(self) -> None:
        """Open the run's folder, bar and tracker: after the first step (--init-from: before its
        first validation), so that bad input found until then leaves nothing behind."""
        args = self.args
        if self.main and not args.resume:
            self.write_config()
        self.bar = tqdm(
            total=args.iterations,
            initial=self.step,
            unit="step",
            disable=not self.main,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log gets a line every half minute
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
        hold(self.folder, "".join(f"{sample.name}\n" for sample in self.labelled))
        self.config["arguments"] = {
            **vars(self.args),
            "processes": self.accelerator.num_processes,
            "base_lr": base_learning_rate(self.args, self.accelerator.num_processes),
            "mixed_precision": self.accelerator.mixed_precision,
        }
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
    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        """After each step. Sums stay on the device until the logging interval."""
        if not self.bar:
            self.open()
        self.step = step + 1
        if self.first_bad.names != list(losses):  # once more when the unlabelled images have joined
            self.check_losses()
            self.first_bad = BadStep(list(losses))
        self.first_bad.update(step, torch.stack(list(losses.values())))
        for name, value in losses.items():
            total, times = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value, times + 1
        self.skipped += int(self.accelerator.optimizer_step_was_skipped)
        self.bar.update()

    def log_means(self, rate: float) -> None:
        """Means since the last time into the curves and the bar."""
        self.check_losses()
        sums = torch.stack([total / times for total, times in self.sums.values()])
        means = self.accelerator.reduce(sums, "mean").tolist()
        means = dict(zip(self.sums, means, strict=True))
        steps = max(times for _, times in self.sums.values())
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        batch = sum(loader.sampler.batch_size for loader in self.loaders)
        images = steps * batch * self.accelerator.num_processes
        losses = {name: value for name, value in means.items() if name.startswith("loss/")}
        short = {name.split("/")[1][:5]: f"{value:.3f}" for name, value in losses.items()}
        self.bar.set_postfix(short, refresh=False)
        skipped = {"skipped steps": self.skipped} if self.accelerator.scaler else {}
        speed = {"learning rate": rate, "images per second": images / seconds}
        self.log({**means, **speed, **skipped})
        self.sums = {}

    def stop_requested(self) -> int:
        """The signal that asks for a stop, or 0: the same on every process."""
        if not self.control:
            return self.stop.signal
        flag = torch.tensor(self.stop.signal)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.control)
        return int(flag)

    @contextlib.contextmanager
    def paused(self):
        """The rate in the curves is that of training: what is done meanwhile does not count."""
        entered = time.monotonic()
        yield
        self.since += time.monotonic() - entered

    # ------------------------------------------------------------------- validation and saving
    def validate(self, networks: dict[str, nn.Module], loader) -> None:
        """Evaluate on every validation image; the first network is the one that is reported, and
        kept when it is the best so far."""
        if not self.bar:
            self.open()
        self.check_losses()
        entry = {"step": self.step}
        for name, network in networks.items():
            self.share_buffers(network)
            results, confusion = evaluate(
                network,
                loader,
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
                write_weights(self.folder, next(iter(networks.values())))
            write_json(self.folder / "history.json", self.history)
        self.report_validation(entry, list(networks)[1:], better)

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

    def show(self, network: nn.Module, images, shown: dict) -> None:
        """Pictures to TensorBoard: validation images, the training step (`shown`, see train_step),
        confusion matrix and class relations."""
        if not self.writer:
            return
        palette, names = self.source.palette, self.source.classes
        device = self.accelerator.device
        figures = {
            "validation": pictures.draw_validation(network, images, palette, device),
            "training": pictures.draw_training(shown, palette),
            "confusion (row: truth)": pictures.draw_confusion(
                torch.tensor(self.history[-1]["confusion"]), names
            ),
        }
        if "relation" in shown:
            relation = pictures.heat_map(shown["relation"].cpu(), names)
            figures["class relation (row: query class)"] = relation
        for name, figure in figures.items():
            self.writer.add_figure(name, figure, self.step)

    def share_buffers(self, network: nn.Module) -> None:
        """Every process takes the main one's batch-norm statistics, so that all evaluate one
        network, the one that is saved."""
        if self.control:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def check_losses(self) -> None:
        """UserError, the batches written beside it, where a loss was not finite."""
        bad = self.first_bad
        if bad.step is None or int(bad.step) < 0:
            return
        step = int(bad.step)
        # a batch is a function of (seed, step), so the offending one can be had again
        batches = [batch_of_step(loader, step) for loader in self.loaders]
        name = f"nonfinite-step{step}-process{self.accelerator.process_index}.pt"
        write_torch(self.folder / name, batches)
        raise UserError(
            f"the loss was not finite at step {step} ({bad.describe()}); the last good checkpoint "
            f"is kept, the batch is in {self.folder / name}. A smaller --lr, or bf16 instead of "
            "fp16, usually helps"
        )

    def check_weights(self, model: nn.Module) -> None:
        """UserError where weights are not finite: they would spoil the checkpoint."""
        self.check_losses()
        norms = torch.stack(torch._foreach_norm(list(model.parameters())))
        need(
            torch.isfinite(norms).all(),  # the same on every process
            f"the weights were not finite after step {self.step - 1}, though the losses were; the "
            "last good checkpoint is kept. A smaller --lr usually helps",
        )

    # -------------------------------------------------------------------------------- the end
    def leave(self, signal: int) -> None:
        """After a requested stop, the state saved: say how to go on, and exit."""
        self.bar.close()
        self.accelerator.wait_for_everyone()
        self.say(
            f"stopped at step {self.step} of {self.args.iterations}, saved. Go on with: "
            f"{resume_command(self.args, self.folder)}"
        )
        self.close()
        sys.exit(128 + signal)

    def finish(self, network: nn.Module, images) -> None:
        """The projector, the table of the best validation, and what to do next."""
        if self.bar:
            self.bar.close()
        if self.writer:
            if self.args.model == "reconet":
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


class BadStep:
    """The first step with a loss that is not finite, found without waiting for the device."""

    def __init__(self, names: list[str] | None = None):
        self.names, self.step, self.values = names, None, None

    def update(self, step: int, values: Tensor) -> None:
        bad = ~torch.isfinite(values).all()
        if self.step is None:
            self.step = torch.full_like(bad, -1, dtype=torch.long)
            self.values = torch.zeros_like(values)
        first = bad & (self.step < 0)
        self.step = torch.where(first, step, self.step)
        self.values = torch.where(first, values, self.values)

    def describe(self) -> str:
        pairs = zip(self.names, self.values.tolist(), strict=True)
        return ", ".join(f"{name} {value:g}" for name, value in pairs)


def batch_of_step(loader, step: int) -> list[Tensor]:
    """The batch that a training loader gives at a step, read once more."""
    return default_collate([loader.dataset[key] for key in loader.sampler.batch(step)])
