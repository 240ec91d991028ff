"""What the scripts that make pictures share once their flags are read: previews, and the run itself."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from tqdm import tqdm

from core import launch
from core.commands.flags import (
    MODEL_FLAGS,
    check_weights,
    told,
    usage_table,
)
from core.commands.report import describe_plan
from core.commands.sharing import agreed, on_its_own, on_one_picture, share
from core.config.settings import Job, Settings
from core.devices import cores
from core.images import (
    load_image,
    numbered_paths,
    picture_stem,
    read_image_metadata,
    save_image,
    save_new_image,
    to_image,
)
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

    def has(self, job: Job) -> bool:
        """Whether the folder has the job's picture, made by the same settings and weights."""
        names = [(stem, format) for folder, stem, format in self._ways(job) if folder == self.folder]
        paths = [
            path
            for stem, format in dict.fromkeys(names)
            for path in takewhile(Path.exists, numbered_paths(self.folder, stem, format))
        ]
        wanted = json.loads(json.dumps(self.record.metadata(job)))
        return any(_made_alike(_metadata(path), wanted) for path in paths)

    def _ways(self, job: Job) -> Iterator[tuple[str, str, str]]:
        """Folder, name and format: as asked, and what is left if that cannot be."""
        plain = f"picture_{job.height}x{job.width}_{job.seed}"
        for folder in (self.folder, gettempdir()):
            yield folder, _stem(job), self.format
            yield folder, plain, self.format
            yield folder, plain, "png"  # which holds every picture


def _metadata(path: Path) -> dict[str, Any]:
    """A picture's settings; none where it has none, is none, or is not whole."""
    try:
        load_image(path)
        return read_image_metadata(path)
    except (OSError, ValueError):
        return {}


def _made_alike(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two pictures' metadata tell of the same picture, whatever the packages' versions.

    Hashes count as far as they are there: a picture that was saved in a hurry lacks some.
    """
    others = {"versions", "weights"}
    if not stored or {n: v for n, v in stored.items() if n not in others} != {
        n: v for n, v in wanted.items() if n not in others
    }:
        return False
    return {*stored.get("weights", {}).values()} <= {*wanted["weights"].values()}


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
    for sentence in pipeline.doubts(jobs, settings) if launch.is_main() else ():
        say(f"warning: {sentence}", sys.stderr)
    if arguments.dry_run:
        if launch.is_main():
            say(describe_plan(pipeline, jobs, settings), sys.stdout)
        return 0
    check_weights(pipeline, arguments.preset)
    sentence = pipeline.settle_offload(arguments.height, arguments.width, settings)
    if launch.is_main():
        say(sentence, sys.stderr)
    if launch.is_own_setting("OMP_NUM_THREADS") and pipeline.device.type == "cpu":
        torch.set_num_threads(cores())  # as in one process: sums are rounded otherwise with one thread
    models = {name: getattr(arguments, name) for name in model_flags}
    folder, format = arguments.output_dir, arguments.format
    gallery = Gallery(folder, format, pipeline.record(settings, models))
    together = getattr(arguments, "split", False)
    jobs = _lacking(gallery, jobs, getattr(arguments, "skip_existing", None))
    jobs = jobs if together else share(jobs)
    saves = launch.is_main() or not together
    shown = tqdm if launch.is_main() else partial(tqdm, disable=True)
    way = on_one_picture(pipeline, settings) if together else on_its_own(told)
    bars = ProgressBars(jobs, shown)
    with _ending_as_by_ctrl_c(), way, closing(bars), Saving(gallery, bars, control) as saving:
        previews = [Previews(pipeline, folder, format)] if arguments.preview and saves else []
        observe = Together([bars, saving.tell, *previews])
        for start in range(0, len(jobs), pipeline.group):
            group = jobs[start : start + pipeline.group]
            controls = () if control is None else [control] * len(group)
            for picture in pipeline.pictures(group, settings, observe, controls):
                if saves:  # else another process does
                    saving.add(picture)
            saving.check()
    if launch.is_main():
        say(usage_table(list(pipeline.uses.values())), sys.stderr)
    return 0


@contextmanager
def _ending_as_by_ctrl_c() -> Iterator[None]:
    """Within it, SIGTERM too lets what is computed be saved; several processes have a way of their own."""
    if launch.processes() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _lacking(gallery: Gallery, jobs: Sequence[Job], skip: bool | None) -> list[Job]:
    """The jobs whose pictures are not there yet; all, unless `skip` (None: where a launcher started it).

    The first process looks, before any starts: what it has made by then, another one would leave out.
    """
    if not (launch.is_launched() if skip is None else skip):
        return list(jobs)
    there = agreed("there", lambda: [number for number, job in enumerate(jobs) if gallery.has(job)])
    if there and launch.is_main():
        say(f"{len(there)} of {len(jobs)} pictures are there already: {gallery.folder}", sys.stderr)
    return [job for number, job in enumerate(jobs) if number not in set(there)]


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
