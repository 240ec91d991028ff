"""What the network predicts, and how x0 and epsilon are read out of a prediction, for x = a·x0 + b·epsilon.

a and b are scalars or broadcast against x (see `scalers.expand_like`); no scaler is assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Target:
    """One kind of prediction: its training target and its two read-outs."""

    name: str
    of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x0, epsilon, a, b) -> training target
    x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, prediction, a, b) -> clean latent
    epsilon: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, prediction, a, b) -> noise


EPSILON = Target(
    name="epsilon",  # the published models
    of=lambda _x0, epsilon, _a, _b: epsilon,
    x0=lambda x, prediction, a, b: (x - b * prediction) / a,
    epsilon=lambda _x, prediction, _a, _b: prediction,
)

X0 = Target(
    name="x0",
    of=lambda x0, _epsilon, _a, _b: x0,
    x0=lambda _x, prediction, _a, _b: prediction,
    epsilon=lambda x, prediction, a, b: (x - a * prediction) / b,
)

# The divisor is 1 for the variance-preserving scaler.
V = Target(
    name="v",  # arXiv 2202.00512, app. D
    of=lambda x0, epsilon, a, b: a * epsilon - b * x0,
    x0=lambda x, prediction, a, b: (a * x - b * prediction) / (a**2 + b**2),
    epsilon=lambda x, prediction, a, b: (b * x + a * prediction) / (a**2 + b**2),
)

# The divisor is 1 for the linear scaler.
RECTIFIED_FLOW = Target(
    name="rectified_flow",  # arXiv 2209.03003, eq. 1
    of=lambda x0, epsilon, _a, _b: epsilon - x0,
    x0=lambda x, prediction, a, b: (x - b * prediction) / (a + b),
    epsilon=lambda x, prediction, a, b: (x + a * prediction) / (a + b),
)


def target_named(name: str) -> Target:
    """The target of this name; raises ValueError for an unknown one."""
    known = {target.name: target for target in (EPSILON, X0, V, RECTIFIED_FLOW)}
    if name not in known:
        raise ValueError(f"unknown prediction target {name!r}: use one of {', '.join(known)}")
    return known[name]
