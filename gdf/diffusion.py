"""The training side of diffusion: noising, Stage B's pyramid noise, and the losses of a prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gdf.scalers import Scaler, expand_like, variance_preserving

PYRAMID_LEVELS = 9
PYRAMID_FACTOR = 0.75
PYRAMID_SIDES = (1, 16)


def diffuse(x0: Tensor, epsilon: Tensor, logsnr: Tensor, scaler: Scaler = variance_preserving) -> Tensor:
    """x_t = a·x0 + b·epsilon, shaped and typed like x0 (B, …), for a logSNR of shape (B,) or ()."""
    a, b = scaler(logsnr)
    return (expand_like(a, x0) * x0 + expand_like(b, x0) * epsilon).to(x0.dtype)


def pyramid_noise(
    shape: Sequence[int], generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Unit-variance noise (B, C, H, W) with coarse parts, Stage B's training noise, from a CPU generator.

    Level i adds 0.75^i times noise at 1/2^i of the size where one of its sides is 1 to 16, until a side is 1.
    """
    noise = torch.randn(*shape, generator=generator)
    variance = 1.0
    for level in range(1, PYRAMID_LEVELS + 1):
        height, width = shape[-2] >> level, shape[-1] >> level
        in_range = any(PYRAMID_SIDES[0] <= side <= PYRAMID_SIDES[1] for side in (height, width))
        if not in_range or min(height, width) < 1:
            continue
        coarse = torch.randn(*shape[:-2], height, width, generator=generator)
        noise += PYRAMID_FACTOR**level * F.interpolate(coarse, size=tuple(shape[-2:]), mode="nearest")
        variance += PYRAMID_FACTOR ** (2 * level)
    return (noise / variance**0.5).to(device)


def sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each sample of a batch (B, …): (B,), float32 (paper eq. 5)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
