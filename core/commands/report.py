"""What is said about a run before it: the plan and the memory (--dry_run)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from core.config.offloading import MODES
from core.config.settings import Job, Settings
from core.config.sizes import Size
from core.config.yaml import as_yaml
from core.pipeline.estimate import GIB, taken, weights_on_disk
from core.pipeline.passes import needs_unconditional
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import guidance_strength, low_picture, plan_for


def describe_plan(
    pipeline: UltraPixelPipeline, jobs: Sequence[Job], settings: Settings, batch: int = 1
) -> str:
    """The resolved configurations, sizes, steps, memory and files of a run, as text."""
    own: dict[tuple[Size, Settings], list[Job]] = {}
    for job in jobs:
        own.setdefault(((job.height, job.width), job.settings or settings), []).append(job)
    lines = [
        "# Stage C",
        as_yaml(pipeline.config_c),
        "# Stages B and A",
        as_yaml(pipeline.config_b),
        "# plan (sizes are height x width)",
    ]
    for (_, of_these), alike in own.items():
        lines += _plan_lines(pipeline, alike, of_these, settings)

    def maps(key: tuple[Size, Settings]) -> int:
        """What the maps grow with."""
        (height, width), of_these = key
        return height * width * min(batch, len(own[key])) * (1 + needs_unconditional(of_these)[0])

    largest, of_it = max(own, key=maps)
    together = min(batch, len(own[largest, of_it]))
    several = f", {together} pictures at once" if together > 1 else ""
    lines.append(f"# memory on the device (estimate{several})")
    if len({size for size, _ in own}) > 1:
        lines.append(f"of the largest, {_by(largest)} px:")
    stages = pipeline.estimate(plan_for(pipeline.config_c, *largest, of_it.lr_size), of_it)
    stages = [
        stage if stage.name == "stage A" else replace(stage, activations=together * stage.activations)
        for stage in stages  # Stage A takes them one by one
    ]
    for stage in stages:
        weights, maps = stage.weights_in(pipeline.offload) / GIB, stage.activations / GIB
        lines.append(f"{stage.name}: {weights + maps:.2f} GiB (weights {weights:.2f}, maps {maps:.2f})")
    text = weights_on_disk(pipeline.config_c.clip_text_path)
    counted = [f"{mode} {taken(mode, stages, text) / GIB:.2f} GiB" for mode in MODES]
    without = "" if text else ", without the text encoder, which is not there"
    lines.append(f"by --offload: {', '.join(counted)}{without}")
    lines += [describe_offload(pipeline, own[largest, of_it][0], of_it), "# files"]
    lines += [f"{what}: {path}, {_file_size(path)}" for what, path in pipeline.files().items()]
    return "\n".join(lines)


def _plan_lines(
    pipeline: UltraPixelPipeline, jobs: Sequence[Job], settings: Settings, of_run: Settings
) -> list[str]:
    """What is planned for jobs of one size and the same settings."""
    job = jobs[0]
    sizes = plan_for(pipeline.config_c, job.height, job.width, settings.lr_size)
    low_alone = settings.lr_only
    shown = low_picture(sizes, pipeline.config_c.geometry) if low_alone else sizes
    strength = guidance_strength(sizes.hr_latent, pipeline.config_c.guidance_strength)
    guided = f"guidance strength {strength} on the way up" if pipeline.guidance else "unguided"
    high = f"Stage C, high resolution: latent {_by(sizes.hr_latent)}, {settings.steps} steps, {guided}"
    lr_pixels = f"{sizes.lr_height} x {sizes.lr_width} px"
    others = [(name, value) for name, value in vars(settings).items() if value != getattr(of_run, name)]
    changed = "".join(f", {name} {value}" for name, value in others)
    return [
        f"pictures: {len(jobs)} of {_by((shown.height, shown.width))} px on {pipeline.device}{changed}",
        f"seeds: {_seeds(jobs)}",
        f"Stage C, low resolution: latent {_by(sizes.lr_latent)} ({lr_pixels}), {settings.steps_low} steps",
        *([] if low_alone else [high]),
        f"Stage B: latent {_by(shown.stage_b_latent)}, {settings.steps_b} steps",
        f"Stage A: {shown.decoded_height} x {shown.decoded_width} px, cropped",
    ]


def _seeds(jobs: Sequence[Job]) -> str:
    seeds = [job.seed for job in jobs]
    if seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, dict.fromkeys(seeds)))


def describe_offload(pipeline: UltraPixelPipeline, job: Job, settings: Settings) -> str:
    """Where the weights of a run would rest, and what auto would choose."""
    if pipeline.device.type == "cpu":
        return pipeline.settle_offload(job.height, job.width, settings)
    mode, why = pipeline.best_offload(job.height, job.width, settings)
    return f"offload: {pipeline.offload}; auto would choose {mode} ({why})"


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _file_size(path: str) -> str:
    target = Path(path)
    size = target.stat().st_size if target.is_file() else weights_on_disk(path)
    if not size:
        return "not there"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
