"""Train the guidance: python train/train_t2i.py CONFIG.yaml [key=value ...], or under torchrun.

Running the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from core.checkpoint import config_metadata, load_module, save_tensors
from core.cli import run
from core.conditioning import find_text_encoder, stack
from core.config import TrainConfig, guidance_sizes, stage_c_sizes
from core.data.loader import Batch
from core.guidance_training import GuidedStageC, draw_noise, drop_conditions, noise_latents
from core.images import save_image
from core.layouts import guidance_names, to_published_guidance
from core.pipeline import DTYPES, load_previewer
from core.preview import preview_row, sample_latents, sheet, with_latents
from core.resolution import plan
from core.settings import Settings
from core.trainer import Recipe, StepLoss, compile_blocks
from core.training import Run, read_command, train, trained_module
from core.training_encoders import EncodedBatch, Encoders, batches_of, check_cache
from gdf.diffusion import sample_losses
from gdf.targets import target_named
from modules.guidance import Guidance
from modules.stage_c import StageC

EXPORT = "ultrapixel_t2i.safetensors"
PREVIEWED = 2  # pictures on a sheet


# --- setup ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """Everything the step runs; all but the guidance is frozen."""

    stage_c: StageC
    guidance: Guidance
    encoders: Encoders


def load_networks(config: TrainConfig, device: torch.device) -> Networks:
    """Frozen weights in the configuration's number format, the guidance in float32."""
    build_guidance = partial(Guidance, **asdict(guidance_sizes(config)))
    torch.manual_seed(config.seed)
    guidance = trained_module(build_guidance, config.pretrained_path, device, "guidance", guidance_names)
    stage_c = load_module(
        partial(StageC, **asdict(stage_c_sizes(config))), config.generator_checkpoint_path,
        dtype=DTYPES[config.dtype], device=device, what="Stage C",
    )  # fmt: skip
    stage_c.gradient_checkpointing = config.gradient_checkpointing
    return Networks(stage_c, guidance, Encoders.load(config, device))


# --- the recipe -----------------------------------------------------------------------------------


def make_loss(run: Run, networks: Networks) -> Callable[..., StepLoss]:
    """The loss of a batch: mean over pixels of (prediction - target)², per sample (eq. 5)."""
    config, device, encoders = run.config, run.device, networks.encoders
    target, empty = target_named(config.target), networks.encoders.empty()

    def loss(module: nn.Module, batch: Batch | Mapping[str, Tensor], keys: list[tuple[int, ...]]) -> StepLoss:
        cached = not isinstance(batch, Batch)
        encoded = EncodedBatch.of(batch, device) if cached else encoders.encode(batch)
        noise = draw_noise(keys, encoded.z.shape[1:], encoded.z_lr.shape[1:], config.text_dropout)
        latents = noise_latents(encoded.z, encoded.z_lr, noise, target)
        held = drop_conditions(encoded.conditions, empty, noise)
        prediction = module(latents, held.to(device, DTYPES[config.dtype]))
        return StepLoss(sample_losses(prediction, latents.target), latents.logsnr)

    return loss


def make_sampler(run: Run, networks: Networks, example: Batch) -> Callable[[int], None] | None:
    """Writes sheets: real, reconstructed, sampled at low and high resolution; None without a previewer."""
    config = run.config
    if config.previewer_checkpoint_path is None or not run.accelerator.is_main_process:
        return None
    previewer = load_previewer(config, run.device)
    target, settings, dtype = target_named(config.target), Settings(), DTYPES[config.dtype]
    few = Batch(example.images[:PREVIEWED], example.captions[:PREVIEWED], example.names[:PREVIEWED])
    encoded = networks.encoders.encode(few)
    size = plan(few.images.shape[-2], few.images.shape[-1], config.geometry)
    sizes = with_latents(size, encoded.z, encoded.z_lr)
    empty = networks.encoders.empty()

    def sample(step: int) -> None:
        rows = []
        for i in range(len(few.captions)):
            held = stack(encoded.conditions.only(i), empty).to(run.device, dtype)
            with run.accelerator.autocast():  # the guidance is in float32, the frozen base may not be
                latents = sample_latents(
                    networks.stage_c, networks.guidance, held, target, sizes, settings, i
                )
            rows.append(preview_row(previewer, few.images[i], [encoded.z[i : i + 1], *latents]))
        save_image(sheet(rows), run.sheet_path(step), "jpg", {"captions": few.captions})

    return sample


def make_export(run: Run) -> Callable[[Mapping[str, Tensor], int], None]:
    """Writes the guidance as inference/test_t2i.py --pretrained_path takes it, in either layout."""
    config = run.config
    metadata = config_metadata(asdict(guidance_sizes(config)))
    res_blocks = sum(map(sum, stage_c_sizes(config).blocks))

    def export(tensors: Mapping[str, Tensor], _step: int) -> None:
        named = {name.removeprefix("guidance."): value for name, value in tensors.items()}
        if config.export_layout == "published":
            named = to_published_guidance(named, res_blocks)
        save_tensors(run.export_path(EXPORT), named, metadata)

    return export


def build(run: Run) -> Recipe:
    """The guidance's recipe."""
    networks = load_networks(run.config, run.device)
    if run.config.compile:
        compile_blocks(networks.stage_c)  # the trainer compiles what it trains
    example = next(run.batches(None))[0]
    return Recipe(
        GuidedStageC(networks.stage_c, networks.guidance), batches_of(run, networks.encoders),
        make_loss(run, networks),
        make_sampler(run, networks, example), make_export(run),
    )  # fmt: skip


def check(config: TrainConfig) -> None:
    """Raise what is wrong with a configuration for this training, before anything is read."""
    if config.effnet_checkpoint_path is None:
        raise ValueError("training needs 'effnet_checkpoint_path' in the configuration")
    if config.use_fsdp:
        raise ValueError("'use_fsdp' is for trainings of whole stages: the guidance is small, leave it out")
    check_cache(config)
    find_text_encoder(config.clip_text_path)


def main() -> int:
    config = read_command(TrainConfig, __doc__)
    check(config)
    files = [config.generator_checkpoint_path, config.effnet_checkpoint_path]
    return train(config, files, build, mixed_precision=config.dtype == "bfloat16")


if __name__ == "__main__":
    run(main)
