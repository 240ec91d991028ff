"""Where a run stands, and who is told: observers, which may end it, and the progress bars."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from core.config.settings import Job
from core.printable import say, unbroken


@dataclass(frozen=True)
class Progress:
    """Where a run stands: a step of a picture's stage, and the estimate of the clean latent so far."""

    stage: str
    job: Job
    step: int  # of `steps`, counted from 1
    steps: int
    latent: Tensor | None = None


Observer = Callable[[Progress], bool | None]  # True ends the run; nothing else does


class Stopped(Exception):
    """An observer ended the run."""


def harmless(observer: Observer) -> Observer:
    """The observer, but that its first error costs a warning, and its being called."""
    failed = False

    def called(progress: Progress) -> bool | None:
        nonlocal failed
        if failed:
            return None
        try:
            return observer(progress)
        except Exception as error:  # whatever it is: the picture does not depend on it
            failed = True
            warnings.warn(f"{_name(observer)} failed ({error}); the run goes on without it", stacklevel=2)
            return None

    return called


def counting(bar: tqdm, stage: str | None = None) -> Observer:
    """An observer that counts all steps on a bar, or those of one stage; the bar's answer ends nothing."""

    def count(progress: Progress) -> None:
        bar.update(stage is None or progress.stage == stage)

    return count


def _name(observer: Observer) -> str:
    return getattr(observer, "__name__", type(observer).__name__)


class Together:
    """Several observers as one, each harmless to the run; `stopped` once one of them has returned True."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = [harmless(observer) for observer in observers]
        self.stopped = False

    def __call__(self, progress: Progress) -> bool:
        answers = [observer(progress) for observer in self._observers]
        self.stopped = self.stopped or any(answer is True for answer in answers)
        return self.stopped


class ProgressBars:
    """A progress bar per stage, with all its pictures' steps; use it as the pipeline's observer."""

    def __init__(self, jobs: Sequence[Job], bar: type[tqdm] = tqdm) -> None:
        self._jobs = list(jobs)
        self._bar = bar
        self._bars: dict[str, tqdm] = {}
        self._begun: Counter[str] = Counter()  # jobs by stage

    def __call__(self, progress: Progress) -> None:
        with unbroken(sys.stderr):
            self._advance(progress)

    def _advance(self, progress: Progress) -> None:
        bar = self._bars.get(progress.stage)
        if bar is None:
            total = progress.steps * len(self._jobs)
            bar = self._bar(total=total, desc=progress.stage.ljust(24), unit="step")
            self._bars[progress.stage] = bar
        if progress.step == 1:  # the jobs that are left may have other numbers of steps
            left = max(1, len(self._jobs) - self._begun[progress.stage])
            bar.total = bar.n + left * progress.steps
            self._begun[progress.stage] += 1
        bar.update()
        if bar.n == bar.total:  # its clock stands still, as it is drawn again when others move
            ended = bar._time()
            bar._time = lambda: ended

    def say(self, text: str) -> None:
        """Write a line to standard output, beside which the bars stay whole."""
        with unbroken(sys.stderr):
            for bar in self._bars.values():
                bar.clear()
        say(text, sys.stdout)

    def close(self) -> None:
        """End all bars, from above: one that ended earlier would move those below it."""
        with unbroken(sys.stderr):
            for bar in self._bars.values():
                bar.close()
