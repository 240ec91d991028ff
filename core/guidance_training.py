"""Training of the guidance parameters (paper section 3.2, eq. 5): what a step sees and predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.conditioning import Conditions
from core.config import LatentGeometry
from core.resolution import lr_training_size
from core.settings import TRAINING_R
from gdf.diffusion import diffuse
from gdf.noise_conditions import cosine_t
from gdf.scalers import expand_like, variance_preserving
from gdf.schedules import cosine, draw_times
from gdf.targets import Target
from modules.effnet import imagenet_normalise
from modules.guidance import Guidance
from modules.stage_c import StageC, StageCConditions

TEXT_DROPOUT = 0.05  # share of captions that are replaced by the empty one, tokens and pooled text together
IMAGE_SHARE = 0.1  # share of samples that see their image embedding


@dataclass(frozen=True)
class SampleNoise:
    """The random numbers of a batch's samples; each sample's depend on its own key alone."""

    t: Tensor  # (B,)
    epsilon: Tensor  # (B, 16, H, W)
    epsilon_lr: Tensor  # (B, 16, h, w)
    drop_text: Tensor  # (B,), bool
    use_image: Tensor  # (B,), bool


@dataclass(frozen=True)
class NoisyLatents:
    """What the network sees and should predict, for a batch."""

    x: Tensor  # (B, 16, H, W)
    r: Tensor  # (B,)
    x_lr: Tensor  # (B, 16, h, w)
    r_lr: Tensor  # (B,)
    logsnr: Tensor  # (B,)
    target: Tensor  # (B, 16, H, W)


def draw_noise(keys: Sequence[Sequence[int]], size: Sequence[int], size_lr: Sequence[int]) -> SampleNoise:
    """Random numbers for samples with these keys, such as (seed, update, index in the update).

    `size` and `size_lr` are (channels, height, width). However a batch is split over processes and
    accumulation, a sample's numbers stay the same; they are drawn on the CPU.
    """
    drawn = []
    for key in keys:
        state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state % 2**63))
        t = draw_times(1, generator)[0]
        epsilon, epsilon_lr = (
            torch.randn(*size, generator=generator),
            torch.randn(*size_lr, generator=generator),
        )
        drop, image = torch.rand(2, generator=generator)
        drawn.append((t, epsilon, epsilon_lr, drop < TEXT_DROPOUT, image < IMAGE_SHARE))
    return SampleNoise(*(torch.stack(column) for column in zip(*drawn, strict=True)))


def noise_latents(z: Tensor, z_lr: Tensor, noise: SampleNoise, target: Target) -> NoisyLatents:
    """Diffuse latents (B, 16, H, W) at the samples' times and (B, 16, h, w) at t = 0.05 (section 4.1)."""
    epsilon, epsilon_lr = noise.epsilon.to(z), noise.epsilon_lr.to(z_lr)
    logsnr = cosine(noise.t).to(z.device)
    logsnr_lr = cosine(torch.full_like(noise.t, TRAINING_R)).to(z.device)
    a, b = (expand_like(value, z) for value in variance_preserving(logsnr))
    return NoisyLatents(
        x=diffuse(z, epsilon, logsnr),
        r=cosine_t(logsnr),
        x_lr=diffuse(z_lr, epsilon_lr, logsnr_lr),
        r_lr=cosine_t(logsnr_lr),
        logsnr=logsnr,
        target=target.of(z, epsilon, a, b),
    )


class GuidedStageC(nn.Module):
    """The guidance with a frozen Stage C around it: only the guidance's parameters belong to this module."""

    def __init__(self, stage_c: StageC, guidance: Guidance) -> None:
        super().__init__()
        self.guidance = guidance
        self._frozen = (stage_c.requires_grad_(False).eval(),)  # in a tuple: not a submodule, not a parameter

    @property
    def stage_c(self) -> StageC:
        """The frozen base."""
        return self._frozen[0]

    def forward(self, latents: NoisyLatents, conditions: Conditions) -> Tensor:
        """The high-resolution prediction (B, 16, H, W), guided by features that carry no gradient.

        Run it under autocast where Stage C is in bfloat16: the guidance stays in float32.
        """
        dtype = self.stage_c.clf[1].weight.dtype
        with torch.no_grad():
            held: StageCConditions = self.stage_c.prepare(
                conditions.clip_text, conditions.clip_text_pooled, conditions.clip_img
            )
            _, features = self.stage_c.predict_with_features(latents.x_lr.to(dtype), latents.r_lr, held)
        size = (latents.x.shape[-2], latents.x.shape[-1])
        guidance = self.guidance.prepare(features, size)
        return self.stage_c.predict(latents.x.to(dtype), latents.r, held, guidance=guidance)


def drop_conditions(conditions: Conditions, empty: Conditions, noise: SampleNoise) -> Conditions:
    """Replace the chosen samples' texts by the empty one, and the images of those not chosen by zeros."""
    drop = noise.drop_text[:, None, None].to(conditions.clip_text.device)
    use = noise.use_image[:, None, None].to(conditions.clip_img.device)
    return Conditions(
        torch.where(drop, empty.clip_text, conditions.clip_text),
        torch.where(drop, empty.clip_text_pooled, conditions.clip_text_pooled),
        conditions.clip_img * use,
    )


@torch.no_grad()
def encode_latents(
    effnet: Callable[[Tensor], Tensor], images: Tensor, geometry: LatentGeometry
) -> tuple[Tensor, Tensor]:
    """Semantic latents of pictures (B, 3, H, W) in [0, 1] and of their low-resolution copies, float32."""
    small = lr_training_size(images.shape[-2], images.shape[-1], geometry)
    low = F.interpolate(images, size=small, mode="bilinear", antialias=True, align_corners=False)
    return effnet(imagenet_normalise(images)).float(), effnet(imagenet_normalise(low)).float()
