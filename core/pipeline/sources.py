"""What a picture goes out from besides its prompt: latents of other pictures, or of passes made before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from core.config.sizes import Size
from core.pipeline.passes import Start
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

    def to(self, device: torch.device) -> Source:
        """The same on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        low, high = (
            start and Start(start.latent.to(device), start.strength, moved(start.inside))
            for start in (self.low, self.high)
        )
        return replace(self, low=low, high=high, guide=moved(self.guide), image=moved(self.image))


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
