"""Input scalers: logSNR to the factors of x_t = a·x0 + b·epsilon."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Scaler = Callable[[Tensor], tuple[Tensor, Tensor]]


def variance_preserving(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with a² + b² = 1, shaped like logsnr; the published scaling."""
    return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()


def linear_interpolation(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with a + b = 1, shaped like logsnr; rectified flow's scaling (arXiv 2209.03003)."""
    # Equal to `noise_conditions.rectified_flow` and 1 minus it, without their cancellation in float32.
    return (logsnr / 2).sigmoid(), (-logsnr / 2).sigmoid()


def expand_like(values: Tensor, x: Tensor) -> Tensor:
    """Values of shape () as they are, of shape (B,) as (B, 1, …), to multiply an x of shape (B, …)."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1)) if values.ndim else values
