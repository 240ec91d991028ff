"""Noise conditions: logSNR (any shape, float32) to the number by which a network is told the noise level."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gdf.schedules import cosine_constants

NoiseCondition = Callable[[Tensor], Tensor]


def cosine_t(logsnr: Tensor) -> Tensor:
    """The time at which the cosine schedule has this logSNR; what the published networks see."""
    s, variance_at_zero = cosine_constants(logsnr.device)
    angle = torch.acos((logsnr.sigmoid() * variance_at_zero).sqrt())
    return angle / (math.pi / 2) * (1 + s) - s


def edm(logsnr: Tensor) -> Tensor:
    """A quarter of ln(sigma) (arXiv 2206.00364, table 1)."""
    return -logsnr / 8


def sigmoid(logsnr: Tensor) -> Tensor:
    """The noise variance of the variance-preserving scaler."""
    return (-logsnr).sigmoid()


def raw(logsnr: Tensor) -> Tensor:
    """LogSNR itself."""
    return logsnr


def edm_sigma(logsnr: Tensor) -> Tensor:
    """The noise level b / a."""
    return (-logsnr / 2).exp()


def rectified_flow(logsnr: Tensor) -> Tensor:
    """The signal's share a / (a + b) of a straight path."""
    # Numerator and denominator vanish together towards logsnr = 0, hence the floor.
    snr_minus_one = logsnr.exp() - 1
    snr_minus_one = torch.where(snr_minus_one.abs() < 1e-3, 1e-3, snr_minus_one)
    return 1 + (2 - (4 + 4 * snr_minus_one).sqrt()) / (2 * snr_minus_one)


def discrete(condition: NoiseCondition, levels: int) -> NoiseCondition:
    """A condition in [0, 1] as the nearest of the integers 0 … levels - 1 (int64)."""
    return lambda logsnr: (condition(logsnr) * (levels - 1)).round().clamp(0, levels - 1).long()
