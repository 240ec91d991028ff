"""Training against the clock on one device: weights in float32 beside a copy that computes, and the loop.

The rate falls along a cosine of the time that is given, so that a training always ends finished. Nothing here
waits for the device but the log, every few seconds.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.training.trainer import CLIP_NORM, EMA_WARMUP
from core.weights.checkpoint import CheckpointError, read_metadata, read_tensors, save_tensors

log = logging.getLogger(__name__)

BETAS = (0.9, 0.99)  # a few thousand updates are too few for the usual 0.999


@dataclass(frozen=True)
class Budget:
    """How long a training takes, and what belongs to it."""

    minutes: float
    lr: float
    lr_end: float = 1e-5
    warmup: float = 0.02  # share of the time
    ema: float = 0.998
    max_updates: int | None = None  # ends it earlier, for trials
    log_seconds: float = 5.0
    save_seconds: float = 60.0

    def rate(self, share: float) -> float:
        """The learning rate after this share of the time."""
        if share < self.warmup:
            return self.lr * share / self.warmup
        over = min(1.0, (share - self.warmup) / (1 - self.warmup))
        return self.lr_end + (self.lr - self.lr_end) * (1 + math.cos(math.pi * over)) / 2


class Weights:
    """A module's trainable weights in float32 with AdamW and running means; the module computes in `dtype`.

    Updates whose gradient is not finite change nothing but the optimiser's means; `bad` counts them.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, ema: float) -> None:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names, self._ema = list(named), ema
        self.master = [p.detach().float().clone() for p in named.values()]
        self.mean = [p.clone() for p in self.master]
        module.to(dtype)
        self._computing = [dict(module.named_parameters())[name] for name in self.names]
        device = self.master[0].device
        self._gradients = [torch.zeros_like(p) for p in self.master]
        self._optimizer = torch.optim.AdamW(self.master, betas=BETAS, fused=device.type == "cuda" or None)
        self.step, self.bad = 0, torch.zeros((), dtype=torch.long, device=device)

    @torch.no_grad()
    def update(self, lr: float) -> Tensor:
        """One step of the optimiser with the gradients at hand; their norm, on the device."""
        for gradient, parameter in zip(self._gradients, self._computing, strict=True):
            gradient.copy_(torch.zeros_like(gradient) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        norm = torch.nn.utils.get_total_norm(self._gradients)
        finite = norm.isfinite()
        for gradient, master in zip(self._gradients, self.master, strict=True):
            master.grad = gradient.nan_to_num_(0, 0, 0)
        torch._foreach_mul_(self._gradients, torch.where(finite, (CLIP_NORM / norm).clamp(max=1), 0))
        self.bad += ~finite
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        decay = min(self._ema, (1 + self.step) / (EMA_WARMUP + self.step))
        torch._foreach_lerp_(self.mean, self.master, 1 - decay)
        self._show()
        self.step += 1
        return norm

    def forget(self) -> None:
        """Drop the gradients of an update that could not be finished."""
        for parameter in self._computing:
            parameter.grad = None

    def averaged(self) -> dict[str, Tensor]:
        """The running means by name, float32."""
        return dict(zip(self.names, self.mean, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Everything to go on from, by name."""
        state = [self._optimizer.state[p] for p in self.master]
        columns = {"master": self.master, "mean": self.mean}
        columns |= {key: [s[key] for s in state] for key in ("step", "exp_avg", "exp_avg_sq")}
        return {f"{k}/{n}": t for k, ts in columns.items() for n, t in zip(self.names, ts, strict=True)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take up what `tensors` gave after `step` updates."""
        for i, name in enumerate(self.names):
            self.master[i].copy_(tensors[f"master/{name}"])
            self.mean[i].copy_(tensors[f"mean/{name}"])
        keys = ("step", "exp_avg", "exp_avg_sq")
        state = {i: {k: tensors[f"{k}/{n}"] for k in keys} for i, n in enumerate(self.names)}
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        self.step = step
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        torch._foreach_copy_(self._computing, self.master)


@dataclass
class Part:
    """A training in progress: its weights, its clock, and its files in a folder."""

    name: str
    weights: Weights
    budget: Budget
    state_path: Path
    seconds: float = 0.0  # of training, also of earlier runs
    figures: dict[str, list[Tensor]] = field(default_factory=dict)  # losses since the last line of the log

    @staticmethod
    def seconds_in(path: Path) -> float:
        """How long the training whose state is in a file took so far; 0 where there is none."""
        return Part._about(path)["seconds"] if path.exists() else 0.0

    @staticmethod
    def _about(path: Path) -> dict[str, Any]:
        """What a state says of itself; ValueError if it is damaged."""
        try:
            return json.loads(read_metadata(path)["about"])
        except (CheckpointError, KeyError):
            raise ValueError(f"{path} is damaged: delete it, and this training begins anew") from None

    def resume(self) -> bool:
        """Go on from the last state, where there is one; whether there was."""
        if not self.state_path.exists():
            return False
        about = self._about(self.state_path)
        self.seconds = about["seconds"]
        self.weights.load(read_tensors(self.state_path), about["step"])
        return True

    def save(self) -> None:
        """Write the state, whole or not at all; nothing before the first update."""
        if not self.weights.step:
            return
        about = {"seconds": self.seconds, "step": self.weights.step}
        save_tensors(self.state_path, self.weights.tensors(), {"about": json.dumps(about)})

    @property
    def share(self) -> float:
        """How much of the time is over."""
        updates = self.budget.max_updates
        by_count = self.weights.step / updates if updates else 0.0
        return max(by_count, self.seconds / (60 * self.budget.minutes))

    def run(
        self,
        loss: Callable[[], tuple[str, Tensor]],
        on_log: Callable[[dict[str, object]], None],
        on_save: Callable[[], None],
        stopped: Callable[[], bool],
        on_full: Callable[[], None],
    ) -> None:
        """Train until the time is over or `stopped`; what was reached is saved in any case.

        `loss` gives a loss and the name under which it is logged; `on_full` makes it smaller where the
        device's memory was too little for one.
        """
        logged = saved = last = time.monotonic()
        began = self.weights.step
        try:
            while self.share < 1 and not stopped():
                if not self._update(loss):
                    on_full()
                now = time.monotonic()
                self.seconds += now - last
                last = now
                if now - logged > self.budget.log_seconds:
                    on_log(self._line(began, now - logged))
                    logged, began = now, self.weights.step
                if now - saved > self.budget.save_seconds:
                    self.save()
                    on_save()
                    saved = last = time.monotonic()  # the time of saving is not training's
        finally:
            if self.figures:
                on_log(self._line(began, time.monotonic() - logged))
            self.save()
            on_save()

    def _update(self, loss: Callable[[], tuple[str, Tensor]]) -> bool:
        """One update; False where memory was too little."""
        try:
            name, value = loss()
            value.backward()
        except torch.OutOfMemoryError:
            self.weights.forget()
            return False
        self.weights.update(self.budget.rate(self.share))
        self.figures.setdefault(name, []).append(value.detach())
        return True

    def _line(self, began: int, seconds: float) -> dict[str, object]:
        losses = {name: torch.stack(values) for name, values in self.figures.items()}
        means = {name: float(each[each.isfinite()].mean()) for name, each in losses.items()}
        self.figures.clear()
        if not any(map(math.isfinite, means.values())):  # no number is the mean of none
            raise ValueError(f"{self.name}: no loss was finite in the last {seconds:.0f} seconds")
        return {
            "part": self.name, "step": self.weights.step, "minutes": round(self.seconds / 60, 3),
            "updates_per_second": round((self.weights.step - began) / max(seconds, 1e-9), 2),
            "lr": self.budget.rate(self.share), "skipped": int(self.weights.bad),
            **{f"loss_{name}": round(mean, 5) for name, mean in means.items()},
        }  # fmt: skip
