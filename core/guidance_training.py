"""Training of the guidance parameters (paper section 3.2, eq. 5): what a step sees and predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.conditioning import Conditions
from core.noising import noised
from core.random_keys import generator_of
from core.settings import TRAINING_R
from gdf.schedules import draw_times
from gdf.targets import Target
from modules.guidance import Guidance
from modules.stage_c import StageC, StageCConditions

TEXT_DROPOUT = 0.05  # share of samples whose text, tokens and pooled, is replaced by the empty one's
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


def draw_noise(
    keys: Sequence[Sequence[int]],
    size: Sequence[int],
    size_lr: Sequence[int] = (0, 0, 0),
    text_dropout: float = TEXT_DROPOUT,
) -> SampleNoise:
    """Random numbers for samples with these keys, such as (seed, update, index in the update).

    `size` and `size_lr`, where there is a low resolution, are (channels, height, width); `text_dropout` is
    the share of samples without their text. However a batch is split over processes and accumulation, a
    sample's numbers stay the same; they are drawn on the CPU.
    """
    drawn = []
    for key in keys:
        generator = generator_of(key)
        t = draw_times(1, generator)[0]
        epsilon, epsilon_lr = (
            torch.randn(*size, generator=generator),
            torch.randn(*size_lr, generator=generator),
        )
        drop, image = torch.rand(2, generator=generator)
        drawn.append((t, epsilon, epsilon_lr, drop < text_dropout, image < IMAGE_SHARE))
    return SampleNoise(*(torch.stack(column) for column in zip(*drawn, strict=True)))


def noise_latents(
    z: Tensor, z_lr: Tensor, noise: SampleNoise, target: Target, t_lr: float | Tensor = TRAINING_R
) -> NoisyLatents:
    """Diffuse latents (B, 16, H, W) at the samples' times and (B, 16, h, w) at `t_lr`: 0.05 (section 4.1).

    `t_lr` may also be a time for each sample (B,).
    """
    low_t = t_lr if isinstance(t_lr, Tensor) else torch.full_like(noise.t, t_lr)
    high = noised(z, noise.t, noise.epsilon, target)
    low = noised(z_lr, low_t, noise.epsilon_lr, target)
    return NoisyLatents(high.x, high.r, low.x, low.r, high.logsnr, high.target)


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
        guidance = self.guidance.prepare(features, self.stage_c.site_sizes(size))
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
