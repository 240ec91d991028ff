"""The training of the tiny family's guidance on pictures of 384 pixels, for the benchmarks of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from core.config.schema import LatentGeometry
from core.config.sizes import TINY
from core.pipeline.conditioning import Conditions
from core.training.encoders import at_low_resolution, encode_latent
from core.training.guidance import GuidedStageC, draw_noise, noise_latents
from core.training.trainer import Recipe, StepLoss
from gdf.diffusion import sample_losses
from gdf.targets import V
from modules.effnet import EfficientNetEncoder
from modules.guidance import Guidance
from modules.stage_c import StageC

SIDE = 384  # pixels: latents of 48 x 48
BATCH = 4
TEXT_TOKENS = 48
GEOMETRY = LatentGeometry(compression=10.67, stride=8, lr_cells=16, lr_train_cells=12)


def guidance_recipe() -> Recipe:
    """Random weights, and one batch of random pictures again and again; texts come as embeddings."""
    torch.manual_seed(0)
    stage_c, guidance = StageC(**asdict(TINY.stage_c)), Guidance(**asdict(TINY.guidance))
    stage_c.init_weights()
    guidance.init_weights()
    effnet = EfficientNetEncoder(**asdict(TINY.effnet))
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    sizes = TINY.stage_c
    widths = ((TEXT_TOKENS, sizes.c_clip_text), (1, sizes.c_clip_text_pooled), (1, sizes.c_clip_img))
    held = Conditions(*(torch.randn(BATCH, *width) for width in widths))

    def batches(_: Any) -> Iterator[tuple[Tensor, None]]:
        while True:
            yield images, None

    def loss(module: nn.Module, batch: Tensor, keys: list[tuple[int, ...]]) -> StepLoss:
        z, z_lr = encode_latent(effnet, batch), encode_latent(effnet, at_low_resolution(batch, GEOMETRY))
        latents = noise_latents(z, z_lr, draw_noise(keys, z.shape[1:], z_lr.shape[1:]), V)
        return StepLoss(sample_losses(module(latents, held), latents.target), latents.logsnr)

    return Recipe(GuidedStageC(stage_c, guidance), batches, loss)
