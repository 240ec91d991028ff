"""Training of the guidance parameters (paper section 3.2, eq. 5): what a step sees and predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from core.config.schema import TrainConfig, guidance_sizes, stage_c_sizes
from core.config.settings import TRAINING_R, Settings
from core.data.loader import Batch
from core.pictures.images import save_image
from core.pipeline.conditioning import Conditions, stack
from core.pipeline.networks import DTYPES, load_previewer
from core.pipeline.resolution import plan
from core.random_keys import generator_of
from core.training.encoders import EncodedBatch, Encoders, batches_of, check_cache, frozen_stage_c
from core.training.noising import noised
from core.training.preview import preview_row, sample_latents, sheet, with_latents
from core.training.run import Run, train, trained_module
from core.training.trainer import Recipe, StepLoss, compile_blocks
from core.weights.checkpoint import config_metadata, save_tensors
from core.weights.layouts import guidance_names, to_published_guidance
from gdf.diffusion import sample_losses
from gdf.schedules import draw_times
from gdf.targets import Target, target_named
from modules.guidance import Guidance, GuidanceFeatures
from modules.stage_c import StageC, StageCConditions

TEXT_DROPOUT = 0.05  # share of samples whose text, tokens and pooled, is replaced by the empty one's
IMAGE_SHARE = 0.1  # share of samples that see their image embedding
EXPORT = "ultrapixel_t2i.safetensors"
PREVIEWED = 2  # pictures on a sheet


# --- a step ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleNoise:
    """The random numbers of a batch's samples; each sample's depend on its own key alone."""

    t: Tensor  # (B,)
    epsilon: Tensor  # (B, 16, H, W)
    epsilon_lr: Tensor  # (B, 16, h, w)
    drop_text: Tensor  # (B,), bool
    use_image: Tensor  # (B,), bool


@dataclass(frozen=True)
class NoisyLatents:
    """What the network sees and should predict, for a batch."""

    x: Tensor  # (B, 16, H, W)
    r: Tensor  # (B,)
    x_lr: Tensor  # (B, 16, h, w)
    r_lr: Tensor  # (B,)
    logsnr: Tensor  # (B,)
    target: Tensor  # (B, 16, H, W)


def draw_noise(
    keys: Sequence[Sequence[int]],
    size: Sequence[int],
    size_lr: Sequence[int] = (0, 0, 0),
    text_dropout: float = TEXT_DROPOUT,
) -> SampleNoise:
    """Random numbers for samples with these keys, such as (seed, update, index in the update).

    `size` and `size_lr`, where there is a low resolution, are (channels, height, width); `text_dropout` is
    the share of samples without their text. However a batch is split over processes and accumulation, a
    sample's numbers stay the same; they are drawn on the CPU.
    """
    drawn = []
    for key in keys:
        generator = generator_of(key)
        t = draw_times(1, generator)[0]
        epsilon, epsilon_lr = (
            torch.randn(*size, generator=generator),
            torch.randn(*size_lr, generator=generator),
        )
        drop, image = torch.rand(2, generator=generator)
        drawn.append((t, epsilon, epsilon_lr, drop < text_dropout, image < IMAGE_SHARE))
    return SampleNoise(*(torch.stack(column) for column in zip(*drawn, strict=True)))


def noise_latents(
    z: Tensor, z_lr: Tensor, noise: SampleNoise, target: Target, t_lr: float | Tensor = TRAINING_R
) -> NoisyLatents:
    """Diffuse latents (B, 16, H, W) at the samples' times and (B, 16, h, w) at `t_lr`: 0.05 (section 4.1).

    `t_lr` may also be a time for each sample (B,).
    """
    low_t = t_lr if isinstance(t_lr, Tensor) else torch.full_like(noise.t, t_lr)
    high = noised(z, noise.t, noise.epsilon, target)
    low = noised(z_lr, low_t, noise.epsilon_lr, target)
    return NoisyLatents(high.x, high.r, low.x, low.r, high.logsnr, high.target)


class GuidedStageC(nn.Module):
    """The guidance with a frozen Stage C around it: only the guidance's parameters belong to this module."""

    def __init__(self, stage_c: StageC, guidance: Guidance) -> None:
        super().__init__()
        self.guidance = guidance
        self._frozen = (stage_c.requires_grad_(False).eval(),)  # in a tuple: not a submodule, not a parameter

    @property
    def stage_c(self) -> StageC:
        """The frozen base."""
        return self._frozen[0]

    def forward(self, latents: NoisyLatents, conditions: Conditions) -> Tensor:
        """The high-resolution prediction (B, 16, H, W), guided by features that carry no gradient.

        Run it under autocast where Stage C is in bfloat16: the guidance stays in float32.
        """
        with torch.no_grad():
            held, features = guiding_features(self.stage_c, latents, conditions)
        return guided_prediction(self.stage_c, self.guidance, latents, held, features)


def guiding_features(
    stage_c: StageC, latents: NoisyLatents, conditions: Conditions
) -> tuple[StageCConditions, GuidanceFeatures]:
    """The prepared conditions, and Stage C's features of the low-resolution latent."""
    held = stage_c.prepare(conditions.clip_text, conditions.clip_text_pooled, conditions.clip_img)
    x_lr = latents.x_lr.to(stage_c.clf[1].weight.dtype)
    return held, stage_c.predict_with_features(x_lr, latents.r_lr, held)[1]


def guided_prediction(
    stage_c: StageC,
    guidance: Guidance,
    latents: NoisyLatents,
    held: StageCConditions,
    features: GuidanceFeatures,
) -> Tensor:
    """Stage C's prediction (B, 16, H, W) of the high-resolution latent, guided by features."""
    size = (latents.x.shape[-2], latents.x.shape[-1])
    prepared = guidance.prepare(features, stage_c.site_sizes(size))
    return stage_c.predict(latents.x.to(stage_c.clf[1].weight.dtype), latents.r, held, guidance=prepared)


def drop_conditions(conditions: Conditions, empty: Conditions, noise: SampleNoise) -> Conditions:
    """Replace the chosen samples' texts by the empty one, and the images of those not chosen by zeros."""
    drop = noise.drop_text[:, None, None].to(conditions.clip_text.device)
    use = noise.use_image[:, None, None].to(conditions.clip_img.device)
    return Conditions(
        torch.where(drop, empty.clip_text, conditions.clip_text),
        torch.where(drop, empty.clip_text_pooled, conditions.clip_text_pooled),
        conditions.clip_img * use,
    )


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
    return Networks(frozen_stage_c(config, device), guidance, Encoders.load(config, device))


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
    config, path = run.config, run.export_path(EXPORT)
    metadata = config_metadata(asdict(guidance_sizes(config)))
    res_blocks = sum(map(sum, stage_c_sizes(config).blocks))

    def export(tensors: Mapping[str, Tensor], _step: int) -> None:
        named = {name.removeprefix("guidance."): value for name, value in tensors.items()}
        if config.export_layout == "published":
            named = to_published_guidance(named, res_blocks)
        save_tensors(path, named, metadata)

    return export


def build(run: Run) -> Recipe:
    """The guidance's recipe."""
    export = make_export(run)
    networks = load_networks(run.config, run.device)
    if run.config.compile:
        compile_blocks(networks.stage_c)  # the trainer compiles what it trains
    example = next(run.batches(None))[0]
    return Recipe(
        GuidedStageC(networks.stage_c, networks.guidance), batches_of(run, networks.encoders),
        make_loss(run, networks), make_sampler(run, networks, example), export,
        use=run.inference_command("test_t2i.py", "--pretrained_path", *run.exports.files),
    )  # fmt: skip


def check(config: TrainConfig) -> None:
    """Raise what is wrong with a configuration for this training, before anything is read."""
    if config.effnet_checkpoint_path is None:
        raise ValueError("training needs 'effnet_checkpoint_path' in the configuration")
    if config.use_fsdp:
        raise ValueError("'use_fsdp' is for trainings of whole stages: the guidance is small, leave it out")
    check_cache(config)


def train_guidance(config: TrainConfig) -> int:
    """Run this training, or go on with it; return the exit code."""
    check(config)
    files = [config.generator_checkpoint_path, config.effnet_checkpoint_path]
    return train(config, files, build, mixed_precision=config.dtype == "bfloat16")
