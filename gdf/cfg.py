"""The settings of classifier-free guidance; it loads no torch, as flags are checked with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CfgSettings:
    """Classifier-free guidance: its weight over time, its rescaling, and the times at which it works.

    Raises ValueError for a rescaling or an interval outside [0, 1].
    """

    weight: float = 4.0  # at t = 1; 1 is no guidance
    weight_end: float | None = None  # at t = 0; None: as at t = 1
    rho: float = 0.7  # share of the prediction that takes the conditional half's deviation
    interval: tuple[float, float] = (0.0, 1.0)  # of t, ends included (arXiv 2404.07724)

    def __post_init__(self) -> None:
        if not 0 <= self.rho <= 1:
            raise ValueError(f"the guidance rescaling rho is {self.rho}, but must lie between 0 and 1")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"the guidance interval is {low} to {high}, but must rise within 0 to 1")

    def weight_at(self, t: float) -> float:
        """The weight at time t, linear between its values at 1 and 0."""
        end = self.weight if self.weight_end is None else self.weight_end
        return end + t * (self.weight - end)

    def needed_at(self, t: float) -> bool:
        """Whether the unconditional half has any effect at time t."""
        low, high = self.interval
        return low <= t <= high and self.weight_at(t) != 1
