"""Training of the previewer and, if it has no file, of the encoder along, as an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config.schema import PreviewerTrainConfig, effnet_sizes, previewer_sizes
from core.data.loader import Batch
from core.pictures.images import save_image
from core.random_keys import generator_of
from core.training.encoders import encode_latent
from core.training.preview import preview_row, sheet
from core.training.run import Run, export_with_encoder, train, trained_module
from core.training.trainer import Recipe, StepLoss
from core.weights.checkpoint import load_module
from gdf.diffusion import sample_losses
from modules.effnet import EfficientNetEncoder, imagenet_normalise
from modules.previewer import Previewer

PREVIEWED = 4  # pictures on a sheet


class PreviewerTraining(nn.Module):
    """The previewer behind the encoder, which stays as it is where it needs no gradients."""

    def __init__(self, effnet: EfficientNetEncoder, previewer: Previewer, latent_noise: float) -> None:
        super().__init__()
        self.effnet, self.previewer, self.latent_noise = effnet, previewer, latent_noise

    def forward(self, images: Tensor, keys: list[tuple[int, ...]]) -> Tensor:
        """Small pictures of pictures (B, 3, H, W) in [0, 1]."""
        latent = self.effnet(imagenet_normalise(images))
        draws = [torch.randn(latent.shape[1:], generator=generator_of(key)) for key in keys]
        return self.previewer(latent + self.latent_noise * torch.stack(draws).to(latent))


def make_networks(config: PreviewerTrainConfig, device: torch.device) -> PreviewerTraining:
    """The previewer, and the encoder from its file or new."""
    torch.manual_seed(config.seed)
    build_previewer = partial(Previewer, **asdict(previewer_sizes(config)))
    previewer = trained_module(build_previewer, config.pretrained_path, device, "previewer")
    build = partial(EfficientNetEncoder, **asdict(effnet_sizes(config)))
    if config.effnet_checkpoint_path is None:
        effnet = trained_module(build, None, device, "EfficientNet encoder")
    else:
        effnet = load_module(
            build, config.effnet_checkpoint_path, dtype=torch.float32, device=device,
            what="EfficientNet encoder",
        )  # fmt: skip
    return PreviewerTraining(effnet, previewer, config.latent_noise)


def make_loss(run: Run) -> Callable[..., StepLoss]:
    """Squared error of the small pictures, without a noise level."""

    def loss(module: nn.Module, batch: Batch, keys: list[tuple[int, ...]]) -> StepLoss:
        images = batch.images.to(run.device)
        small = module(images, keys)
        wanted = F.interpolate(images, size=small.shape[-2:], mode="bilinear", antialias=True)
        errors = sample_losses(small, wanted)
        return StepLoss(errors, torch.zeros_like(errors))

    return loss


def make_sampler(run: Run, networks: PreviewerTraining, example: Batch) -> Callable[[int], None]:
    """Writes sheets: real, previewed."""
    images = example.images[:PREVIEWED].to(run.device)

    def sample(step: int) -> None:
        modes = [(part, part.training) for part in (networks.effnet, networks.previewer)]
        for part, _ in modes:
            part.eval()
        latents = encode_latent(networks.effnet, images)
        rows = [preview_row(networks.previewer, images[i], [latents[i : i + 1]]) for i in range(len(images))]
        for part, training in modes:
            part.train(training)
        save_image(sheet(rows), run.sheet_path(step), "jpg", {})

    return sample


def build(run: Run) -> Recipe:
    """The previewer's recipe."""
    sizes = previewer_sizes(run.config)
    export, use = export_with_encoder(run, "previewer", "previewer_checkpoint_path", sizes)
    networks = make_networks(run.config, run.device)
    sampler = make_sampler(run, networks, next(run.batches(None))[0])
    return Recipe(networks, run.batches, make_loss(run), sampler, export, use)


def train_previewer(config: PreviewerTrainConfig) -> int:
    """Run this training, or go on with it; return the exit code."""
    return train(config, [config.effnet_checkpoint_path], build)
