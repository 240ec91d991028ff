"""Train a ControlNet: python train/train_ultrapixel_control.py CONFIG.yaml [key=value ...]

It also runs under torchrun. Stage C and the guidance stay as they are: control acts on the low-resolution
pass, and the ControlNet learns to denoise latents of that size under what it sees of the pictures. Running
the same command again continues from the last checkpoint in checkpoint_path/experiment_id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from core.checkpoint import config_metadata, load_module, save_tensors
from core.cli import run
from core.conditioning import find_text_encoder
from core.config import ControlTrainConfig, controlnet_sizes, stage_c_sizes
from core.control import CONTROL_SIZE, METADATA_KEY
from core.control_training import ControlledStageC, Seen, what_is_seen
from core.data.loader import Batch
from core.guidance_training import draw_noise, drop_conditions
from core.images import save_image
from core.noising import noised
from core.passes import NoiseSource, low_resolution_pass, prepare_stage_c
from core.pipeline import DTYPES, load_previewer
from core.preview import preview_row, row_of, sheet, with_latents
from core.resolution import plan
from core.settings import Settings
from core.trainer import Recipe, StepLoss, compile_blocks
from core.training import Run, read_command, train, trained_module
from core.training_encoders import Encoders
from gdf.diffusion import sample_losses
from gdf.targets import target_named
from modules.controlnet import ControlNet
from modules.stage_c import StageC

PREVIEWED = 4  # pictures on a sheet
SETTINGS = Settings(cfg=1.0, shift=2.0)  # as inference/test_controlnet.py samples


@dataclass(frozen=True)
class Networks:
    """Everything the step runs; all but the ControlNet is frozen."""

    controlled: ControlledStageC
    encoders: Encoders
    see: Seen


def load_networks(config: ControlTrainConfig, device: torch.device) -> Networks:
    """Frozen weights in the configuration's number format, the ControlNet in float32."""
    torch.manual_seed(config.seed)
    build = partial(ControlNet, **asdict(controlnet_sizes(config)))
    control = trained_module(build, config.pretrained_path, device, "ControlNet")
    stage_c = load_module(
        partial(StageC, **asdict(stage_c_sizes(config))), config.generator_checkpoint_path,
        dtype=DTYPES[config.dtype], device=device, what="Stage C",
    )  # fmt: skip
    stage_c.gradient_checkpointing = config.gradient_checkpointing
    encoders = Encoders.load(config, device)
    see = what_is_seen(config.controlnet_filter, config.control_size, encoders.effnet)
    return Networks(ControlledStageC(stage_c, control, config.train_encoder), encoders, see)


def make_loss(run: Run, networks: Networks) -> Callable[..., StepLoss]:
    """The loss of a batch: mean over the latent's pixels of (prediction - target)², per sample."""
    config, device, encoders = run.config, run.device, networks.encoders
    target, empty = target_named(config.target), encoders.empty()

    def loss(module: nn.Module, batch: Batch, keys: list[tuple[int, ...]]) -> StepLoss:
        encoded = encoders.encode(batch, with_lr=False)
        noise = draw_noise(keys, encoded.z.shape[1:])
        latents = noised(encoded.z, noise.t, noise.epsilon, target)
        held = drop_conditions(encoded.conditions, empty, noise).to(device, DTYPES[config.dtype])
        seen, _ = networks.see(batch.images.to(device), keys)
        return StepLoss(sample_losses(module(latents, held, seen), latents.target), latents.logsnr)

    return loss


def make_sampler(run: Run, networks: Networks, example: Batch) -> Callable[[int], None] | None:
    """Writes sheets: real, what is seen of it, sampled with and without control; None without a previewer."""
    config, controlled = run.config, networks.controlled
    if config.previewer_checkpoint_path is None or not run.accelerator.is_main_process:
        return None
    previewer = load_previewer(config, run.device)
    target, dtype = target_named(config.target), DTYPES[config.dtype]
    few = Batch(example.images[:PREVIEWED], example.captions[:PREVIEWED], example.names[:PREVIEWED])
    encoded = networks.encoders.encode(few, with_lr=False)
    sizes = with_latents(plan(*few.images.shape[-2:], config.geometry), encoded.z, encoded.z)
    seen, shown = networks.see(few.images.to(run.device), [(config.seed, i) for i in range(len(few.names))])

    def sample(step: int) -> None:
        controlled.eval()
        rows = []
        for i in range(len(few.captions)):
            held = prepare_stage_c(controlled.stage_c, encoded.conditions.only(i).to(run.device, dtype))
            latents = []
            with run.accelerator.autocast():  # the ControlNet is in float32, the frozen base may not be
                for control in (controlled.control(seen[i : i + 1]), None):
                    noise = NoiseSource.of(i, 0, run.device)
                    sampled, _ = low_resolution_pass(
                        controlled.stage_c, held, target, sizes, SETTINGS, noise, control
                    )
                    latents.append(sampled.x0)
            rows.append(
                torch.cat([row_of([shown[i]]), preview_row(previewer, few.images[i], latents)], dim=2)
            )
        controlled.train()
        save_image(sheet(rows), run.sheet_path(step), "jpg", {"captions": few.captions})

    return sample


def make_export(run: Run) -> Callable[[Mapping[str, Tensor], int], None]:
    """Writes the ControlNet, with its sizes and its filter, as inference/test_controlnet.py takes it."""
    config = run.config
    size = config.control_size or CONTROL_SIZE
    metadata = config_metadata(asdict(controlnet_sizes(config)))
    metadata |= config_metadata({"filter": config.controlnet_filter, "control_size": size}, METADATA_KEY)

    def export(tensors: Mapping[str, Tensor], _step: int) -> None:
        named = {name.removeprefix("control."): value for name, value in tensors.items()}
        save_tensors(run.export_path(f"{config.controlnet_filter}.safetensors"), named, metadata)

    return export


def build(run: Run) -> Recipe:
    """The ControlNet's recipe."""
    networks = load_networks(run.config, run.device)
    if run.config.compile:
        compile_blocks(networks.controlled.stage_c)
    example = next(run.batches(None))[0]
    return Recipe(
        networks.controlled, run.batches, make_loss(run, networks), make_sampler(run, networks, example),
        make_export(run),
    )  # fmt: skip


def check(config: ControlTrainConfig) -> None:
    """Raise what is wrong with a configuration for this training, before anything is read."""
    if config.effnet_checkpoint_path is None:
        raise ValueError("training needs 'effnet_checkpoint_path' in the configuration")
    if config.use_fsdp:
        raise ValueError("'use_fsdp' is for trainings of whole stages: a ControlNet is small, leave it out")
    if not config.train_encoder and config.pretrained_path is None:
        raise ValueError("'train_encoder: false' needs 'pretrained_path': the encoder would stay random")
    find_text_encoder(config.clip_text_path)


def main() -> int:
    config = read_command(ControlTrainConfig, __doc__)
    check(config)
    files = [config.generator_checkpoint_path, config.effnet_checkpoint_path]
    return train(config, files, build, mixed_precision=config.dtype == "bfloat16")


if __name__ == "__main__":
    run(main)
