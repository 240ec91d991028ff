"""Training of Stage A, for which nothing is published: a VQGAN's losses (arXiv 2012.09841, section 3.1).

Squared error, the codebook's and the commitment loss, and the judgement of a patch discriminator. A share of
the pictures is decoded from quantised latents, the rest from plain ones, as generation does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from core.config.schema import StageATrainConfig, stage_a_sizes
from core.data.loader import Batch
from core.pictures.images import save_image
from core.random_keys import generator_of
from core.training.preview import row_of, sheet
from core.training.run import Run, as_keys, export_parts, train, trained_module
from core.training.trainer import Recipe, StepLoss
from modules.blocks import channels_first
from modules.stage_a import StageA

COMMITMENT = 0.25
RECONSTRUCTION = 50.0  # weight of the squared error of pixels in [0, 1] against the losses of the codebook
EXPORT = "stage_a.safetensors"
PREVIEWED = 4  # pictures on a sheet
NO_LOGSNR = 0.0  # a picture has no noise level


# --- the losses -----------------------------------------------------------------------------------


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


# --- the recipe -----------------------------------------------------------------------------------


def make_loss(run: Run) -> Callable[..., StepLoss]:
    """Squared error per picture, and the other losses."""

    def loss(module: nn.Module, batch: Batch, keys: list[tuple[int, ...]]) -> StepLoss:
        images, config = batch.images.to(run.device), run.config
        shares = torch.stack([torch.rand((), generator=generator_of(key)) for key in keys])
        quantised = (shares < config.quantised_share).to(run.device)
        update = keys[0][1]
        losses = module(
            images, quantised, update < config.statistics_updates, update >= config.adversarial_start
        )
        return StepLoss(losses.squared_error, torch.full_like(losses.squared_error, NO_LOGSNR), losses.other)

    return loss


def make_sampler(run: Run, stage_a: StageA, example: Batch) -> Callable[[int], None]:
    """Writes sheets: real, decoded from plain latents, decoded from quantised ones."""
    images = example.images[:PREVIEWED].to(run.device)

    def sample(step: int) -> None:
        stage_a.eval()
        latent = stage_a.encode(images)
        plain, quantised = stage_a.decode(latent), stage_a.decode(stage_a.quantise(latent))
        stage_a.train()
        rows = [row_of([images[i], plain[i], quantised[i]]) for i in range(len(images))]
        save_image(sheet(rows), run.sheet_path(step), "jpg", {})

    return sample


def build(run: Run) -> Recipe:
    """Stage A's recipe."""
    path = run.export_path(EXPORT)
    torch.manual_seed(run.config.seed)
    make = partial(StageA, **asdict(stage_a_sizes(run.config)))
    stage_a = trained_module(make, run.config.pretrained_path, run.device, "Stage A")
    if run.config.decoder_only:
        for part in (stage_a.in_block, stage_a.down_blocks, stage_a.vquantizer):
            part.requires_grad_(False)
    export = export_parts({"stage_a.": (path, stage_a_sizes(run.config))})
    sampler = make_sampler(run, stage_a, next(run.batches(None))[0])
    module = StageATraining(stage_a, run.config.adversarial_weight)
    use = as_keys(stage_a_checkpoint_path=path)
    waits = module.discriminator is not None and run.config.adversarial_start > 0
    return Recipe(module, run.batches, make_loss(run), sampler, export, use, some_unused=waits)


def train_stage_a(config: StageATrainConfig) -> int:
    """Run this training, or go on with it; return the exit code."""
    return train(config, [], build)
