"""Latents as a denoiser sees them in training, noised at random times, and what it should predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdf.diffusion import diffuse
from gdf.noise_conditions import cosine_t
from gdf.scalers import expand_like, variance_preserving
from gdf.schedules import TIME_MIN, cosine
from gdf.targets import Target


@dataclass(frozen=True)
class Noised:
    """What a network sees, and its target."""

    x: Tensor  # (B, C, H, W)
    r: Tensor  # (B,)
    logsnr: Tensor  # (B,)
    target: Tensor  # (B, C, H, W)


def noised(z: Tensor, t: Tensor, epsilon: Tensor, target: Target) -> Noised:
    """Diffuse latents z (B, C, H, W) at times t (B,) with noise epsilon, in z's dtype and on its device."""
    epsilon, logsnr = epsilon.to(z), cosine(t).to(z.device)
    a, b = (expand_like(value, z) for value in variance_preserving(logsnr))
    x = diffuse(z, epsilon, logsnr)
    return Noised(x, cosine_t(logsnr), logsnr, target.of(z, epsilon, a, b))


def shifted(t: Tensor, shift: Tensor) -> Tensor:
    """Times t (B,) with the logSNR lowered by 2·ln(shift), (B,), as far as the schedule goes.

    A picture that is `shift` times as large shows what it is through that much more noise.
    """
    logsnr = cosine(t.clamp(min=TIME_MIN)) - 2 * shift.log()
    return cosine_t(logsnr.clamp(min=float(cosine(torch.ones(())))))
