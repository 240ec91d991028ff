"""Train Stage A from nothing: python train/train_stage_a.py CONFIG.yaml [key=value ...], or under torchrun.

Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from core.cli import run
from core.config import StageATrainConfig, stage_a_sizes
from core.data.loader import Batch
from core.images import save_image
from core.preview import row_of, sheet
from core.random_keys import generator_of
from core.stage_a_training import StageATraining
from core.trainer import Recipe, StepLoss
from core.training import Run, export_parts, read_command, train, trained_module
from modules.stage_a import StageA

EXPORT = "stage_a.safetensors"
PREVIEWED = 4  # pictures on a sheet
NO_LOGSNR = 0.0  # a picture has no noise level


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
    torch.manual_seed(run.config.seed)
    make = partial(StageA, **asdict(stage_a_sizes(run.config)))
    stage_a = trained_module(make, run.config.pretrained_path, run.device, "Stage A")
    if run.config.decoder_only:
        for part in (stage_a.in_block, stage_a.down_blocks, stage_a.vquantizer):
            part.requires_grad_(False)
    export = export_parts({"stage_a.": (run.export_path(EXPORT), stage_a_sizes(run.config))})
    sampler = make_sampler(run, stage_a, next(run.batches(None))[0])
    module = StageATraining(stage_a, run.config.adversarial_weight)
    return Recipe(module, run.batches, make_loss(run), sampler, export)


def main() -> int:
    config = read_command(StageATrainConfig, __doc__)
    return train(config, [], build)


if __name__ == "__main__":
    run(main)
