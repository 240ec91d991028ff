"""What the scripts that make pictures share once their flags are read: previews, and the run itself."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

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
from core.pipeline.progress import Progress, ProgressBars, Together
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
        """Save a picture under a name made of its prompt, size and seed; where that fails, elsewhere."""
        metadata = self.record.metadata(picture.job)
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
    say(pipeline.settle_offload(arguments.height, arguments.width, settings), sys.stderr)
    models = {name: getattr(arguments, name) for name in model_flags}
    folder, format = arguments.output_dir, arguments.format
    gallery = Gallery(folder, format, pipeline.record(settings, models))
    previews = [Previews(pipeline, folder, format)] if arguments.preview else []
    with closing(ProgressBars(jobs)) as bars, Saving(gallery, bars, control) as saving:
        observe = Together([bars, saving.tell, *previews])
        for start in range(0, len(jobs), pipeline.group):
            group = jobs[start : start + pipeline.group]
            controls = () if control is None else [control] * len(group)
            for picture in pipeline.pictures(group, settings, observe, controls):
                saving.add(picture)
            saving.check()
    say(usage_table(list(pipeline.uses.values())), sys.stderr)
    return 0


class Saving:
    """Saves pictures in a thread of its own while the next ones compute; one that fails, fails alone.

    As a context, it ends when all are saved, also after an error or Ctrl-C, which then waits for no hashes.
    What is told of them the first thread tells: where a stream breaks, bars keep their lock, and another one
    would wait for it in vain.
    """

    def __init__(self, gallery: Gallery, bars: ProgressBars, control: Control | None) -> None:
        self._gallery, self._bars, self._control = gallery, bars, control
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._saved: list[Future[None]] = []
        self._told: deque[str] = deque()

    def add(self, picture: Picture) -> None:
        """Save a picture, once the one before is saved, so that few are held."""
        self._saved.append(self._pool.submit(self._save, picture))
        futures.wait(self._saved[-2:-1])
        self.tell()

    def tell(self, _: Progress | None = None) -> None:
        """Say where pictures lie that were saved since; an observer, so that it is said soon."""
        while self._told:
            self._bars.say(self._told.popleft())

    def check(self) -> None:
        """Raise the first error of what has been saved by now."""
        for saved in self._saved:
            if saved.done():
                saved.result()

    def _save(self, picture: Picture) -> None:
        path = self._gallery.add(picture)
        if self._control is not None:
            save_beside(path, self._control)
        self._told.append(f"seed {picture.job.seed}: {path}")

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._gallery.record.hashes.hurry()
        try:
            futures.wait(self._saved)
        except KeyboardInterrupt:
            self._gallery.record.hashes.hurry()
            futures.wait(self._saved)
            raise
        finally:
            self._pool.shutdown()
            self.tell()
        if kind is None:
            self.check()
