"""The recipe of LoRA and new tokens from a few pictures (paper Appendix D)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config.schema import PersonalizedTrainConfig, phases, stage_c_sizes
from core.config.settings import Settings
from core.data.loader import Batch
from core.data.sources import names_shards
from core.pictures.images import save_image
from core.pipeline.conditioning import stack
from core.pipeline.networks import DTYPES, load_guidance, load_previewer
from core.pipeline.resolution import plan
from core.training.encoders import Encoders
from core.training.guidance import draw_noise, noise_latents
from core.training.personalization import (
    PersonalizedStageC,
    Shown,
    add_new_tokens,
    check_captions,
    check_layout,
    chosen_weights,
    lora_file,
    phase_batches,
    scheduled_batches,
    write_trained,
)
from core.training.preview import preview_row, sample_latents, sheet, with_latents
from core.training.run import Run, train
from core.training.trainer import Recipe, StepLoss
from core.weights.checkpoint import load_module
from core.weights.lora.files import PEFT_CONFIG, PEFT_WEIGHTS
from core.weights.lora.names import PEFT
from core.weights.lora.reading import read_lora
from gdf.diffusion import sample_losses
from gdf.targets import target_named
from modules.stage_c import StageC

EXPORT = "lora.safetensors"
EXPORT_PEFT = "lora"  # a folder
PREVIEWED = 2  # pictures on a sheet


# --- setup ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """Everything the step runs, and the rows of the new tokens in the text encoder's embedding."""

    module: PersonalizedStageC
    encoders: Encoders
    rows: list[int]


def load_networks(config: PersonalizedTrainConfig, device: torch.device) -> Networks:
    """Frozen weights in the configuration's number format, what is trained in float32."""
    dtype = DTYPES[config.dtype]
    build_c = partial(StageC, **asdict(stage_c_sizes(config)))
    stage_c = load_module(
        build_c, config.generator_checkpoint_path, dtype=dtype, device=device, what="Stage C"
    )
    stage_c.gradient_checkpointing = config.gradient_checkpointing
    guidance = None
    if config.ultrapixel_path is not None:
        guidance = load_guidance(config, config.ultrapixel_path, dtype, device)
    encoders = Encoders.load(config, device)
    text = encoders.text.to(device)
    rows = add_new_tokens(text, config)
    torch.manual_seed(config.seed)
    weights = chosen_weights(stage_c_sizes(config), config.module_filters)
    module = PersonalizedStageC(stage_c, guidance, text, weights, config.lora_rank, rows)
    if config.pretrained_path is not None:
        names = [name for name, _ in config.train_tokens]
        module.start_from(read_lora(config.pretrained_path, stage_c_sizes(config)), names)
    return Networks(module, encoders, rows)


# --- the recipe -----------------------------------------------------------------------------------


def make_loss(run: Run, encoders: Encoders) -> Callable[..., StepLoss]:
    """The loss of a batch: mean over pixels of (prediction - target)², per sample; the prior's follow."""
    config, target = run.config, target_named(run.config.target)

    def of(module: nn.Module, batch: Batch, keys: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        z, z_lr = encoders.latents(batch)
        noise = draw_noise(keys, z.shape[1:], z_lr.shape[1:])
        latents = noise_latents(z, z_lr, noise, target)
        prediction = module(latents, batch.captions, encoders.image_embeddings(batch), noise)
        return sample_losses(prediction, latents.target), latents.logsnr

    def loss(module: nn.Module, shown: Shown, keys: list[tuple[int, ...]]) -> StepLoss:
        losses, logsnr = of(module, shown.subject, keys)
        if shown.prior is None:
            return StepLoss(losses, logsnr)
        others, other_logsnr = of(module, shown.prior, [(*key, 1) for key in keys])
        counts = torch.cat([torch.ones_like(losses), torch.full_like(others, config.prior_weight)]).detach()
        return StepLoss(torch.cat([losses, others]), torch.cat([logsnr, other_logsnr]), counts=counts)

    return loss


def make_sampler(run: Run, networks: Networks, example: Batch) -> Callable[[int], None] | None:
    """Writes sheets: real, reconstructed, sampled at low and high resolution; None without a previewer."""
    config, module, encoders = run.config, networks.module, networks.encoders
    if config.previewer_checkpoint_path is None or not run.accelerator.is_main_process:
        return None
    previewer = load_previewer(config, run.device)
    target, settings, dtype = target_named(config.target), Settings(), DTYPES[config.dtype]
    few = Batch(example.images[:PREVIEWED], example.captions[:PREVIEWED], example.names[:PREVIEWED])
    z, z_lr = encoders.latents(few)
    sizes = with_latents(plan(few.images.shape[-2], few.images.shape[-1], config.geometry), z, z_lr)
    no_image = torch.zeros(1, 1, encoders.clip_img_width, device=run.device)

    def sample(step: int) -> None:
        rows = []
        empty = module.conditions([""], no_image)
        for i, caption in enumerate(few.captions):
            held = stack(module.conditions([caption], no_image), empty).to(run.device, dtype)
            with run.accelerator.autocast():
                latents = sample_latents(module.stage_c, module.guidance, held, target, sizes, settings, i)
            rows.append(preview_row(previewer, few.images[i], [z[i : i + 1], *latents]))
        save_image(sheet(rows), run.sheet_path(step), "jpg", {"captions": few.captions})

    return sample


def export_path(run: Run) -> Path:
    """Where the LoRA goes: a file, or the folder of peft's layout."""
    if run.config.lora_layout == PEFT:
        return run.export_folder(EXPORT_PEFT, (PEFT_WEIGHTS, PEFT_CONFIG))
    return run.export_path(EXPORT)


def make_export(run: Run, networks: Networks, path: Path) -> Callable[[Mapping[str, Tensor], int], None]:
    """Writes the LoRA with its tokens, as inference/test_personalized.py --pretrained_path_lora takes it."""
    config = run.config

    def export(tensors: Mapping[str, Tensor], _step: int) -> None:
        lora = lora_file(tensors, config, networks.rows)
        write_trained(path, lora, config.lora_layout, networks.encoders.text)

    return export


def build(run: Run) -> Recipe:
    """The recipe of a LoRA and its tokens."""
    check_captions(run.data.index, run.config)
    path = export_path(run)
    networks = load_networks(run.config, run.device)
    _, largest = phases(run.config)[-1]
    example = next(phase_batches(run, largest))[0].subject
    return Recipe(
        networks.module, partial(scheduled_batches, run), make_loss(run, networks.encoders),
        make_sampler(run, networks, example), make_export(run, networks, path), use=how_to_use(run, path),
    )  # fmt: skip


def how_to_use(run: Run, path: Path) -> str:
    """The command that makes pictures with the LoRA and the guidance that it was trained with."""
    guidance = ("--pretrained_path", run.config.ultrapixel_path or "none")
    return run.inference_command("test_personalized.py", *guidance, "--lora", path)


def check(config: PersonalizedTrainConfig) -> None:
    """Raise what is wrong with a configuration for this training, before anything is read."""
    if config.effnet_checkpoint_path is None:
        raise ValueError("training needs 'effnet_checkpoint_path' in the configuration")
    if config.webdataset_path is None or names_shards(config):
        raise ValueError("the subject's pictures lie in a folder: name it as 'webdataset_path'")
    for name in ("use_fsdp", "compile"):
        if getattr(config, name):
            raise ValueError(f"'{name}' is for trainings of all weights: a LoRA is small, leave it out")
    check_layout(config)


def train_personalized(config: PersonalizedTrainConfig) -> int:
    """Run this training, or go on with it; return the exit code."""
    check(config)
    files = [config.generator_checkpoint_path, config.effnet_checkpoint_path, config.ultrapixel_path]
    return train(config, files, build, mixed_precision=config.dtype == "bfloat16")
