"""The training loop, once: data, step, log, sample, save, resume, from one CPU process to several nodes.

A recipe supplies what is particular to a training: the module with the trainable parameters, the data, the
loss of a batch, what to sample and what to export. Everything else is here.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from core.memory import peak_memory
from core.random_keys import seed_of
from core.training.distributed import (
    accumulating,
    distribute,
    fill,
    is_sharded,
    load_optimizer_state,
    optimizer_state,
    whole,
    wholes,
)
from core.training.learning_rate import Course, LearningRate
from core.weights.checkpoint import CheckpointError, read_archive, save_archive
from gdf.loss_weights import AdaptiveLossWeight, LossWeight, constant
from modules.blocks import AttnBlock, ResBlock
from modules.unet import CascadeUNet

log = logging.getLogger(__name__)

CLIP_NORM = 1.0
MAX_BAD_UPDATES = 5  # with a loss or gradient that is not finite, in a row
EMA_WARMUP = 10  # updates: the running mean follows faster at first, so that it forgets the initial weights
CHECKPOINT = "step_{:08d}.pt"
STATE = {"step", "position", "skipped", "parameters", "ema", "buffers", "optimizer", "loss_weight"}

Optimizer = Literal["adamw", "adamw_fused", "adamw_8bit"]


@dataclass(frozen=True)
class TrainSettings:
    """What the loop itself needs to know."""

    lr: float
    updates: int
    batch_size: int  # samples per update: processes × samples each × accumulation
    grad_accum_steps: int = 1
    warmup_updates: int = 0
    lr_end: float | None = None  # at the last update, along a cosine; None: lr stays
    optimizer: Optimizer = "adamw"
    compile: bool = False  # the networks' blocks with torch.compile
    shard: bool = False  # the trained weights over the processes (FSDP2), instead of a copy in each
    save_every: int = 500
    keep: int = 2  # checkpoints beside those of backup_every
    backup_every: int = 0
    ema: float = 0.0  # decay; 0: none
    adaptive_loss_weight: bool = True
    loss_weight: LossWeight = constant  # where it is not adaptive
    seed: int = 0

    @property
    def course(self) -> Course:
        """How the learning rate goes."""
        return Course(self.lr, self.updates, self.warmup_updates, self.lr_end)


@dataclass(frozen=True)
class StepLoss:
    """A micro-batch's result: the loss of each sample (B,), with gradients, and its logSNR (B,).

    `extra` () is added to the mean as it is, without a weight. `counts` (B,) says how much each sample counts
    in the mean, beside the weight of its logSNR; None: all the same.
    """

    per_sample: Tensor
    logsnr: Tensor
    extra: Tensor | None = None
    counts: Tensor | None = None


@dataclass(frozen=True)
class Recipe:
    """What is particular to a training.

    `batches(position)` yields (batch, position after it) from a position on (None: the start); positions are
    plain data. `loss(module, batch, keys)` gets the module as wrapped for several processes, and a key per
    sample for its random numbers. `sample(step)` may write pictures, in every process where the weights are
    sharded, else in the main one alone; `export(tensors, step)` all weights of the module (running means
    where there are), which `use` says how to use: by a command, or as the key of another training.
    """

    module: nn.Module
    batches: Callable[[Any], Iterator[tuple[Any, Any]]]
    loss: Callable[[nn.Module, Any, list[tuple[int, ...]]], StepLoss]
    sample: Callable[[int], None] | None = None
    export: Callable[[Mapping[str, Tensor], int], None] | None = None
    use: str | None = None
    some_unused: bool = False  # parameters of the module, in some updates


@dataclass(frozen=True)
class LossesSeen:
    """Mean loss by logSNR since the last save: sums and counts (buckets,), edges between them."""

    sums: Tensor
    counts: Tensor
    edges: Tensor


def check_batch_size(batch_size: int, processes: int, grad_accum_steps: int) -> int:
    """Samples per process and micro-batch; ValueError where the batch does not divide."""
    parts = processes * grad_accum_steps
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} does not divide by {processes} processes x {grad_accum_steps} "
            f"micro-batches: choose a multiple of {parts}"
        )
    return batch_size // parts


def make_optimizer(name: Optimizer, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW with PyTorch's defaults: plain, fused into one kernel, or with 8-bit states (bitsandbytes)."""
    if name != "adamw_8bit":
        return torch.optim.AdamW(parameters, lr=lr, fused=name == "adamw_fused" or None)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("optimizer adamw_8bit needs a package: pip install bitsandbytes") from None
    if is_sharded(parameters):
        raise ValueError("optimizer adamw_8bit cannot be sharded: use adamw or adamw_fused with use_fsdp")
    return AdamW8bit(parameters, lr=lr)


def compile_blocks(module: nn.Module) -> None:
    """Compile residual and attention blocks, one of each shape: ready much sooner than the whole network."""
    for part in module.modules():
        if isinstance(part, ResBlock | AttnBlock):
            part.compile()
        elif isinstance(part, CascadeUNet):
            part.plain = True  # the compiler makes kernels of its own


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
        self.position: Any = None  # in the data, after the last whole update
        self._ahead: Any = None  # and after the one that is being made
        self._unsaved, self._applying = False, False  # updates since the last save; within one
        if settings.compile:
            compile_blocks(recipe.module)
        self.module = distribute(recipe.module, accelerator, settings.shard, recipe.some_unused)
        named = dict(recipe.module.named_parameters())
        self._parameters = {n: p for n, p in named.items() if p.requires_grad}
        self._frozen = wholes({n: p for n, p in named.items() if not p.requires_grad})
        self._buffers = dict(recipe.module.named_buffers())
        self.optimizer = make_optimizer(settings.optimizer, list(self._parameters.values()), settings.lr)
        self.rate = LearningRate(self.optimizer, settings.course)
        self.weight = AdaptiveLossWeight(accelerator.device)
        self.ema = {n: p.detach().clone() for n, p in self._parameters.items()} if settings.ema else {}
        self.seen = self._no_losses()
        self._stop = False
        self._writer, self._written = ThreadPoolExecutor(max_workers=1), Future()
        self._written.set_result(None)

    # --- the loop ---------------------------------------------------------------------------------

    def run(
        self,
        on_update: Callable[[dict[str, float]], None] | None = None,
        on_save: Callable[[LossesSeen], None] | None = None,
    ) -> None:
        """Train to the last update, or until SIGTERM or Ctrl-C; saves at the end, also after an error."""
        handlers = {s: signal.signal(s, self._request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        batches = self.recipe.batches(self.position)
        try:
            self._loop(batches, on_update, on_save)
        except Exception:
            self._rescue()
            raise
        finally:
            if hasattr(batches, "close"):
                batches.close()  # ends the data workers, for which a process that fails would wait otherwise
            self._writer.shutdown()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._written.result()
        self.accelerator.wait_for_everyone()  # as the end of one ends its machine's processes

    def _loop(
        self,
        batches: Iterator[tuple[Any, Any]],
        on_update: Callable[[dict[str, float]], None] | None,
        on_save: Callable[[LossesSeen], None] | None,
    ) -> None:
        due = False
        while self.step < self.settings.updates and not self._stop_everywhere():
            if self._written.done():
                self._written.result()  # raises what went wrong, such as a full disk
            start = time.perf_counter()
            figures = self._update(batches)
            self.rate.step()
            self.step, self.position, self._applying = self.step + 1, self._ahead, False
            self._unsaved = self._unsaved or bool(figures)
            if figures and on_update is not None:
                speed = self.settings.batch_size / (time.perf_counter() - start)
                memory = peak_memory(self.accelerator.device) / 2**30
                on_update({**figures, "step": self.step, "images_per_second": speed, "memory_gib": memory})
            due = due or self.step % self.settings.save_every == 0
            if self.step == self.settings.updates or (due and not self.bad_updates):
                due = False
                self.save()
                self._sample()
                if on_save is not None:
                    on_save(self.seen)
                self.seen = self._no_losses()
        if self._unsaved:
            self.save()
        if self.bad_updates:
            log.warning("the last %d updates were skipped: look at the result before you use it",
                        self.bad_updates)  # fmt: skip

    def _rescue(self) -> None:
        """Save what was reached before an error, unless a part of the failed update is in it."""
        own = self.accelerator.is_main_process and not is_sharded(self._parameters.values())
        if not own or self._applying or not self._unsaved:
            return
        try:
            self._written.result()
            self._writer.submit(self._write, self._state(True), self.bad_updates > 0).result()
        except Exception as error:  # the one before is told
            log.warning("update %d could not be saved (%s)", self.step, error)
        else:
            log.info("update %d is saved in %s", self.step, self.folder)

    def _update(self, batches: Iterator[tuple[Any, Any]]) -> dict[str, float]:
        """One update over all micro-batches; {} where it was skipped because something was not finite."""
        settings, rank = self.settings, self.accelerator.process_index
        self._seed_dropout()
        total, tallies = torch.zeros((), device=self.accelerator.device), []
        for micro in range(settings.grad_accum_steps):
            batch, self._ahead = next(batches)
            first = (micro * self.accelerator.num_processes + rank) * self.micro_batch
            keys = [(settings.seed, self.step, first + i) for i in range(self.micro_batch)]
            last = micro == settings.grad_accum_steps - 1
            with accumulating(self.module, self.accelerator, last):
                result = self.recipe.loss(self.module, batch, keys)
                self.accelerator.backward(self._weighted(result) / settings.grad_accum_steps)
            total += result.per_sample.detach().mean() / settings.grad_accum_steps
            tallies.append((result.logsnr.detach(), result.per_sample.detach()))
        mean_loss = float(self.accelerator.reduce(total, "mean"))
        norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters.values(), CLIP_NORM))
        if not math.isfinite(mean_loss) or not norm.isfinite():
            self._skip()
            return {}
        self.bad_updates, self._applying = 0, True
        self._apply_gradients()
        self._update_weights_of_loss(tallies)
        return {"loss": mean_loss, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": float(norm)}

    def _seed_dropout(self) -> None:
        """The global random state follows from seed, update and process, so that no checkpoint needs it."""
        torch.manual_seed(seed_of((self.settings.seed, self.step, self.accelerator.process_index)))

    def _weighted(self, result: StepLoss) -> Tensor:
        weigh = self.weight if self.settings.adaptive_loss_weight else self.settings.loss_weight
        weights = weigh(result.logsnr).detach()
        if result.counts is not None:
            weights = weights * result.counts
        loss = (result.per_sample * weights).mean()
        return loss if result.extra is None else loss + result.extra

    def _apply_gradients(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.settings.ema, (1 + self.step) / (EMA_WARMUP + self.step))
        with torch.no_grad():
            for name, average in self.ema.items():
                average.lerp_(self._parameters[name], 1 - decay)

    def _update_weights_of_loss(self, tallies: list[tuple[Tensor, Tensor]]) -> None:
        logsnr, losses = (torch.cat(column) for column in zip(*tallies, strict=True))
        sums, counts = self.weight.tally(logsnr, losses)
        sums, counts = self.accelerator.reduce(sums, "sum"), self.accelerator.reduce(counts, "sum")
        self.weight.apply(sums, counts)
        self.seen = LossesSeen(self.seen.sums + sums, self.seen.counts + counts, self.seen.edges)

    def _no_losses(self) -> LossesSeen:
        zeros = torch.zeros_like(self.weight.mean)
        return LossesSeen(zeros, zeros, self.weight.edges)

    def _skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_updates += 1
        self.skipped += 1
        log.warning("update %d was skipped: its loss or gradient is not finite", self.step)
        if self.bad_updates >= MAX_BAD_UPDATES:
            raise ValueError(
                f"the loss was not finite in {MAX_BAD_UPDATES} updates in a row, up to update {self.step}: "
                f"the checkpoints in {self.folder} are from before; resume with a smaller lr, and if that "
                "fails alike, remove the last checkpoint, so that the one before is taken"
            )

    def _sample(self) -> None:
        if self.recipe.sample is None:
            return
        if is_sharded(self._parameters.values()) or self.accelerator.is_main_process:
            # Of the few steps of samples, at sizes of their own, none is worth compiling.
            eager = torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext()
            with torch.no_grad(), eager, self._averaged():
                self.recipe.sample(self.step)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within it, the weights are their running means, where there are any."""
        own = {name: self._parameters[name].detach().clone() for name in self.ema}
        try:
            for name, average in self.ema.items():
                self._parameters[name].data.copy_(average)
            yield
        finally:
            for name, value in own.items():
                self._parameters[name].data.copy_(value)

    # --- stopping, saving, resuming ---------------------------------------------------------------

    def _request_stop(self, *_: object) -> None:
        self._stop = True

    def _stop_everywhere(self) -> bool:
        """Whether any process was asked to stop, so that all leave the loop at the same update."""
        asked = torch.tensor(float(self._stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def save(self) -> None:
        """Write a checkpoint whole or not at all, beside the training, and remove old ones.

        The state is copied before this returns; a kill at any moment leaves the checkpoint before.
        """
        self._written.result()
        kept = self.accelerator.is_main_process  # the others only give their shards
        state = self._state(kept)
        if kept:
            self._written = self._writer.submit(self._write, state, self.bad_updates > 0)
        self._unsaved = False
        self.accelerator.wait_for_everyone()

    def _state(self, kept: bool) -> dict[str, Any]:
        """A copy of everything to go on from, in the process that has it `kept`."""
        return {
            "step": self.step, "position": self.position, "skipped": self.skipped,
            "parameters": wholes(self._parameters, kept), "ema": wholes(self.ema, kept),
            "buffers": wholes(self._buffers, kept), "optimizer": optimizer_state(self.optimizer, kept),
            "rate": _copied(self.rate.state_dict()), "loss_weight": _copied(self.weight.state_dict()),
        }  # fmt: skip

    def _write(self, state: dict[str, Any], doubtful: bool) -> None:
        """Write a checkpoint and what is exported; those before stay where its weights are `doubtful`."""
        save_archive(self.folder / CHECKPOINT.format(state["step"]), state)
        if not doubtful:
            self._prune()
        if self.recipe.export is not None:
            tensors = {**self._frozen, **state["parameters"], **state["buffers"], **state["ema"]}
            self.recipe.export(tensors, state["step"])

    def _prune(self) -> None:
        backup = self.settings.backup_every
        loose = [p for p in checkpoints(self.folder) if not backup or int(p.stem[5:]) % backup]
        for path in loose[: -self.settings.keep]:
            path.unlink()

    def resume(self) -> None:
        """Continue from the newest checkpoint in the folder, if any; removes what a kill left half."""
        if self.accelerator.is_main_process:
            for path in self.folder.glob(".*.part"):
                path.unlink()
        path, state, damaged = newest_state(self.folder)
        self.accelerator.wait_for_everyone()  # all have read them
        if self.accelerator.is_main_process:
            _set_aside(damaged)
        self._check_agreed(-1 if path is None else state["step"])
        if path is None:
            return
        stored = {n: tuple(p.shape) for n, p in state["parameters"].items()}
        wanted = {n: tuple(p.shape) for n, p in self._parameters.items()}
        if stored != wanted:
            raise ValueError(f"{path} is of another training: name another folder, or remove the checkpoints")
        if bool(state["ema"]) != bool(self.ema):
            before = "above 0" if state["ema"] else "0"
            raise ValueError(
                f"'ema' was {before} when {path} was made, and cannot become {self.settings.ema} now: "
                "set it as before, or choose another experiment_id"
            )
        for own, kept in ((self._parameters, "parameters"), (self.ema, "ema"), (self._buffers, "buffers")):
            for name, tensor in own.items():
                fill(tensor, state[kept][name])
        try:
            load_optimizer_state(self.optimizer, state["optimizer"])
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path} does not fit optimizer {self.settings.optimizer} ({error}): set it as before, or "
                "choose another experiment_id"
            ) from None
        self.rate.resume(state.get("rate"), state["step"])  # those of earlier versions have none
        self.weight.load_state_dict(state["loss_weight"])
        self.step, self.position, self.skipped = state["step"], state["position"], state["skipped"]
        log.info("resumed from %s", path)

    def _check_agreed(self, step: int) -> None:
        """ValueError where processes would go on from different updates, as of folders of their own."""
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len({*steps}) > 1:
            told = ", ".join("none" if each < 0 else str(each) for each in steps)
            raise ValueError(
                f"the processes found different checkpoints in {self.folder} (updates {told}): all machines "
                "must see the same folder"
            )


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if path.stem[5:].isdecimal())


def newest_state(folder: Path) -> tuple[Path | None, dict[str, Any], dict[Path, CheckpointError]]:
    """The newest checkpoint that is whole, if there are any, what it holds, and those that are damaged.

    ValueError where all are damaged.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_state(path), damaged
        except CheckpointError as error:
            damaged[path] = error
    if damaged:
        newest, cause = next(iter(damaged.items()))
        raise ValueError(
            f"{newest} is damaged ({cause}), and there is no earlier checkpoint that can be read: remove all "
            "to begin anew, or choose another experiment_id"
        )
    return None, {}, damaged


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; CheckpointError, which says the cause alone, if it is damaged."""
    state = read_archive(path)
    if not isinstance(state, dict) or not STATE <= state.keys():
        raise CheckpointError("it holds no state of a training")
    return state


def _set_aside(damaged: Mapping[Path, CheckpointError]) -> None:
    """Rename checkpoints, which would count among those to keep, and warn of each with its cause."""
    for path, cause in damaged.items():
        aside = path.rename(path.with_name(f"{path.name}.damaged"))
        log.warning("%s is damaged (%s) and is now %s: an earlier one is taken", path, cause, aside.name)


def _copied(value: Any) -> Any:
    """Nested plain data with a copy of every tensor in it, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value
