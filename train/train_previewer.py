"""Train the previewer: python train/train_previewer.py CONFIG.yaml [key=value ...], or under torchrun.

It learns to show the encoder's latents as small pictures. Running the same command again continues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.checkpoint import config_metadata, load_module, save_tensors
from core.cli import run
from core.config import StageCTrainConfig, effnet_sizes, previewer_sizes
from core.data.loader import Batch
from core.images import save_image
from core.preview import preview_row, sheet
from core.trainer import Recipe, StepLoss
from core.training import Run, read_command, train
from core.training_encoders import encode_latent
from gdf.diffusion import sample_losses
from modules.effnet import EfficientNetEncoder
from modules.previewer import Previewer

EXPORT = "previewer.safetensors"
PREVIEWED = 4  # pictures on a sheet


def make_loss(run: Run, effnet: EfficientNetEncoder) -> Callable[..., StepLoss]:
    """Squared error of the small pictures, without a noise level."""

    def loss(module: nn.Module, batch: Batch, _keys: list[tuple[int, ...]]) -> StepLoss:
        images = batch.images.to(run.device)
        small = module(encode_latent(effnet, images))
        wanted = F.interpolate(images, size=small.shape[-2:], mode="bilinear", antialias=True)
        errors = sample_losses(small, wanted)
        return StepLoss(errors, torch.zeros_like(errors))

    return loss


def make_sampler(
    run: Run, effnet: EfficientNetEncoder, previewer: Previewer, example: Batch
) -> Callable[[int], None]:
    """Writes sheets: real, previewed."""
    images = example.images[:PREVIEWED].to(run.device)
    latents = encode_latent(effnet, images)

    def sample(step: int) -> None:
        previewer.eval()
        rows = [preview_row(previewer, images[i], [latents[i : i + 1]]) for i in range(len(images))]
        previewer.train()
        save_image(sheet(rows), run.sheet_path(step), "jpg", {})

    return sample


def build(run: Run) -> Recipe:
    """The previewer's recipe."""
    config, sizes = run.config, previewer_sizes(run.config)
    effnet = load_module(
        partial(EfficientNetEncoder, **asdict(effnet_sizes(config))), config.effnet_checkpoint_path,
        dtype=torch.float32, device=run.device, what="EfficientNet encoder",
    )  # fmt: skip
    torch.manual_seed(config.seed)
    previewer = Previewer(**asdict(sizes)).to(run.device).train()

    def export(tensors: Mapping[str, Tensor], _step: int) -> None:
        save_tensors(run.export_path(EXPORT), tensors, config_metadata(asdict(sizes)))

    sampler = make_sampler(run, effnet, previewer, next(run.batches(None))[0])
    return Recipe(previewer, run.batches, make_loss(run, effnet), sampler, export)


def main() -> int:
    config = read_command(StageCTrainConfig, __doc__)
    if config.effnet_checkpoint_path is None:
        raise ValueError("training needs 'effnet_checkpoint_path' in the configuration")
    return train(config, [config.effnet_checkpoint_path], build)


if __name__ == "__main__":
    run(main)
