"""Variants of the guidance for benchmarks/ablation.py: parts replaced, or features taken elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from core.config.presets import EMBEDDED, PRESETS
from core.config.settings import TRAINING_R, Job, Settings
from core.config.sizes import GuidanceSizes
from core.pipeline.batches import noise_of
from core.pipeline.entries import Entries
from core.pipeline.passes import C_LATENT, LowEnd, in_halves, needs_unconditional, prepare_stage_c
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Observer
from core.pipeline.resolution import Plan, guidance_strength
from core.pipeline.sources import Source
from core.weights.clip import TextCondition
from gdf.samplers import Step, denoiser, sample, sampler_named, steps
from gdf.schedules import cosine
from gdf.targets import target_named
from modules.guidance import MAX_FREQUENCY, Guidance, GuidanceFeatures, ImplicitBlock
from modules.stage_c import StageC, StageCConditions

NO_CHANGES = ("name", "label", "every_seed")


@dataclass(frozen=True)
class Variant:
    """The guidance with one of its parts replaced."""

    name: str  # of its files
    label: str
    guided: bool = True
    lr_time: float | None = TRAINING_R  # of the low-resolution features; None: that of the guided step
    upsampling: str = "implicit"  # one of modules.guidance.UPSAMPLINGS
    scale_aware: bool = True
    max_frequency: float = MAX_FREQUENCY  # of the coordinate encoding
    interpolated: bool = False  # scale-aware normalisation, between the sizes of the training
    every_seed: bool = False  # trained with all seeds, others with the first alone

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the paper's guidance."""
        named = ((field.name, field.default, getattr(self, field.name)) for field in fields(self))
        return {n: value for n, usual, value in named if n not in NO_CHANGES and value != usual}

    @property
    def settings(self) -> Settings:
        """The family's, which take the features at the last step, t = 0.05, or those at the variant's."""
        lr_time = None if self.lr_time in (None, TRAINING_R) else self.lr_time
        return Settings(cfg=PRESETS[EMBEDDED].cfg, guidance_r=lr_time)


VARIANTS = (
    Variant("none", "none", guided=False),
    Variant("own_t", "features at the step's own t", lr_time=None, every_seed=True),
    Variant("t_05", "features at t = 0.5", lr_time=0.5),
    Variant("full", "the paper's: t = 0.05, implicit, scale-aware", every_seed=True),
    Variant("implicit", "implicit, not scale-aware", scale_aware=False, every_seed=True),
    Variant("bilinear", "bilinear + convolution", upsampling="bilinear", scale_aware=False, every_seed=True),
    Variant("bilinear_scale", "bilinear + convolution, scale-aware", upsampling="bilinear"),
    # Not in the paper: where the differences between these come from.
    Variant("interpolated", "the paper's, scales interpolated", interpolated=True),
    Variant("low_frequencies", "implicit, frequencies up to 32", scale_aware=False, max_frequency=32.0),
)


class ConstantScale(nn.Module):
    """In place of scale-aware normalisation: 2 x for every size, what that is on average before training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1, 1, 1, 1), 2.0))
        self.register_buffer("shift", torch.zeros(1, 1, 1, 1))

    def affine(self, _height: int, _width: int) -> tuple[Tensor, Tensor]:
        """Scale and shift (1, 1, 1, 1)."""
        return self.scale, self.shift


def make_guidance(variant: Variant, sizes: GuidanceSizes) -> Guidance:
    """A variant's guidance, without weights."""
    sides = sizes.scale_sides if variant.interpolated else ()
    guidance = Guidance(**asdict(replace(sizes, upsampling=variant.upsampling, scale_sides=sides)))
    for block in (*guidance.down, *guidance.up):
        if not variant.scale_aware:
            block.hr_norm = ConstantScale()
        if isinstance(block, ImplicitBlock):
            block.max_frequency = variant.max_frequency
    return guidance


def start(variant: Variant, full: Guidance, sizes: GuidanceSizes) -> Guidance:
    """A variant's guidance with the initial values of the full one, wherever it has the same parameter."""
    guidance = make_guidance(variant, sizes)
    guidance.init_weights()
    shared = set(guidance.state_dict()) & set(full.state_dict())
    guidance.load_state_dict({name: full.state_dict()[name] for name in shared}, strict=False)
    return guidance


class OwnTimePipeline(UltraPixelPipeline):
    """Guides each step of the high-resolution pass by the same step of the low-resolution pass."""

    def run_stage_c(
        self,
        jobs: Sequence[Job],
        plans: Sequence[Plan],
        texts: dict[str, TextCondition],
        settings: Settings,
        _observer: Observer | None = None,
        _entries: Sequence[Sequence[Entries]] = (),
        _sources: Sequence[Source] = (),
        ends: list[LowEnd | None] | None = None,
    ) -> list[Tensor]:
        """Both passes of Stage C for every job: latents (1, 16, h, w) on the CPU."""
        both = needs_unconditional(settings)[0]
        with self.stage_c.on_device() as stage_c, self._guidance_on_device() as guidance:
            latents = []
            for job, sizes in zip(jobs, plans, strict=True):
                held = prepare_stage_c(stage_c, self._conditions(job, texts, both))
                latents.append(self._latent(stage_c, guidance, held, job, sizes, settings).cpu())
        if ends is not None:
            ends += [None] * len(latents)
        return latents

    def _latent(self, stage_c: StageC, guidance: Guidance, held: StageCConditions, job: Job, sizes: Plan,
                settings: Settings) -> Tensor:  # fmt: skip
        features: list[GuidanceFeatures] = []  # of the conditional half, by step
        sites = stage_c.site_sizes(sizes.hr_latent)
        strength = guidance_strength(sizes.hr_latent, self.config_c.guidance_strength)

        def low(x: Tensor, r: Tensor, held: StageCConditions, _: Step) -> Tensor:
            prediction, found = stage_c.predict_with_features(x, r, held)
            features.append(found.first(1))
            return prediction

        def high(x: Tensor, r: Tensor, held: StageCConditions, step: Step) -> Tensor:
            prepared = guidance.prepare(features[step.index], sites, strength)
            return stage_c.predict(x, r, held, guidance=prepared)

        target, times = target_named(self.config_c.target), steps(cosine, settings.steps, settings.shift)
        for predict, size, stream in ((low, sizes.lr_latent, "lr"), (high, sizes.hr_latent, "hr")):
            noise = noise_of([job], stream, self.device)
            halves = in_halves(predict, held, stage_c, times, noise.device)
            denoise = denoiser(halves, target, settings.cfg_low if stream == "lr" else settings.cfg_high)
            x = noise.draw(1, C_LATENT, *size)
            sampled = sample(denoise, x, times, sampler_named(settings.sampler), noise.like)
        return sampled.x0
