"""What a picture goes out from besides its prompt: latents of other pictures, or of passes made before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.pipeline.passes import Start


@dataclass(frozen=True)
class Source:
    """Where the passes of one picture begin, by default at noise; latents (1, 16, h, w) on the CPU."""

    low: Start | None = None  # of the low-resolution pass
    high: Start | None = None  # of the high-resolution pass
    guide: Tensor | None = None  # a clean latent of low resolution, in place of what its pass makes

    def to(self, device: torch.device) -> Source:
        """The same on a device."""

        def moved(start: Start | None) -> Start | None:
            return None if start is None else Start(start.latent.to(device), start.strength)

        guide = None if self.guide is None else self.guide.to(device)
        return Source(moved(self.low), moved(self.high), guide)


NOISE_ALONE = Source()
