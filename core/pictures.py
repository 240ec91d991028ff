"""What the scripts that make pictures share: their common flags, jobs, previews, and the run itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.cli import (
    MODEL_FLAGS,
    ProgressBars,
    add_model_flags,
    add_picture_flags,
    add_settings_flags,
    check_weights,
    read_prompts,
    usage_table,
)
from core.control import Control
from core.images import check_format, output_path, save_image, to_image
from core.pipeline import GROUP, Job, Picture, Progress, UltraPixelPipeline, load_previewer
from core.report import WeightHashes, describe_plan, picture_metadata
from core.resolution import plan
from core.settings import Settings

PREVIEW_EVERY = 4  # steps of the high-resolution pass


def picture_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all of them have; use it with `core.cli.parse_with_preset`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_picture_flags(parser)
    add_settings_flags(parser)
    add_model_flags(parser)
    parser.add_argument("--from_image", help="repeat this picture from the settings inside it")
    parser.add_argument("--preview", action="store_true", help="save small previews while Stage C runs")
    parser.add_argument("--dry_run", action="store_true", help="print configuration and plan, and stop")
    return parser


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """The pictures to make: each prompt --num_image times, the i-th of all with seed + i."""
    if arguments.prompt_file is not None:
        prompts = read_prompts(arguments.prompt_file)
    elif arguments.prompt is not None:
        prompts = [arguments.prompt]
    else:
        raise ValueError('no prompt was given: add --prompt "what the picture shows", or --prompt_file FILE')
    if arguments.num_image < 1:
        raise ValueError(f"--num_image must be at least 1, not {arguments.num_image}")
    wanted = [prompt for prompt in prompts for _ in range(arguments.num_image)]
    size = (arguments.height, arguments.width)
    check_format(arguments.format, *size)
    return [Job(p, *size, arguments.seed + i, arguments.negative_prompt) for i, p in enumerate(wanted)]


class Previews:
    """Small pictures of the latents while Stage C runs, one file per picture and pass."""

    def __init__(self, pipeline: UltraPixelPipeline, folder: str, format: str) -> None:
        self._previewer = load_previewer(pipeline.config_c, pipeline.device)
        self._folder, self._format = folder, format

    def __call__(self, progress: Progress) -> None:
        low = "low" in progress.stage
        done = progress.step == progress.steps
        if not progress.stage.startswith("stage C") or not (
            done or (not low and progress.step % PREVIEW_EVERY == 0)
        ):
            return
        pixels = self._previewer(progress.latent.float())[0].clamp(0, 1)
        job = progress.job
        final = output_path(self._folder, job.prompt, job.height, job.width, job.seed, self._format)
        path = final.with_stem(f"{final.stem}_preview_{'lr' if low else 'hr'}")
        save_image(to_image(pixels), path, self._format, {"prompt": job.prompt, "step": progress.step})


def save(picture: Picture, arguments: argparse.Namespace, metadata: dict[str, Any]) -> Path:
    """Write a picture under a free name made of its prompt, size and seed."""
    job = picture.job
    path = output_path(arguments.output_dir, job.prompt, job.height, job.width, job.seed, arguments.format)
    return save_image(to_image(picture.pixels), path, arguments.format, metadata)


def make_pictures(
    arguments: argparse.Namespace,
    pipeline: UltraPixelPipeline,
    jobs: Sequence[Job],
    settings: Settings,
    model_flags: Sequence[str] = MODEL_FLAGS,
    control: Control | None = None,
) -> int:
    """Make and save the jobs' pictures, or say what would be done (--dry_run); return the exit code.

    `model_flags` are those whose values go into the pictures, besides the jobs and the settings. `control`
    steers all of them, and is saved beside each.
    """
    plan(arguments.height, arguments.width, pipeline.config_c.geometry)  # raises what is wrong with the size
    if arguments.dry_run:
        sys.stdout.write(describe_plan(pipeline, jobs, settings) + "\n")
        return 0
    check_weights(pipeline, arguments.preset)
    if pipeline.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # Stage A runs in float32
    hashes = WeightHashes(pipeline.files())
    bars = ProgressBars(jobs)
    previews = Previews(pipeline, arguments.output_dir, arguments.format) if arguments.preview else None

    def observe(progress: Progress) -> None:
        bars(progress)
        if previews is not None:
            previews(progress)

    models = {name: getattr(arguments, name) for name in model_flags}
    for start in range(0, len(jobs), GROUP):
        group = jobs[start : start + GROUP]
        controls = () if control is None else [control] * len(group)
        for picture in pipeline.run(group, settings, observe, controls):
            metadata = picture_metadata(picture.job, settings, models, hashes.result())
            path = save(picture, arguments, metadata)
            if control is not None:
                shown = to_image(control.shown.expand(3, -1, -1))
                save_image(shown, path.with_name(f"{path.stem}_control.png"), "png", {})
            sys.stdout.write(f"seed {picture.job.seed}: {path}\n")
            sys.stdout.flush()
    bars.close()
    sys.stderr.write(usage_table(list(pipeline.uses.values())) + "\n")
    return 0
