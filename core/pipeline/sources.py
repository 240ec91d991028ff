"""What a picture goes out from besides its prompt: latents of other pictures, or of passes made before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from core.config.settings import Settings
from core.config.sizes import Size
from core.pipeline.passes import LowEnd, Start, needs_unconditional
from core.pipeline.resolution import Plan
from modules.effnet import imagenet_normalise

Encode = Callable[[Tensor, Size], Tensor]  # of a picture (3, H, W) the latent (1, 16, *size), on the CPU


@dataclass(frozen=True)
class Part:
    """A part of a picture that is made in place of it, of whole cells of its high-resolution latent."""

    whole: Plan
    sizes: Plan
    corner: Size  # its first row and column of cells


@dataclass(frozen=True)
class Source:
    """Where the passes of one picture begin, by default at noise; latents (1, 16, h, w) on the CPU."""

    low: Start | None = None  # of the low-resolution pass
    high: Start | None = None  # of the high-resolution pass
    guide: Tensor | None = None  # a clean latent of low resolution, in place of what its pass makes
    image: Tensor | None = None  # an image's embedding (1, 1, I), beside the prompt
    part: Part | None = None
    after: Callable[[Tensor], Tensor] | None = None  # to the finished pixels (3, H, W) from those made
    ended: LowEnd | None = None  # a low-resolution pass that was made before
    latent: Tensor | None = None  # Stage C's clean latent, made before: Stages B and A alone are left

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Source:
        """The same with changed latents."""

        def of(latent: Tensor | None) -> Tensor | None:
            return None if latent is None else change(latent)

        low, high = (
            start and Start(change(start.latent), start.strength, of(start.inside))
            for start in (self.low, self.high)
        )
        ended = self.ended and self.ended.mapped(change)
        return replace(self, low=low, high=high, guide=of(self.guide), ended=ended, latent=of(self.latent))

    def to(self, device: torch.device) -> Source:
        """The same on a device."""
        image = None if self.image is None else self.image.to(device)
        return replace(self.mapped(lambda latent: latent.to(device)), image=image)

    def needs_unconditional(self, settings: Settings) -> bool:
        """Whether any step of Stage C computes the unconditional half, or did so in the pass made before."""
        passes = [(settings, self.low, self.high)]
        if self.ended is not None:
            passes.append((self.ended.settings, Start(self.ended.x0, self.ended.strength), None))
        return any(needs_unconditional(*one)[0] for one in passes)

    def alike(self) -> tuple:
        """What is the same in sources of pictures that can be made at once."""
        starts = [
            start and (start.strength, start.inside is None, start.latent.shape)
            for start in (self.low, self.high)
        ]
        ended = self.ended and (self.ended.settings, self.ended.strength)
        return *starts, self.guide is None, ended, self.latent is None, self.part


NOISE_ALONE = Source()


@torch.no_grad()
def latent_of(picture: Tensor, encoder: Callable[[Tensor], Tensor], size: Size, stride: int) -> Tensor:
    """The encoder's latent (1, 16, *size) of a picture (3, H, W) in [0, 1], on the picture's device.

    It lies over the whole picture, of which the encoder sees `stride` pixels for a cell's side.
    """
    seen = F.interpolate(picture[None], [stride * side for side in size], mode="bilinear", antialias=True)
    return encoder(imagenet_normalise(seen))


def enlarge(picture: Tensor, size: Size) -> Tensor:
    """A picture (C, H, W) in another size, bicubic and clamped to [0, 1]; itself where it has the size."""
    if picture.shape[-2:] == size:
        return picture
    return F.interpolate(picture[None], size=size, mode="bicubic", align_corners=False)[0].clamp(0, 1)


def stacked(sources: Sequence[Source]) -> Source:
    """The source (B, 16, h, w) of several pictures, whose sources are alike."""
    first, *rest = sources
    if not rest:
        return first
    tensors: list[list[Tensor]] = []
    for source in sources:
        own: list[Tensor] = []
        source.mapped(lambda latent, own=own: own.append(latent) or latent)
        tensors.append(own)
    columns = iter(zip(*tensors, strict=True))
    return first.mapped(lambda _: torch.cat(next(columns)))
