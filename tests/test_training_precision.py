"""Training in bfloat16 loses what bfloat16's roundings cost and no more: gradients against float64."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peers import random_stage_c, randomised
from torch import Tensor

from core.pipeline.conditioning import Conditions
from core.training.guidance import GuidedStageC, NoisyLatents, draw_noise, noise_latents
from gdf.diffusion import sample_losses
from gdf.targets import EPSILON
from modules.guidance import Guidance

TIMES = torch.tensor([0.1, 0.35, 0.6, 0.9])
LIMIT_PREDICTION, LIMIT_ALL, LIMIT_MEDIAN = 0.0125, 0.012, 0.025  # of the norm


def doubled(latents: NoisyLatents) -> NoisyLatents:
    wide = {n: getattr(latents, n).double() for n in ("x", "x_lr", "target")}
    return replace(latents, **wide)


def prediction_and_gradients(
    module: GuidedStageC, latents: NoisyLatents, held: Conditions, low: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        prediction = module(latents, held)
    losses = sample_losses(prediction, latents.target)
    losses.mean().backward()
    return prediction.detach().double(), {n: p.grad.double() for n, p in module.guidance.named_parameters()}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_gradients_are_as_near_as_bfloat16_allows(seed: int) -> None:
    torch.manual_seed(seed)
    base = random_stage_c(c=64, heads=4, blocks=((1, 2), (2, 1))).bfloat16()  # rounded: these are the weights
    guidance = randomised(Guidance(ind=64, ch=32, n_head=4, head_dim=8, n_groups=8, f_dim=32), 0.1)
    z, z_lr = torch.randn(4, 16, 16, 16), torch.randn(4, 16, 8, 8)
    noise = replace(draw_noise([(seed, 0, i) for i in range(4)], z.shape[1:], z_lr.shape[1:]), t=TIMES)
    latents = noise_latents(z, z_lr, noise, EPSILON)
    held = Conditions(*(torch.randn(4, n, w).bfloat16() for n, w in ((9, 48), (1, 48), (1, 32))))
    exact = GuidedStageC(deepcopy(base).double(), deepcopy(guidance).double())
    wide = Conditions(*(v.double() for v in vars(held).values()))
    expected, slopes = prediction_and_gradients(exact, doubled(latents), wide, low=False)
    found, gradients = prediction_and_gradients(GuidedStageC(base, guidance), latents, held, low=True)
    errors = torch.tensor([relative(gradients[n], slopes[n]) for n in slopes])
    together = relative(*(torch.cat([g.flatten() for g in d.values()]) for d in (gradients, slopes)))
    assert relative(found, expected) < LIMIT_PREDICTION
    assert together < LIMIT_ALL
    assert float(errors.median()) < LIMIT_MEDIAN
