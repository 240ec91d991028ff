"""The training loop, once: data, step, log, sample, save, resume, from one CPU process to several nodes.

A recipe supplies what is particular to a training: the module with the trainable parameters, the data, the
loss of a batch, what to sample and what to export. Everything else is here.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from core.checkpoint import save_archive
from gdf.loss_weights import AdaptiveLossWeight, constant

log = logging.getLogger(__name__)

CLIP_NORM = 1.0
MAX_BAD_UPDATES = 5  # with a loss that is not finite, in a row
CHECKPOINT = "step_{:08d}.pt"


@dataclass(frozen=True)
class TrainSettings:
    """What the loop itself needs to know."""

    lr: float
    updates: int
    batch_size: int  # samples per update: processes × samples each × accumulation
    grad_accum_steps: int = 1
    warmup_updates: int = 0
    save_every: int = 500
    keep: int = 2  # checkpoints beside those of backup_every
    backup_every: int = 0
    ema: float = 0.0  # decay; 0: none
    adaptive_loss_weight: bool = True
    seed: int = 0


@dataclass(frozen=True)
class StepLoss:
    """A micro-batch's result: the loss of each sample (B,), with gradients, and its logSNR (B,)."""

    per_sample: Tensor
    logsnr: Tensor


@dataclass(frozen=True)
class Recipe:
    """What is particular to a training.

    `batches(position)` yields (batch, position after it) from a position on (None: the start); positions are
    plain data. `loss(module, batch, keys)` gets the module as wrapped for several processes, and a key per
    sample for its random numbers. `sample(step)` may write pictures; `export(parameters, step)` weights.
    """

    module: nn.Module
    batches: Callable[[Any], Iterator[tuple[Any, Any]]]
    loss: Callable[[nn.Module, Any, list[tuple[int, ...]]], StepLoss]
    sample: Callable[[int], None] | None = None
    export: Callable[[Mapping[str, Tensor], int], None] | None = None


def check_batch_size(batch_size: int, processes: int, grad_accum_steps: int) -> int:
    """Samples per process and micro-batch; ValueError where the batch does not divide."""
    parts = processes * grad_accum_steps
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} does not divide by {processes} processes x {grad_accum_steps} "
            f"micro-batches: choose a multiple of {parts}"
        )
    return batch_size // parts


class Trainer:
    """Runs a recipe in a folder; running it again continues from the last checkpoint there."""

    def __init__(
        self, recipe: Recipe, settings: TrainSettings, folder: Path, accelerator: Accelerator
    ) -> None:
        self.recipe, self.settings, self.folder, self.accelerator = recipe, settings, folder, accelerator
        self.micro_batch = check_batch_size(
            settings.batch_size, accelerator.num_processes, settings.grad_accum_steps
        )
        self.step, self.bad_updates, self.skipped = 0, 0, 0
        self.position: Any = None
        self._parameters = {n: p for n, p in recipe.module.named_parameters() if p.requires_grad}
        self.module = accelerator.prepare_model(recipe.module)
        self.optimizer = torch.optim.AdamW(self._parameters.values(), lr=settings.lr)
        self.weight = AdaptiveLossWeight(accelerator.device)
        self.ema = {n: p.detach().clone() for n, p in self._parameters.items()} if settings.ema else {}
        self._stop = False

    # --- the loop ---------------------------------------------------------------------------------

    def run(self, on_update: Callable[[dict[str, float]], None] | None = None) -> None:
        """Train to the last update, or until SIGTERM or Ctrl-C; saves at the end in any case."""
        self.resume()
        handlers = {s: signal.signal(s, self._request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop(on_update)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _loop(self, on_update: Callable[[dict[str, float]], None] | None) -> None:
        batches = self.recipe.batches(self.position)
        while self.step < self.settings.updates and not self._stop_everywhere():
            start = time.perf_counter()
            figures = self._update(batches)
            self.step += 1
            if figures and on_update is not None:
                seconds = time.perf_counter() - start
                on_update(
                    {**figures, "step": self.step, "images_per_second": self.settings.batch_size / seconds}
                )
            if self.step % self.settings.save_every == 0 or self.step == self.settings.updates:
                self.save()
                if self.recipe.sample is not None:
                    self.recipe.sample(self.step)
        if self.step % self.settings.save_every and self.step != self.settings.updates:
            self.save()

    def _update(self, batches: Iterator[tuple[Any, Any]]) -> dict[str, float]:
        """One update over all micro-batches; {} where it was skipped because the loss was not finite."""
        settings, rank = self.settings, self.accelerator.process_index
        total, tallies = torch.zeros((), device=self.accelerator.device), []
        for micro in range(settings.grad_accum_steps):
            batch, self.position = next(batches)
            first = (micro * self.accelerator.num_processes + rank) * self.micro_batch
            keys = [(settings.seed, self.step, first + i) for i in range(self.micro_batch)]
            last = micro == settings.grad_accum_steps - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                result = self.recipe.loss(self.module, batch, keys)
                weight = (self.weight if settings.adaptive_loss_weight else constant)(result.logsnr)
                loss = (result.per_sample * weight.detach()).mean() / settings.grad_accum_steps
                self.accelerator.backward(loss)
            total += loss.detach()
            tallies.append((result.logsnr.detach(), result.per_sample.detach()))
        mean_loss = float(self.accelerator.reduce(total, "mean"))
        if not math.isfinite(mean_loss):
            self._skip()
            return {}
        self.bad_updates = 0
        norm = self._apply_gradients()
        self._update_weights_of_loss(tallies)
        return {"loss": mean_loss, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm}

    def _apply_gradients(self) -> float:
        warm = min(1.0, (self.step + 1) / max(1, self.settings.warmup_updates))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * warm
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, average in self.ema.items():
            average.lerp_(self._parameters[name].detach(), 1 - self.settings.ema)
        return float(norm)

    def _update_weights_of_loss(self, tallies: list[tuple[Tensor, Tensor]]) -> None:
        logsnr, losses = (torch.cat(column) for column in zip(*tallies, strict=True))
        sums, counts = self.weight.tally(logsnr, losses)
        self.weight.apply(self.accelerator.reduce(sums, "sum"), self.accelerator.reduce(counts, "sum"))

    def _skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_updates += 1
        self.skipped += 1
        log.warning("update %d was skipped: its loss is not finite", self.step)
        if self.bad_updates >= MAX_BAD_UPDATES:
            raise ValueError(
                f"the loss was not finite in {MAX_BAD_UPDATES} updates in a row, up to update {self.step}: "
                f"the checkpoints in {self.folder} are from before; resume with a smaller lr"
            )

    # --- stopping, saving, resuming ---------------------------------------------------------------

    def _request_stop(self, *_: object) -> None:
        self._stop = True

    def _stop_everywhere(self) -> bool:
        """Whether any process was asked to stop, so that all leave the loop at the same update."""
        asked = torch.tensor(float(self._stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints in the folder, oldest first."""
        return sorted(self.folder.glob("step_*.pt"))

    def save(self) -> None:
        """Write a checkpoint whole or not at all, and remove old ones."""
        if self.accelerator.is_main_process:
            state = {
                "step": self.step, "position": self.position, "skipped": self.skipped,
                "parameters": {n: p.detach().cpu() for n, p in self._parameters.items()},
                "ema": {n: p.cpu() for n, p in self.ema.items()},
                "optimizer": self.optimizer.state_dict(), "loss_weight": self.weight.state_dict(),
                "random": torch.get_rng_state(),
            }  # fmt: skip
            save_archive(self.folder / CHECKPOINT.format(self.step), state)
            self._prune()
            if self.recipe.export is not None:
                self.recipe.export(self.ema or self._parameters, self.step)
        self.accelerator.wait_for_everyone()

    def _prune(self) -> None:
        backup = self.settings.backup_every
        loose = [p for p in self.checkpoints() if not backup or int(p.stem[5:]) % backup]
        for path in loose[: -self.settings.keep]:
            path.unlink()

    def resume(self) -> None:
        """Continue from the newest checkpoint in the folder, if there is one."""
        paths = self.checkpoints()
        if not paths:
            return
        state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        stored = {n: tuple(p.shape) for n, p in state["parameters"].items()}
        wanted = {n: tuple(p.shape) for n, p in self._parameters.items()}
        if stored != wanted or bool(state["ema"]) != bool(self.ema):
            raise ValueError(
                f"{paths[-1]} is of another training: name another folder, or remove the checkpoints"
            )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state["parameters"][name])
            for name, average in self.ema.items():
                average.copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.weight.load_state_dict(state["loss_weight"])
        torch.set_rng_state(state["random"])
        self.step, self.position, self.skipped = state["step"], state["position"], state["skipped"]
        log.info("resumed from %s", paths[-1])


class RunLog:
    """Figures of every update as lines of JSON in a file, beside what a progress bar shows."""

    def __init__(self, path: Path, every: int = 1) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._every = path, every

    def __call__(self, figures: Mapping[str, float]) -> None:
        if figures["step"] % self._every == 0:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(figures) + "\n")
