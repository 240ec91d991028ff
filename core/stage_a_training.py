"""Training of Stage A, for which nothing is published: a VQGAN's losses (arXiv 2012.09841, section 3.1).

Squared error, the codebook's and the commitment loss, and the judgement of a patch discriminator. A share of
the pictures is decoded from quantised latents, the rest from plain ones, as generation does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from modules.blocks import channels_first
from modules.stage_a import StageA

COMMITMENT = 0.25
RECONSTRUCTION = 50.0  # weight of the squared error of pixels in [0, 1] against the losses of the codebook


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches of pictures (B, 3, H, W): (B, 1, H / 8, W / 8), high for real ones."""

    def __init__(self, c: int = 64) -> None:
        widths = (3, c, 2 * c, 4 * c)
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))


@dataclass(frozen=True)
class StageALosses:
    """Of a batch: squared error per picture (B,), and everything else as one number."""

    squared_error: Tensor
    other: Tensor


class StageATraining(nn.Module):
    """Stage A and its discriminator, which train in one update: each one's loss leaves the other alone."""

    def __init__(self, stage_a: StageA, adversarial_weight: float) -> None:
        super().__init__()
        self.stage_a, self.adversarial_weight = stage_a, adversarial_weight
        self.discriminator = PatchDiscriminator() if adversarial_weight else None

    def forward(
        self, images: Tensor, quantised: Tensor, fit_statistics: bool, adversarial: bool
    ) -> StageALosses:
        """Losses of pictures (B, 3, H, W); `quantised` (B,): which are decoded from quantised latents.

        Without `fit_statistics` the latents are normalised by the running statistics, as in use: those of a
        small batch of crops differ from one to the next and shift its colours.
        """
        self.stage_a.down_blocks[3][1].train(fit_statistics)
        latent = self.stage_a.encode_unscaled(images)
        straight, indices, _ = self.stage_a.vquantizer(latent)
        entries = channels_first(self.stage_a.vquantizer.codebook(indices))
        other = F.mse_loss(entries, latent.detach()) + COMMITMENT * F.mse_loss(latent, entries.detach())
        decoded = self.stage_a.decode_unscaled(torch.where(quantised[:, None, None, None], straight, latent))
        if self.discriminator is not None and adversarial:
            other = other + self._adversarial(images, decoded)
        squared_error = (decoded - images).square().flatten(1).mean(dim=1)
        return StageALosses(squared_error, other / RECONSTRUCTION)

    def _adversarial(self, images: Tensor, decoded: Tensor) -> Tensor:
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooling = -functional_call(self.discriminator, frozen, (decoded,)).mean()
        real, false = self.discriminator(images), self.discriminator(decoded.detach())
        judging = (F.relu(1 - real).mean() + F.relu(1 + false).mean()) / 2
        return self.adversarial_weight * fooling + judging
