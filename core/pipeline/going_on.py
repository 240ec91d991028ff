"""Going on from pictures that were made before, from Python: at another size, or through Stages B and A."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.config.arguments import first_seed, whole_number
from core.config.settings import Job, Settings, changed
from core.pipeline.batches import at_once
from core.pipeline.latents import Earlier
from core.pipeline.made import Picture, Pictures
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Observer
from core.pipeline.resolution import plan_for
from core.pipeline.sources import Source

# Flags of what a pipeline no longer knows, once a call is over; of a picture that is no file, the strength.
GIVEN = ("init_image", "strength", "image_prompt")


def go_on(
    pipeline: UltraPixelPipeline,
    earlier: Picture | str | Path,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    num_images: int = 1,
    observer: Observer | None = None,
    progress: bool = True,
    batch: int = 1,
    **changes: Any,
) -> Pictures:
    """High-resolution passes after the low-resolution pass of a picture, or of its file of latents.

    The size has the picture's aspect ratio, but for one pixel of Stage C's latent; what is left open is the
    picture's own. Settings may be given by name, as in a call of the pipeline. ValueError or TypeError names
    what is wrong.
    """
    made = earlier_of(earlier, pipeline)
    settings = changed(None, replace(made.settings, lr_only=False, lr_size=made.lr_size), changes)
    asked = zip(("height", "width"), (height, width), made.size, strict=True)
    size = tuple(own if given is None else whole_number(name, given) for name, given, own in asked)
    plan_for(pipeline.config_c, *size, settings.lr_size)  # raises what is wrong with the size
    first = made.job.seed if seed is None else first_seed(seed)
    job = replace(made.job, height=size[0], width=size[1], settings=None)
    jobs = [replace(job, seed=first + i) for i in range(whole_number("num_images", num_images))]
    flags = {"from_lr": made.name}
    return _made(pipeline, jobs, settings, made.going_on(), flags, observer, progress, at_once(batch))


def decode(
    pipeline: UltraPixelPipeline,
    earlier: Picture | str | Path,
    observer: Observer | None = None,
    progress: bool = True,
    **changes: Any,
) -> Picture:
    """Stages B and A after the passes of Stage C of a picture, or of its file of latents.

    Settings, such as `steps_b`, may be given by name. ValueError or TypeError names what is wrong.
    """
    made = earlier_of(earlier, pipeline)
    settings = changed(None, made.settings, changes)
    job, source = replace(made.job, settings=None), made.decoding(made.size, settings.lr_only)
    return _made(pipeline, [job], settings, source, {"from_latents": made.name}, observer, progress)[0]


def earlier_of(earlier: Picture | str | Path, pipeline: UltraPixelPipeline) -> Earlier:
    """A picture to go on from; TypeError for what is none, and else as `Earlier.of_file`."""
    if isinstance(earlier, str | Path):
        return Earlier.of_file(earlier, pipeline.config_c)
    if not isinstance(earlier, Picture):
        raise TypeError(f"a picture, or a file of its latents, is gone on from, not {earlier!r}")
    given = {name: earlier.record.models.get(name) for name in GIVEN} if earlier.record else {}
    if any(given.values()):
        raise ValueError(f"the picture was made with {next(filter(given.get, given))}: go on by the script")
    settings = earlier.job.settings or (earlier.record and earlier.record.settings)
    return Earlier.of_latents(earlier.latents, earlier.job, settings, pipeline.config_c)


def _made(
    pipeline: UltraPixelPipeline,
    jobs: Sequence[Job],
    settings: Settings,
    source: Source,
    flags: Mapping[str, str | None],
    observer: Observer | None,
    progress: bool,
    batch: int = 1,
) -> Pictures:
    pipeline.check_files()
    control = pipeline.controls_for((jobs[0].height, jobs[0].width)) or None
    sources = [source] * len(jobs)
    return pipeline.in_groups(jobs, settings, observer, control, progress, sources, flags, batch)
