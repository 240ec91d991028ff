"""Sheets of previews during training: real, reconstructed, and sampled at low and at high resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from core.config.settings import Settings
from core.pictures.images import to_image
from core.pipeline.conditioning import Conditions
from core.pipeline.passes import NoiseSource, high_resolution_pass, low_resolution_pass, prepare_stage_c
from core.pipeline.resolution import Plan
from gdf.targets import Target
from modules.guidance import Guidance
from modules.previewer import Previewer
from modules.stage_c import StageC

SIDE = 256  # pixels of a picture on the sheet


@torch.no_grad()
def sample_latents(
    stage_c: StageC,
    guidance: Guidance | None,
    conditions: Conditions,
    target: Target,
    plan: Plan,
    settings: Settings,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Latents (1, 16, …) of both passes; the conditions are [conditional, unconditional]."""
    device = next(stage_c.parameters()).device
    held = prepare_stage_c(stage_c, conditions)
    low, features = low_resolution_pass(
        stage_c, held, target, plan, settings, NoiseSource.of(seed, 0, device)
    )
    bound = None if guidance is None else guidance.prepare(features, stage_c.site_sizes(plan.hr_latent))
    noise = NoiseSource.of(seed, 1, device)
    return low.x0, high_resolution_pass(stage_c, held, bound, target, plan, settings, noise).x0


def with_latents(plan: Plan, z: Tensor, z_lr: Tensor) -> Plan:
    """The plan with the latent sizes that training sees: the encoder's, finer than generation's."""
    hr, lr = ((latent.shape[-2], latent.shape[-1]) for latent in (z, z_lr))
    return replace(plan, hr_latent=hr, lr_latent=lr)


@torch.no_grad()
def preview_row(previewer: Previewer, image: Tensor, latents: Sequence[Tensor]) -> Tensor:
    """A picture (3, H, W) and previews of latents (1, 16, …) beside each other: (3, SIDE, n·SIDE)."""
    weight = next(previewer.parameters())
    return row_of([image.to(weight), *(previewer(latent.to(weight))[0] for latent in latents)])


def row_of(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (3, …) of any sizes beside each other: (3, SIDE, n·SIDE), clamped to [0, 1]."""
    resized = [
        F.interpolate(picture[None].float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]
        for picture in pictures
    ]
    return torch.cat(resized, dim=2).clamp(0, 1)


def sheet(rows: Sequence[Tensor]) -> Image.Image:
    """Rows beneath each other as one picture."""
    return to_image(torch.cat(list(rows), dim=1))
