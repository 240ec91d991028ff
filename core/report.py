"""What is said about a run: the plan before it (--dry_run), the settings inside its pictures after it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import file_sha256
from core.config import stage_a_sizes, stage_b_sizes, stage_c_sizes
from core.config_files import as_yaml
from core.estimate import (
    StageEstimate,
    parameter_count,
    stage_a_activations,
    stage_b_activations,
    stage_c_activations,
)
from core.passes import needs_unconditional
from core.pipeline import DTYPES, Job, UltraPixelPipeline
from core.resolution import Plan, guidance_strength, plan
from core.settings import Settings
from modules.guidance import Guidance
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

PACKAGES = ("ultrapixel", "torch", "transformers")
GIB = 2**30


# --- before a run ---------------------------------------------------------------------------------


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
    sizes = plan(job.height, job.width, pipeline.config_c.geometry)
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
        f"Stage C, low resolution: latent {_by(sizes.lr_latent)} ({lr_pixels}), {settings.steps} steps",
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


# --- in the pictures ------------------------------------------------------------------------------


class WeightHashes:
    """SHA-256 of the weight files, computed beside the run in a thread of its own."""

    def __init__(self, files: Mapping[str, str]) -> None:
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._hashes: dict[str, Future[str]] = {
            path: pool.submit(file_sha256, path) for path in files.values() if Path(path).is_file()
        }
        pool.shutdown(wait=False)

    def result(self, wait: bool = True) -> dict[str, str]:
        """File name to hash, of those that can be read; those still being read are waited for or left out."""
        done = {path: future for path, future in self._hashes.items() if wait or future.done()}
        return {path: future.result() for path, future in done.items() if _was_read(path, future)}


def _was_read(path: str, future: Future[str]) -> bool:
    error = future.exception()
    if error is not None:
        warnings.warn(f"the hash of {path} is left out of the pictures' settings: {error}", stacklevel=2)
    return error is None


def picture_metadata(
    job: Job, settings: Settings, models: Mapping[str, Any], hashes: Mapping[str, str]
) -> dict[str, Any]:
    """The settings that repeat a picture (--from_image), with versions and hashes to tell what made it."""
    found = {package: _version(package) for package in PACKAGES}
    versions = {package: number for package, number in found.items() if number is not None}
    return {**asdict(job), **asdict(settings), **models, "versions": versions, "weights": dict(hashes)}


def _version(package: str) -> str | None:
    """The version of a package; None, and a warning, where it is not installed but lies on PYTHONPATH."""
    with suppress(PackageNotFoundError, KeyError, ValueError):  # the others: of damaged metadata
        if number := version(package):
            return number
    warnings.warn(
        f"the version of {package} is not known and is left out of the pictures' settings", stacklevel=3
    )
    return None


def infotext(job: Job, settings: Settings, model: str) -> str:
    """A picture's settings in the form of A1111, which many programs read: prompts, then a line of values."""
    values = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": settings.cfg,
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model": model,
    }
    negative = [f"Negative prompt: {job.negative_prompt}"] if job.negative_prompt else []
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items())
    return "\n".join([job.prompt, *negative, line])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value
