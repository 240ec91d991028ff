"""The learning rate of each update: a linear warm-up with a cosine, or a constant rate, behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from warmup_scheduler import GradualWarmupScheduler


@dataclass(frozen=True)
class Course:
    """What the rate of an update follows from, beside its number."""

    lr: float
    updates: int
    warmup_updates: int = 0
    lr_end: float | None = None  # at the last update, along a cosine; None: lr stays


class _Cosine(CosineAnnealingLR):
    """The cosine by its formula: torch computes each rate from the one before, and what the warm-up takes for
    the first one would lie above the top.
    """

    def get_lr(self) -> list[float]:
        return self._get_closed_form_lr()


class LearningRate:
    """Sets an optimizer's rate: that of the first update at once, and that of the next one at each `step`."""

    def __init__(self, optimizer: Optimizer, course: Course) -> None:
        self._course = course
        optimizer._opt_called = True  # else torch warns of the step below, and of skipped updates
        end = course.lr if course.lr_end is None else course.lr_end
        self._cosine = _Cosine(optimizer, max(1, course.updates - course.warmup_updates), end)
        self._warmup = None
        if course.warmup_updates > 0:  # by which it divides
            self._warmup = GradualWarmupScheduler(optimizer, 1, course.warmup_updates, self._cosine)
            self.step()  # its rates start with 0, with which an update would be lost

    def step(self) -> None:
        """On to the next update."""
        (self._warmup or self._cosine).step()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The course, and both schedulers as plain numbers."""
        warmup = self._warmup.state_dict() if self._warmup else {}
        warmup.pop("after_scheduler", None)  # an object; its numbers are the cosine's
        return {"course": asdict(self._course), "warmup": warmup, "cosine": self._cosine.state_dict()}

    def resume(self, state: Mapping[str, Mapping[str, Any]] | None, step: int) -> None:
        """Go on at update `step` with a `state_dict` (None: a checkpoint without), after the optimizer's.

        With other `updates` the rate goes on from where it is, along one cosine to the new end. A run that
        had ended, or whose rates were others, goes on as if its course had always been the present one.
        """
        then = None if state is None else Course(**state["course"])
        if then is None or not self._continues(then, step):
            for _ in range(step):
                self.step()
            return
        self._cosine.load_state_dict(state["cosine"])
        if self._warmup:
            self._warmup.load_state_dict(state["warmup"])
        if then.updates != self._course.updates:
            self._end_at(self._course.updates - self._course.warmup_updates)

    def _continues(self, then: Course, step: int) -> bool:
        same = replace(then, updates=self._course.updates) == self._course
        return same and (then == self._course or step < min(then.updates, self._course.updates))

    def _end_at(self, length: int) -> None:
        """Give the cosine another length, and the top from which it passes through its present rate."""
        cosine = self._cosine
        rates, low = cosine.get_lr(), cosine.eta_min
        cosine.T_max = max(1, length)
        share = (1 + math.cos(math.pi * cosine.last_epoch / cosine.T_max)) / 2
        cosine.base_lrs = [low + (rate - low) / share for rate in rates]
