"""Training of a ControlNet on a frozen Stage C: what it sees of a batch, and what a step predicts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from core.config.control_types import picture_flags, training_of
from core.config.schema import ControlTrainConfig, controlnet_sizes
from core.config.settings import Settings
from core.data.loader import Batch
from core.pictures.images import save_image
from core.pipeline.conditioning import Conditions
from core.pipeline.control import (
    CONTROL_SIZE,
    METADATA_KEY,
    Encoder,
    blurred,
    edges,
    half_size_latents,
    with_hole,
)
from core.pipeline.entries import Entries
from core.pipeline.networks import DTYPES, load_previewer
from core.pipeline.passes import NoiseSource, low_resolution_pass, prepare_stage_c
from core.pipeline.resolution import plan
from core.random_keys import generator_of
from core.training.encoders import Encoders, frozen_stage_c
from core.training.guidance import draw_noise, drop_conditions
from core.training.noising import Noised, noised
from core.training.preview import preview_row, row_of, sheet, with_latents
from core.training.run import Run, train, trained_module
from core.training.trainer import Recipe, StepLoss, compile_blocks
from core.weights.checkpoint import config_metadata, save_tensors
from gdf.diffusion import sample_losses
from gdf.targets import target_named
from modules.controlnet import ControlNet
from modules.stage_c import StageC

log = logging.getLogger(__name__)

HOLE_SIDES = (0.2, 0.7)  # of the picture's, of the ellipses and rectangles that are holes
INVERTED_SHARE = 0.4  # of the holes, which are turned inside out, so that what is around is filled
PREVIEWED = 4  # pictures on a sheet
FEW = 4  # pictures at once, of which less are too few for the statistics of the encoder's norms
SETTINGS = Settings(cfg=1.0, shift=2.0)  # as inference/test_controlnet.py samples

Seen = Callable[[Tensor, Sequence[Sequence[int]]], tuple[Tensor, Tensor]]


class ControlledStageC(nn.Module):
    """A ControlNet with a frozen Stage C around it: only the ControlNet's parameters belong to this module.

    Without `train_encoder` its backbone stays as it is, normalisation statistics too.
    """

    def __init__(self, stage_c: StageC, control: ControlNet, train_encoder: bool = True) -> None:
        super().__init__()
        self.control, self._train_encoder = control, train_encoder
        self._frozen = (stage_c.requires_grad_(False).eval(),)  # in a tuple: not a submodule, not a parameter
        control.backbone.requires_grad_(train_encoder)
        self.train()

    @property
    def stage_c(self) -> StageC:
        """The frozen base."""
        return self._frozen[0]

    def train(self, mode: bool = True) -> ControlledStageC:
        """Training or evaluation mode, but for a backbone that is not trained."""
        super().train(mode)
        self.control.backbone.train(mode and self._train_encoder)
        return self

    def forward(self, latents: Noised, conditions: Conditions, seen: Tensor) -> Tensor:
        """The prediction (B, 16, H, W) under what the ControlNet sees, (B, c_in, h, w).

        Run it under autocast where Stage C is in bfloat16: the ControlNet stays in float32.
        """
        dtype = self.stage_c.clf[1].weight.dtype
        with torch.no_grad():
            held = self.stage_c.prepare(
                conditions.clip_text, conditions.clip_text_pooled, conditions.clip_img
            )
        control = self.control(seen)
        return self.stage_c.predict(latents.x.to(dtype), latents.r, held, control=control)


def what_is_seen(name: str, control_size: int | None, encoder: Encoder) -> Seen:
    """How a type of control sees training pictures: a function of them (B, 3, H, W) and of the samples' keys.

    It gives the ControlNet's input (B, c_in, H, W), and the same to look at (B, 3, H, W). ValueError for a
    type whose input cannot be made of pictures.
    """

    def see_edges(images: Tensor, _keys: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        found = edges(images, control_size or CONTROL_SIZE)
        return found, found.expand_as(images)

    def see_holes(images: Tensor, keys: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        seen = with_hole(images, random_holes(keys, images.shape[-2], images.shape[-1]).to(images))
        return seen, seen[:, :3]

    match training_of(name):
        case "edges":
            return see_edges
        case "holes":
            return see_holes
        case "latents":
            return lambda images, _keys: half_size_latents(images, encoder)
        case "reduced":
            return lambda images, _keys: (blurred(images),) * 2
        case way:
            raise ValueError(f"{name}: training has no way {way!r} to make what is seen")


def random_holes(keys: Sequence[Sequence[int]], height: int, width: int) -> Tensor:
    """Holes (B, 1, height, width), 0 or 1, of samples with these keys: ellipses, rectangles, or all else."""
    rows = ((torch.arange(height) + 0.5) / height)[:, None]
    columns = ((torch.arange(width) + 0.5) / width)[None]
    holes = []
    for key in keys:
        y, x, high, wide, shape, inverted = torch.rand(6, generator=generator_of((*key, 1))).tolist()
        sides = (HOLE_SIDES[0] + (HOLE_SIDES[1] - HOLE_SIDES[0]) * share for share in (high, wide))
        down, across = (2 * (place - middle).abs() / side for place, middle, side in
                        zip((rows, columns), (y, x), sides, strict=True))  # fmt: skip
        hole = torch.hypot(down, across) < 1 if shape < 0.5 else torch.maximum(down, across) < 1
        holes.append(hole != (inverted < INVERTED_SHARE))
    return torch.stack(holes)[:, None].float()


# --- the recipe -----------------------------------------------------------------------------------


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
    stage_c = frozen_stage_c(config, device)
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
                for controls in ([Entries(controlled.control(seen[i : i + 1]))], []):
                    noise = NoiseSource.of(i, 0, run.device)
                    sampled, _ = low_resolution_pass(
                        controlled.stage_c, held, target, sizes, SETTINGS, noise, controls
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
    path = run.export_path(f"{config.controlnet_filter}.safetensors")
    size = config.control_size or CONTROL_SIZE
    metadata = config_metadata(asdict(controlnet_sizes(config)))
    metadata |= config_metadata({"filter": config.controlnet_filter, "control_size": size}, METADATA_KEY)

    def export(tensors: Mapping[str, Tensor], _step: int) -> None:
        named = {name.removeprefix("control."): value for name, value in tensors.items()}
        save_tensors(path, named, metadata)

    return export


def build(run: Run) -> Recipe:
    """The ControlNet's recipe."""
    export = make_export(run)
    sizes, count = controlnet_sizes(run.config), run.config.pictures_at_once
    if run.config.train_encoder and sizes.bottleneck_mode == "effnet" and count < FEW:
        few = f"the encoder's norms are over the pictures at once, and {count} are few"
        log.warning("%s: use pictures_at_once=%d or more (and a batch_size of as many in each process), or "
                    "train_encoder=false", few, FEW)  # fmt: skip
    networks = load_networks(run.config, run.device)
    if run.config.compile:
        compile_blocks(networks.controlled.stage_c)
    example = next(run.batches(None))[0]
    return Recipe(
        networks.controlled, run.batches, make_loss(run, networks), make_sampler(run, networks, example),
        export, use=how_to_use(run),
    )  # fmt: skip


def how_to_use(run: Run) -> str:
    """The command that makes a picture under the ControlNet."""
    given = picture_flags(run.config.controlnet_filter)
    return run.inference_command("test_controlnet.py", "--control_file", *run.exports.files, *given)


def check(config: ControlTrainConfig) -> None:
    """Raise what is wrong with a configuration for this training, before anything is read."""
    if config.effnet_checkpoint_path is None:
        raise ValueError("training needs 'effnet_checkpoint_path' in the configuration")
    if config.use_fsdp:
        raise ValueError("'use_fsdp' is for trainings of whole stages: a ControlNet is small, leave it out")
    if training_of(config.controlnet_filter) == "latents":
        if controlnet_sizes(config).bottleneck_mode == "effnet":
            raise ValueError(
                f"a ControlNet for {config.controlnet_filter} sees latents, which are too small for "
                "'bottleneck_mode: effnet': use large or simple"
            )
    if not config.train_encoder and config.pretrained_path is None:
        raise ValueError("'train_encoder: false' needs 'pretrained_path': the encoder would stay random")


def train_controlnet(config: ControlTrainConfig) -> int:
    """Run this training, or go on with it; return the exit code."""
    check(config)
    files = [config.generator_checkpoint_path, config.effnet_checkpoint_path]
    return train(config, files, build, mixed_precision=config.dtype == "bfloat16")
