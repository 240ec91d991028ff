"""Training of Stage C: all its weights, on single pictures, without guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from core.config.schema import StageCTrainConfig, stage_c_sizes
from core.config.settings import Settings
from core.data.loader import Batch
from core.pictures.images import save_image
from core.pipeline.conditioning import stack
from core.pipeline.networks import DTYPES, load_previewer
from core.pipeline.passes import NoiseSource, low_resolution_pass, prepare_stage_c
from core.pipeline.resolution import plan
from core.training.encoders import EncodedBatch, Encoders, batches_of, check_cache
from core.training.guidance import draw_noise, drop_conditions
from core.training.noising import noised
from core.training.preview import preview_row, sheet, with_latents
from core.training.run import Run, as_keys, train, trained_module
from core.training.trainer import Recipe, StepLoss
from core.weights.checkpoint import config_metadata, save_tensors
from gdf.diffusion import sample_losses
from gdf.targets import target_named
from modules.stage_c import StageC

EXPORT = "stage_c.safetensors"
PREVIEWED = 8  # pictures on a sheet


def make_stage_c(config: StageCTrainConfig, device: torch.device) -> StageC:
    """Stage C in float32, from a file or with new weights."""
    torch.manual_seed(config.seed)
    make = partial(StageC, **asdict(stage_c_sizes(config)))
    stage_c = trained_module(make, config.pretrained_path, device, "Stage C")
    stage_c.gradient_checkpointing = config.gradient_checkpointing
    return stage_c


def make_loss(run: Run, encoders: Encoders) -> Callable[..., StepLoss]:
    """The loss of a batch: mean over the latent's pixels of (prediction - target)², per sample."""
    config, device = run.config, run.device
    target, empty = target_named(config.target), encoders.empty()

    def loss(module: nn.Module, batch: Batch | Mapping[str, Tensor], keys: list[tuple[int, ...]]) -> StepLoss:
        cached = not isinstance(batch, Batch)
        encoded = EncodedBatch.of(batch, device) if cached else encoders.encode(batch, with_lr=False)
        noise = draw_noise(keys, encoded.z.shape[1:], text_dropout=config.text_dropout)
        latents = noised(encoded.z, noise.t, noise.epsilon, target)
        held = drop_conditions(encoded.conditions, empty, noise).to(device, DTYPES[config.dtype])
        prediction = module(latents.x, latents.r, held.clip_text, held.clip_text_pooled, held.clip_img)
        return StepLoss(sample_losses(prediction, latents.target), latents.logsnr)

    return loss


def make_sampler(
    run: Run, stage_c: StageC, encoders: Encoders, example: Batch
) -> Callable[[int], None] | None:
    """Writes sheets: real, reconstructed, sampled; None without a previewer."""
    config = run.config
    if config.previewer_checkpoint_path is None:
        return None
    previewer = load_previewer(config, run.device)
    target, settings, dtype = target_named(config.target), Settings(), DTYPES[config.dtype]
    few = Batch(example.images[:PREVIEWED], example.captions[:PREVIEWED], example.names[:PREVIEWED])
    encoded, empty = encoders.encode(few, with_lr=False), encoders.empty()
    size = plan(few.images.shape[-2], few.images.shape[-1], config.geometry)
    sizes = with_latents(size, encoded.z, encoded.z)

    def sample(step: int) -> None:
        stage_c.eval()
        rows = []
        for i in range(len(few.captions)):
            held = stack(encoded.conditions.only(i), empty).to(run.device, dtype)
            noise = NoiseSource.of(i, 0, run.device)
            with run.accelerator.autocast():
                prepared = prepare_stage_c(stage_c, held)
                sampled, _ = low_resolution_pass(stage_c, prepared, target, sizes, settings, noise)
            rows.append(preview_row(previewer, few.images[i], [encoded.z[i : i + 1], sampled.x0]))
        stage_c.train()
        if run.accelerator.is_main_process:
            save_image(sheet(rows), run.sheet_path(step), "jpg", {"captions": few.captions})

    return sample


def build(run: Run) -> Recipe:
    """Stage C's recipe."""
    path = run.export_path(EXPORT)
    stage_c, encoders = make_stage_c(run.config, run.device), Encoders.load(run.config, run.device)
    example = next(run.batches(None))[0]
    metadata = config_metadata(asdict(stage_c_sizes(run.config)))

    def export(tensors: Mapping[str, Tensor], _step: int) -> None:
        save_tensors(path, tensors, metadata)

    return Recipe(
        stage_c, batches_of(run, encoders, with_lr=False), make_loss(run, encoders),
        make_sampler(run, stage_c, encoders, example), export,
        use=as_keys(generator_checkpoint_path=path),
    )  # fmt: skip


def train_stage_c(config: StageCTrainConfig) -> int:
    """Run this training, or go on with it; return the exit code."""
    if config.effnet_checkpoint_path is None:
        raise ValueError("training needs 'effnet_checkpoint_path' in the configuration")
    check_cache(config)
    return train(config, [config.effnet_checkpoint_path], build, config.dtype == "bfloat16")
