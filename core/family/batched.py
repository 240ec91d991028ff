"""Many pictures at once, for a device that a single one does not fill: the passes in batches, and figures.

A picture has the noise that its seed has in `core.pipeline.pipeline`, so it is the same one but for rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from core.config.schema import stage_c_sizes
from core.config.settings import Settings
from core.family.evaluation import Case, Judge, Measured, View, enlarge
from core.pipeline.conditioning import Conditions
from core.pipeline.passes import (
    NoiseSource,
    NoiseSources,
    high_resolution_pass,
    low_resolution_pass,
    needs_unconditional,
    prepare_stage_c,
    stage_b_pass,
)
from core.pipeline.pipeline import DTYPES, NOISE_STREAMS, Job, UltraPixelPipeline
from core.pipeline.resolution import guidance_strength, plan
from core.weights.clip import TextCondition
from gdf.targets import target_named
from modules.guidance import GuidanceFeatures


@torch.no_grad()
def make_pictures(pipeline: UltraPixelPipeline, jobs: Sequence[Job], settings: Settings) -> Tensor:
    """Pictures (B, 3, height, width) in [0, 1] of jobs that all have one size.

    ValueError where sizes differ, or cfg is for some steps alone: a batch has both halves or one.
    """
    if len({(job.height, job.width) for job in jobs}) != 1:
        raise ValueError("pictures of different sizes cannot be made in one batch")
    if settings.cfg_interval != (0.0, 1.0):
        raise ValueError(f"cfg_interval must be 0 to 1 in a batch, not {settings.cfg_interval}")
    texts = pipeline.encode_text(jobs)
    latents = _stage_c(pipeline, jobs, texts, settings)
    sizes = plan(jobs[0].height, jobs[0].width, pipeline.config_c.geometry)
    prompts = [job.prompt for job in jobs] + [""] * (len(jobs) if needs_unconditional(settings)[1] else 0)
    pooled = torch.cat([texts[prompt].pooled for prompt in prompts]).to(pipeline.device)
    target = target_named(pipeline.config_b.target)
    with pipeline.stage_b.on_device() as stage_b:
        noise = _noise(pipeline, jobs, "stage_b")
        sampled = stage_b_pass(stage_b, latents, pooled, target, sizes, settings, noise).x0
    with pipeline.stage_a.on_device() as stage_a:
        pictures = stage_a.decode(sampled.to(next(stage_a.parameters()).dtype))
    return pictures[:, :, : sizes.height, : sizes.width].float().clamp(0, 1)


def _stage_c(
    pipeline: UltraPixelPipeline, jobs: Sequence[Job], texts: dict[str, TextCondition], settings: Settings
) -> Tensor:
    """Both passes of Stage C: latents (B, 16, h, w)."""
    config, both = pipeline.config_c, needs_unconditional(settings)[0]
    sizes, target = plan(jobs[0].height, jobs[0].width, config.geometry), target_named(config.target)
    with pipeline.stage_c.on_device() as stage_c:
        held = prepare_stage_c(stage_c, _conditions(pipeline, jobs, texts, both))
        noise = _noise(pipeline, jobs, "lr")
        low, features = low_resolution_pass(stage_c, held, target, sizes, settings, noise)
        if pipeline.guidance is None:
            prepared = None
        else:
            with pipeline.guidance.on_device() as guidance:
                # Both halves have the features of the conditional one; a single picture's broadcast.
                maps = tuple(torch.cat([m, m]) if both else m for m in features.maps)
                strength = guidance_strength(sizes.hr_latent, config.guidance_strength)
                sites = stage_c.site_sizes(sizes.hr_latent)
                prepared = guidance.prepare(GuidanceFeatures(maps), sites, strength)
        noise = _noise(pipeline, jobs, "hr")
        return high_resolution_pass(stage_c, held, prepared, target, sizes, settings, noise).x0


def _conditions(
    pipeline: UltraPixelPipeline, jobs: Sequence[Job], texts: dict[str, TextCondition], both: bool
) -> Conditions:
    """All conditional halves, then the others where they are needed."""
    prompts = [job.prompt for job in jobs] + [job.negative_prompt for job in jobs if both]
    tokens, pooled = (torch.cat([getattr(texts[p], name) for p in prompts]) for name in ("tokens", "pooled"))
    no_image = tokens.new_zeros(len(tokens), 1, stage_c_sizes(pipeline.config_c).c_clip_img)
    return Conditions(tokens, pooled, no_image).to(pipeline.device, DTYPES[pipeline.config_c.dtype])


def _noise(pipeline: UltraPixelPipeline, jobs: Sequence[Job], stream: str) -> NoiseSources:
    index = NOISE_STREAMS[stream]
    return NoiseSources(tuple(NoiseSource.of(job.seed, index, pipeline.device) for job in jobs))


def in_batches(
    pipeline: UltraPixelPipeline, cases: Sequence[Case], side: int, batch: int, settings: Settings
) -> Iterator[tuple[Case, Tensor]]:
    """Every case with its picture (3, side, side)."""
    for start in range(0, len(cases), batch):
        group = cases[start : start + batch]
        jobs = [Job(case.prompt, side, side, case.seed) for case in group]
        yield from zip(group, make_pictures(pipeline, jobs, settings), strict=True)


def measured(
    pipeline: UltraPixelPipeline,
    judge: Judge,
    cases: Sequence[Case],
    side: int,
    views: Sequence[View],
    batch: int,
    settings: Settings,
) -> list[Measured]:
    """What the cases' pictures of one size are worth, under each of the views."""
    start, seen = time.perf_counter(), [[] for _ in views]
    for case, pixels in in_batches(pipeline, cases, side, batch, settings):
        for view, found in zip(views, seen, strict=True):
            found.append(judge.look(enlarge(pixels, view.size), case.seed))
    seconds = time.perf_counter() - start
    return [judge.measure(view, cases, s, seconds) for view, s in zip(views, seen, strict=True)]
