"""What is said about a run before it: the plan and the memory (--dry_run)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.config.settings import Job, Settings
from core.config.yaml import as_yaml
from core.pipeline.estimate import GIB, weights_on_disk
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import guidance_strength, plan_for


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
    for stage in pipeline.estimate(sizes, settings):
        weights, maps = stage.weights / GIB, stage.activations / GIB
        lines.append(f"{stage.name}: {stage.total / GIB:.2f} GiB (weights {weights:.2f}, maps {maps:.2f})")
    lines += [describe_offload(pipeline, job, settings), "# files"]
    lines += [f"{what}: {path}, {_file_size(path)}" for what, path in pipeline.files().items()]
    return "\n".join(lines)


def describe_offload(pipeline: UltraPixelPipeline, job: Job, settings: Settings) -> str:
    """Where the weights of a run would rest, and what auto would choose."""
    if pipeline.device.type == "cpu":
        return pipeline.settle_offload(job.height, job.width, settings)
    mode, why = pipeline.best_offload(job.height, job.width, settings)
    return f"offload: {pipeline.offload}; auto would choose {mode} ({why})"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _file_size(path: str) -> str:
    target = Path(path)
    size = target.stat().st_size if target.is_file() else weights_on_disk(path)
    if not size:
        return "not there"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
