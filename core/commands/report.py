"""What is said about a run before it: the plan and the memory (--dry_run)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from core.config.schema import stage_a_sizes, stage_b_sizes, stage_c_sizes
from core.config.settings import Job, Settings
from core.config.yaml import as_yaml
from core.pipeline.estimate import (
    StageEstimate,
    parameter_count,
    stage_a_activations,
    stage_b_activations,
    stage_c_activations,
)
from core.pipeline.passes import needs_unconditional
from core.pipeline.pipeline import DTYPES, UltraPixelPipeline
from core.pipeline.resolution import Plan, guidance_strength, plan_for
from modules.guidance import Guidance
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

GIB = 2**30


def estimate_stages(pipeline: UltraPixelPipeline, sizes: Plan, settings: Settings) -> list[StageEstimate]:
    """Device memory of each stage for a picture, counted from the networks' sizes."""
    c, b, a = (
        stage_c_sizes(pipeline.config_c),
        stage_b_sizes(pipeline.config_b),
        stage_a_sizes(pipeline.config_b),
    )
    bytes_c, bytes_b = (DTYPES[config.dtype].itemsize for config in (pipeline.config_c, pipeline.config_b))
    halves_c, halves_b = (1 + both for both in needs_unconditional(settings))
    count_c = parameter_count(partial(StageC, **asdict(c)))
    if pipeline.guidance is not None:
        count_c += parameter_count(partial(Guidance, **asdict(pipeline.guidance_sizes)))
    count_b = parameter_count(partial(StageB, **asdict(b)))
    count_a = parameter_count(partial(StageA, **asdict(a)))
    with torch.device("meta"):
        halo = StageA(**asdict(a)).halo
    return [
        StageEstimate(
            "stage C", count_c * bytes_c, stage_c_activations(sizes, c.c_hidden[0], halves_c, bytes_c)
        ),
        StageEstimate(
            "stage B", count_b * bytes_b, stage_b_activations(sizes, b.c_hidden[0], halves_b, bytes_b)
        ),
        StageEstimate("stage A", count_a * 4, stage_a_activations(sizes, a.c_hidden, halo)),
    ]


def describe_plan(pipeline: UltraPixelPipeline, jobs: Sequence[Job], settings: Settings) -> str:
    """The resolved configurations, sizes, steps, memory and files of a run, as text."""
    job = jobs[0]
    sizes = plan_for(pipeline.config_c, job.height, job.width)
    strength = guidance_strength(sizes.hr_latent, pipeline.config_c.guidance_strength)
    guided = f"guidance strength {strength} on the way up" if pipeline.guidance else "unguided"
    lr_pixels = f"{sizes.lr_height} x {sizes.lr_width} px"
    lines = [
        "# Stage C",
        as_yaml(pipeline.config_c),
        "# Stages B and A",
        as_yaml(pipeline.config_b),
        "# plan (sizes are height x width)",
        f"pictures: {len(jobs)} of {job.height} x {job.width} px on {pipeline.device}",
        f"seeds: {jobs[0].seed} to {jobs[-1].seed}",
        f"Stage C, low resolution: latent {_by(sizes.lr_latent)} ({lr_pixels}), {settings.steps_low} steps",
        f"Stage C, high resolution: latent {_by(sizes.hr_latent)}, {settings.steps} steps, {guided}",
        f"Stage B: latent {_by(sizes.stage_b_latent)}, {settings.steps_b} steps",
        f"Stage A: {sizes.decoded_height} x {sizes.decoded_width} px, cropped",
        "# memory on the device (estimate)",
    ]
    for stage in estimate_stages(pipeline, sizes, settings):
        weights, maps = stage.weights / GIB, stage.activations / GIB
        lines.append(f"{stage.name}: {stage.total / GIB:.2f} GiB (weights {weights:.2f}, maps {maps:.2f})")
    lines.append("# files")
    lines += [f"{what}: {path}, {_file_size(path)}" for what, path in pipeline.files().items()]
    return "\n".join(lines)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _file_size(path: str) -> str:
    target = Path(path)
    folder = target / "text_encoder" if (target / "text_encoder").is_dir() else target
    files = [target] if target.is_file() else list(folder.glob("model*.safetensors"))
    if not files:
        return "not there"
    size = sum(file.stat().st_size for file in files)
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
