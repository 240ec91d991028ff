"""Training of Stage B, with the encoder of its condition along, as the semantic compressor was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import StageBTrainConfig
from core.noising import Noised
from core.random_keys import generator_of
from gdf.diffusion import pyramid_noise
from gdf.schedules import draw_times
from modules.effnet import EfficientNetEncoder, imagenet_normalise
from modules.stage_b import StageB

LATENT_SHARE = 0.9  # of the samples that see the encoder's latent, the others zeros
TEXT_DROPOUT = 0.05
SCALES = (0.5, 1.0)  # of the picture that the encoder sees


@dataclass(frozen=True)
class StageBNoise:
    """The random numbers of a batch's samples; each sample's depend on its own key alone."""

    t: Tensor  # (B,)
    epsilon: Tensor  # (B, 4, H, W)
    keep_latent: Tensor  # (B,), bool
    drop_text: Tensor  # (B,), bool
    seeds: list[int]  # of the noise on the encoder's latents, whose size is not known yet


def draw_noise(keys: Sequence[Sequence[int]], size: Sequence[int], pyramid: bool) -> StageBNoise:
    """Random numbers for samples with these keys and latents of `size` (4, H, W), drawn on the CPU."""
    drawn, seeds = [], []
    for key in keys:
        generator = generator_of(key)
        t = draw_times(1, generator)[0]
        shape = (1, *size)
        noise = pyramid_noise(shape, generator) if pyramid else torch.randn(shape, generator=generator)
        keep, drop = torch.rand(2, generator=generator)
        drawn.append((t, noise[0], keep < LATENT_SHARE, drop < TEXT_DROPOUT))
        seeds.append(int(torch.randint(2**62, (), generator=generator)))
    return StageBNoise(*(torch.stack(column) for column in zip(*drawn, strict=True)), seeds)


def encoder_picture(images: Tensor, key: Sequence[int], stride: int) -> Tensor:
    """Pictures (B, 3, H, W) as the encoder sees them: at a random scale, sides multiples of its stride.

    The scale follows from the update's key, so that all samples and processes share it.
    """
    low, high = SCALES
    scale = low + (high - low) * float(torch.rand((), generator=generator_of(key)))
    size = [max(1, round(scale * side / stride)) * stride for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


class StageBTraining(nn.Module):
    """Stage B, and the encoder whose latents condition it, where that is trained along."""

    def __init__(
        self, stage_b: StageB, effnet: EfficientNetEncoder | None, config: StageBTrainConfig
    ) -> None:
        super().__init__()
        self.stage_b, self.effnet, self.latent_noise = stage_b, effnet, config.latent_noise

    def forward(self, latents: Noised, seen: Tensor, pooled: Tensor, noise: StageBNoise) -> Tensor:
        """The prediction (B, 4, H, W) given pooled texts (B, 1, P) and pictures (B, 3, h, w) in [0, 1].

        Without an encoder, `seen` are the latents (B, 16, h, w) of a finished one instead of pictures.
        """
        effnet = seen if self.effnet is None else self.effnet(imagenet_normalise(seen))
        if self.latent_noise:
            draws = [torch.randn(effnet.shape[1:], generator=generator_of((seed,))) for seed in noise.seeds]
            effnet = effnet + self.latent_noise * torch.stack(draws).to(effnet)
        effnet = effnet * noise.keep_latent.to(effnet)[:, None, None, None]
        return self.stage_b(latents.x, latents.r, effnet, pooled)
