"""Timing side by side: both candidates in turn, several times, and the ratio of their fastest runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """Fastest seconds of two ways to compute the same, and how far apart the outputs are (relative norm)."""

    name: str
    ours: float
    theirs: float
    error: float

    def __str__(self) -> str:
        ratio = self.ours / self.theirs
        figures = f"{self.ours:>9.3f} s{self.theirs:>9.3f} s  ratio {ratio:.3f}  apart {self.error:.1e}"
        return f"{self.name:<44}{figures}"


def seconds(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], runs: int = 5) -> Comparison:
    """Run both once to warm up and to compare outputs, then `runs` times in turn."""
    a, b = ours(), theirs()
    error = float((a - b).norm() / b.norm())
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    return Comparison(name, min(p[0] for p in pairs), min(p[1] for p in pairs), error)
