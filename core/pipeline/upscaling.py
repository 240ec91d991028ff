"""Existing pictures made large as a whole: sizes, what guides the passes, and the colours of the result.

The latent of the picture at low resolution, with the noise that the guidance was trained with, stands in for
the low-resolution pass (paper section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from core.config.settings import Job, Settings
from core.config.sizes import Size
from core.pipeline.given import Original
from core.pipeline.passes import Start, check_strength
from core.pipeline.resolution import Plan
from core.pipeline.sources import Encode, Source, enlarge

LEAST_DEVIATION = 1 / 255  # of a channel, below which its contrast is not raised


@dataclass(frozen=True)
class Upscaling:
    """How pictures are made large: `factor` times; or to a height, a width, or what lies within both.

    ValueError for factor and sides together, and for a factor below 1 or a strength outside (0, 1].
    """

    box: Size  # (height, width), within which they lie if nothing is asked
    height: int | None = None
    width: int | None = None
    factor: float | None = None
    strength: float = 1.0  # 1: the high-resolution pass begins at noise, below: at the enlarged picture
    match_colours: bool = True

    def __post_init__(self) -> None:
        if self.factor is not None and (self.height, self.width) != (None, None):
            raise ValueError("a factor and a height or width do not go together: give one of them")
        if self.factor is not None and not 1 <= self.factor < math.inf:  # a NaN is neither
            raise ValueError(f"factor must be a number from 1 up, not {self.factor}")
        check_strength(self.strength)

    def size(self, own: Size) -> Size:
        """The (height, width) of a picture of `own`, in its shape; ValueError where it would get smaller."""
        asked = self.height, self.width
        if asked == (None, None):
            asked = self.box
        sides = zip(asked, own, strict=True)
        scale = self.factor or min(side / has for side, has in sides if side is not None)
        if scale < 1:
            raise ValueError(
                f"the picture has {own[0]} x {own[1]} pixels (height x width), more than was asked for: "
                "give a factor, or a larger height or width"
            )
        return round(scale * own[0]), round(scale * own[1])

    def source(self, picture: Original, encode: Encode, sizes: Plan) -> Source:
        """What the passes of a picture go out from."""
        guide, high = encode(picture.pixels, sizes.lr_latent), None
        if self.strength < 1:
            high = Start(encode(picture.pixels, sizes.hr_latent), self.strength)
        return Source(high=high, guide=guide, after=partial(self.finished, picture))

    def finished(self, picture: Original, made: Tensor) -> Tensor:
        """Made pixels (3, H, W) in the colours of a picture, and with its alpha, if it has one: (4, H, W)."""
        if self.match_colours:
            made = with_colours_of(picture.pixels, picture.alpha, made)
        if picture.alpha is None:
            return made
        return torch.cat([made, enlarge(picture.alpha, tuple(made.shape[-2:]))])


def without_idle_cfg(settings: Settings, jobs: Sequence[Job]) -> Settings:
    """The settings; without cfg where it changes nothing.

    That is where all prompts are the negative ones, and both halves have the same guidance.
    """
    if any(job.prompt != job.negative_prompt for job in jobs) or settings.guidance_unconditional != 1:
        return settings
    return replace(settings, cfg=1.0, cfg_end=None)


def with_colours_of(picture: Tensor, alpha: Tensor | None, made: Tensor) -> Tensor:
    """Made pixels (3, H, W) with the mean and deviation that each channel has in a picture (3, h, w).

    Over the whole picture; with alpha (1, h, w), over what can be seen of it.
    """
    mean, deviation = _moments(picture, alpha)
    if alpha is not None:
        alpha = enlarge(alpha, tuple(made.shape[-2:]))
    own_mean, own_deviation = _moments(made, alpha)
    ratio = deviation / own_deviation.clamp(min=LEAST_DEVIATION)
    return torch.addcmul(mean - ratio * own_mean, made, ratio).clamp_(0, 1)


def _moments(picture: Tensor, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, 1) of pixels (3, H, W), each of the weight in alpha (1, H, W)."""
    if alpha is None or not alpha.any():
        deviation, mean = torch.std_mean(picture, dim=(1, 2), keepdim=True, correction=0)
        return mean, deviation
    share = alpha / alpha.sum(dtype=torch.float64)
    mean = (share * picture).sum(dim=(1, 2), keepdim=True)
    variance = (share * (picture - mean).square()).sum(dim=(1, 2), keepdim=True)
    return mean.to(picture), variance.sqrt().to(picture)
