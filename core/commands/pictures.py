"""What the scripts that make pictures share once their flags are read: previews, and the run itself."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from core.commands.flags import (
    MODEL_FLAGS,
    check_weights,
    usage_table,
)
from core.commands.report import describe_plan
from core.config.settings import Job, Settings
from core.images import picture_stem, save_image, save_new_image, to_image
from core.pipeline.control import Control
from core.pipeline.made import Picture, Record
from core.pipeline.pipeline import UltraPixelPipeline, load_previewer
from core.pipeline.progress import Observer, Progress, ProgressBars, Together
from core.pipeline.resolution import plan_for
from core.printable import say

PREVIEW_EVERY = 4  # steps of the high-resolution pass


class Previews:
    """Small pictures of the latents while Stage C runs, one file per picture and pass."""

    def __init__(self, pipeline: UltraPixelPipeline, folder: str, format: str) -> None:
        self._previewer = load_previewer(pipeline.config_c, pipeline.device)
        self._folder, self._format = folder, format
        self._paths: dict[str, Path] = {}

    def __call__(self, progress: Progress) -> None:
        low = "low" in progress.stage
        done = progress.step == progress.steps
        if not progress.stage.startswith("stage C") or not (
            done or (not low and progress.step % PREVIEW_EVERY == 0)
        ):
            return
        image = to_image(self._previewer(progress.latent.float())[0].clamp(0, 1))
        stem = f"{_stem(progress.job)}_preview_{'lr' if low else 'hr'}"
        metadata = {"prompt": progress.job.prompt, "step": progress.step}
        if stem in self._paths:
            save_image(image, self._paths[stem], self._format, metadata)
        else:
            self._paths[stem] = save_new_image(image, self._folder, stem, self._format, metadata)


def _stem(job: Job) -> str:
    return picture_stem(job.prompt, job.height, job.width, job.seed)


@dataclass(frozen=True)
class Gallery:
    """Where a run's pictures go, with what is written into all of them."""

    folder: str
    format: str
    record: Record

    def add(self, picture: Picture) -> Path:
        """Save a picture and return its path, also if Ctrl-C comes meanwhile."""
        try:
            return self._save(picture, self.record.metadata(picture.job))
        except KeyboardInterrupt:
            self._save(picture, self.record.metadata(picture.job, wait=False))
            raise

    def _save(self, picture: Picture, metadata: Mapping[str, Any]) -> Path:
        """Save a picture under a name made of its prompt, size and seed; where that fails, elsewhere."""
        job, image, failures = picture.job, picture.image, []
        text = self.record.text(job)
        for folder, stem, format in self._ways(job):
            try:
                path = save_new_image(image, folder, stem, format, metadata, text)
            except Exception as error:  # whatever it is: the picture is computed
                failures.append(error)
                continue
            if failures:
                reason = f"it could not be saved as asked: {failures[0]}"
                warnings.warn(f"{path}: the picture lies here ({reason})", stacklevel=3)
            return path
        raise OSError(f"the picture of seed {job.seed} cannot be saved anywhere ({failures[0]})")

    def _ways(self, job: Job) -> Iterator[tuple[str, str, str]]:
        """Folder, name and format: as asked, and what is left if that cannot be."""
        plain = f"picture_{job.height}x{job.width}_{job.seed}"
        for folder in (self.folder, gettempdir()):
            yield folder, _stem(job), self.format
            yield folder, plain, self.format
            yield folder, plain, "png"  # which holds every picture


def save_beside(path: Path, control: Control) -> None:
    """Save what a ControlNet saw beside the picture that it steered."""
    try:
        shown = to_image(control.shown.expand(3, -1, -1))
        save_new_image(shown, path.parent, f"{path.stem}_control", "png", {})
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: what the ControlNet saw is not saved beside it ({error})", stacklevel=2)


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
    plan_for(pipeline.config_c, arguments.height, arguments.width)  # raises what is wrong with the size
    for sentence in pipeline.doubts(jobs, settings):
        say(f"warning: {sentence}", sys.stderr)
    if arguments.dry_run:
        say(describe_plan(pipeline, jobs, settings), sys.stdout)
        return 0
    check_weights(pipeline, arguments.preset)
    models = {name: getattr(arguments, name) for name in model_flags}
    folder, format = arguments.output_dir, arguments.format
    gallery = Gallery(folder, format, pipeline.record(settings, models))
    previews = [Previews(pipeline, folder, format)] if arguments.preview else []
    with closing(ProgressBars(jobs)) as bars:
        observe = Together([bars, *previews])
        for start in range(0, len(jobs), pipeline.group):
            group = jobs[start : start + pipeline.group]
            _make_group(pipeline, group, gallery, bars, observe, control)
    say(usage_table(list(pipeline.uses.values())), sys.stderr)
    return 0


def _make_group(
    pipeline: UltraPixelPipeline,
    jobs: Sequence[Job],
    gallery: Gallery,
    bars: ProgressBars,
    observe: Observer,
    control: Control | None,
) -> None:
    """Make and save the pictures of jobs that go through the stages together; one that fails, fails alone."""
    controls = () if control is None else [control] * len(jobs)
    failures = []
    for picture in pipeline.pictures(jobs, gallery.record.settings, observe, controls):
        try:
            path = gallery.add(picture)
        except (OSError, ValueError) as error:
            failures.append(error)
            continue
        if control is not None:
            save_beside(path, control)
        bars.say(f"seed {picture.job.seed}: {path}")
    if failures:
        raise failures[0]
