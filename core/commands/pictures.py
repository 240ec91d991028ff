"""What the scripts that make pictures share once their flags are read: previews, and the run itself."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from core import launch
from core.commands.explored import Continued, Sheet
from core.commands.exploring import FACTS, origins
from core.commands.flags import (
    MODEL_FLAGS,
    check_weights,
    is_mistake,
    told,
    usage_table,
)
from core.commands.report import describe_plan
from core.commands.sharing import agreed, check_together, gathered, on_its_own, on_one_picture, share
from core.config.settings import Job, Settings
from core.config.sizes import Size
from core.devices import cores
from core.pictures.images import (
    load_image,
    numbered_paths,
    picture_stem,
    read_image_metadata,
    save_image,
    save_new_image,
    to_image,
)
from core.pipeline.batches import at_once, parts
from core.pipeline.control import Control
from core.pipeline.controls import Controls, several
from core.pipeline.made import Picture, Record
from core.pipeline.networks import load_previewer
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Progress, ProgressBars, Together
from core.pipeline.resolution import plan_for
from core.printable import say

ControlOf = Callable[[Size], Controls]  # what steers pictures of a size (height, width)
PREVIEW_EVERY = 4  # steps of the high-resolution pass


class Previewing:
    """Makes small pictures of the latents while Stage C runs."""

    def __init__(self, pipeline: UltraPixelPipeline) -> None:
        self._previewer = load_previewer(pipeline.config_c, pipeline.device)

    def of(self, progress: Progress) -> Image.Image | None:
        """The picture of a step; None after those that are not shown."""
        done = progress.step == progress.steps
        if not progress.stage.startswith("stage C") or not (
            done or (not is_low(progress) and progress.step % PREVIEW_EVERY == 0)
        ):
            return None
        return to_image(self._previewer(progress.latent.float())[0].clamp(0, 1))


def is_low(progress: Progress) -> bool:
    """Whether it is of Stage C's low-resolution pass."""
    return "low" in progress.stage


class Previews:
    """Small pictures of the latents while Stage C runs, one file per picture and pass."""

    def __init__(self, pipeline: UltraPixelPipeline, folder: str, format: str, provenance: bool) -> None:
        self._previewing = Previewing(pipeline)
        self._folder, self._format, self._provenance = folder, format, provenance
        self._paths: dict[tuple[Job, bool], Path] = {}

    def __call__(self, progress: Progress) -> None:
        image = self._previewing.of(progress)
        if image is None:
            return
        stem = f"{_stem(progress.job)}_preview_{'lr' if is_low(progress) else 'hr'}"
        metadata = {"prompt": progress.job.prompt, "step": progress.step}
        key = progress.job, is_low(progress)  # names may be alike
        if key in self._paths:
            save_image(image, self._paths[key], self._format, metadata, provenance=self._provenance)
        else:
            self._paths[key] = save_new_image(
                image, self._folder, stem, self._format, metadata, provenance=self._provenance
            )


def _size(job: Job) -> Size:
    return job.height, job.width


def _stem(job: Job) -> str:
    return picture_stem(job.prompt, job.height, job.width, job.seed)


@dataclass(frozen=True)
class Gallery:
    """Where a run's pictures go, with what is written into all of them."""

    folder: str
    format: str
    record: Record
    provenance: bool = False  # whether they say that a model made them
    latents: bool = False  # save them beside each picture

    def add(self, picture: Picture) -> Path:
        """Save a picture under a name made of its prompt, size and seed; where that fails, elsewhere."""
        metadata = self.record.metadata(picture.job)
        job, image, failures = picture.job, picture.drawn(self.format), []
        text = self.record.text(job)
        for folder, stem, format in self._ways(job):
            try:
                path = save_new_image(image, folder, stem, format, metadata, text, self.provenance)
            except Exception as error:  # whatever it is: the picture is computed
                failures.append(error)
                continue
            if self.latents:
                save_latents_beside(path, replace(picture, record=self.record))
            if failures:
                reason = f"it could not be saved as asked: {failures[0]}"
                warnings.warn(f"{path}: the picture lies here ({reason})", stacklevel=3)
            return path
        raise OSError(f"the picture of seed {job.seed} cannot be saved anywhere ({failures[0]})")

    def has(self, job: Job) -> bool:
        """Whether `find` finds the job's picture."""
        return self.find(job) is not None

    def find(self, job: Job) -> Path | None:
        """The job's picture in the folder, made by the same settings and weights; None if there is none."""
        names = [(stem, format) for folder, stem, format in self._ways(job) if folder == self.folder]
        paths = [
            path
            for stem, format in dict.fromkeys(names)
            for path in takewhile(Path.exists, numbered_paths(self.folder, stem, format))
        ]
        wanted = json.loads(json.dumps(self.record.metadata(job)))
        return next((path for path in paths if made_alike(_metadata(path), wanted)), None)

    def _ways(self, job: Job) -> Iterator[tuple[str, str, str]]:
        """Folder, name and format: as asked, and what is left if that cannot be."""
        plain = f"picture_{job.height}x{job.width}_{job.seed}"
        lr_only = (job.settings or self.record.settings).lr_only
        stem = f"{_stem(job)}_lr" if lr_only else _stem(job)
        for folder in (self.folder, gettempdir()):
            yield folder, stem, self.format
            yield folder, plain, self.format
            yield folder, plain, "png"  # which holds every picture


def _metadata(path: Path) -> dict[str, Any]:
    """A picture's settings; none where it has none, is none, or is not whole."""
    try:
        load_image(path)
        return read_image_metadata(path)
    except (OSError, ValueError):
        return {}


def made_alike(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two pictures' metadata tell of the same picture, whatever else they tell.

    A setting that an older picture lacks was as its default. Hashes count as far as they are there: a picture
    that was saved in a hurry lacks some.
    """
    if not stored or _telling({**asdict(Settings()), **stored}) != _telling(wanted):
        return False
    return {*stored.get("weights", {}).values()} <= {*wanted["weights"].values()}


def _telling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in FACTS}


def save_latents_beside(path: Path, picture: Picture) -> None:
    """Save a picture's latents beside it, under its name."""
    try:
        picture.save_latents(path.with_suffix(".safetensors"))
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: its latents are not saved beside it ({error})", stacklevel=2)


def save_beside(path: Path, control: Control) -> None:
    """Save what a ControlNet saw beside the picture that it steered; that of a second one gets a number."""
    try:
        shown = to_image(control.shown.expand(3, -1, -1))
        save_new_image(shown, path.parent, f"{path.stem}_control", "png", {})
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: what the ControlNet saw is not saved beside it ({error})", stacklevel=2)


@dataclass
class Outcome:
    """What became of a run's jobs, by their numbers: files, and why there is none."""

    paths: dict[int, Path]
    errors: dict[int, str]


def make_pictures(
    arguments: argparse.Namespace,
    pipeline: UltraPixelPipeline,
    jobs: Sequence[Job],
    settings: Settings,
    model_flags: Sequence[str] = MODEL_FLAGS,
    control: ControlOf | None = None,
) -> int:
    """Make and save the jobs' pictures, or say what would be done (--dry_run); return the exit code.

    `model_flags` are those whose values go into the pictures, besides the jobs and the settings. `control`
    steers all of them, and what it gives is saved beside each.
    """
    batch = at_once(getattr(arguments, "batch", 1))
    if getattr(arguments, "split", False):
        check_together([job.settings or settings for job in jobs], batch, arguments.dry_run)
    check_jobs(pipeline, jobs, settings, control)
    Continued.of(arguments, pipeline).check(jobs, settings)
    if arguments.dry_run:
        tell_plan(pipeline, jobs, settings, batch)
        return 0
    prepare(arguments, pipeline, jobs, settings)
    try:
        make_and_save(arguments, pipeline, jobs, settings, model_flags, control)
    except KeyboardInterrupt:
        if len(jobs) > 1 and not launch.is_launched() and not arguments.skip_existing:
            raise KeyboardInterrupt("the same command with --skip_existing makes what is missing") from None
        raise
    tell_uses(pipeline)
    return 0


def check_jobs(
    pipeline: UltraPixelPipeline, jobs: Sequence[Job], settings: Settings, control: ControlOf | None = None
) -> None:
    """ValueError for sizes that cannot be made; what may not do what it is meant to do is said."""
    for size, lr_size in dict.fromkeys((_size(job), (job.settings or settings).lr_size) for job in jobs):
        plan_for(pipeline.config_c, *size, lr_size)
        if pipeline.origin is not None:
            pipeline.origin.size(*size)
        if control is not None:
            control(size)
    for sentence in pipeline.doubts(jobs, settings) if launch.is_main() else ():
        say(f"warning: {sentence}", sys.stderr)


def tell_plan(pipeline: UltraPixelPipeline, jobs: Sequence[Job], settings: Settings, batch: int = 1) -> None:
    """Say what would be done."""
    if launch.is_main():
        say(describe_plan(pipeline, jobs, settings, batch), sys.stdout)


def tell_uses(pipeline: UltraPixelPipeline) -> None:
    """Say what the stages took, if any ran."""
    if launch.is_main() and any(use.seconds for use in pipeline.uses.values()):
        say(usage_table(list(pipeline.uses.values())), sys.stderr)


def prepare(
    arguments: argparse.Namespace, pipeline: UltraPixelPipeline, jobs: Sequence[Job], settings: Settings
) -> None:
    """Check the weights, and settle where they rest and how the CPU computes, before jobs are made."""
    check_weights(pipeline, arguments.preset)
    sizes = [*map(_size, jobs)] or [(arguments.height, arguments.width)]
    sentence = pipeline.settle_offload(*max(sizes, key=lambda size: size[0] * size[1]), settings)
    if launch.is_main():
        say(sentence, sys.stderr)
    if launch.is_own_setting("OMP_NUM_THREADS") and pipeline.device.type == "cpu":
        torch.set_num_threads(cores())  # as in one process: sums are rounded otherwise with one thread


def make_and_save(
    arguments: argparse.Namespace,
    pipeline: UltraPixelPipeline,
    jobs: Sequence[Job],
    settings: Settings,
    model_flags: Sequence[str] = MODEL_FLAGS,
    control: ControlOf | None = None,
    forgiving: bool = False,
) -> Outcome:
    """Make and save the jobs' pictures after `prepare`; where it is `forgiving`, an error costs one picture.

    What became of them, the first of several processes knows of all.
    """
    models = {name: getattr(arguments, name) for name in (*model_flags, *origins(arguments))}
    folder, format = arguments.output_dir, arguments.format
    before, batch = Continued.of(arguments, pipeline), getattr(arguments, "batch", 1)
    provenance, latents = (getattr(arguments, name, False) for name in ("provenance", "save_latents"))
    gallery = Gallery(folder, format, pipeline.record(settings, models), provenance, latents)
    together = getattr(arguments, "split", False)
    forgiving = forgiving and not together  # the other processes would wait for the rest of the picture
    there = _there(gallery, jobs, getattr(arguments, "skip_existing", None))
    numbers = [number for number in range(len(jobs)) if number not in there]
    numbers = numbers if together else share(numbers)
    saves = launch.is_main() or not together
    shown = tqdm if launch.is_main() else partial(tqdm, disable=True)
    own = [job.settings or settings for job in jobs]
    way = on_one_picture(pipeline, own, batch) if together else on_its_own(told)
    bars = ProgressBars([jobs[number] for number in numbers], shown)
    errors: dict[int, str] = {}
    sheet = Sheet(folder, settings.lr_only and saves and not forgiving)
    with _ending_as_by_ctrl_c(), way, closing(bars), _saved_at_the_end(sheet, bars):
        with Saving(gallery, bars, control, forgiving) as saving:
            previews = [Previews(pipeline, folder, format, provenance)] if arguments.preview and saves else []
            observe = Together([bars, saving.tell, *previews])
            for group in parts(numbers, 1 if forgiving else max(pipeline.group, batch)):
                these = [jobs[number] for number in group]
                controls = () if control is None else [control(_size(job)) for job in these]
                try:
                    sources = before.sources(these, settings)
                    made = pipeline.pictures(these, settings, observe, controls, sources, batch)
                    for picture, number in zip(made, group, strict=False):
                        if saves:  # else another process does
                            saving.add(picture, number)
                            sheet.add(picture)
                    saving.check()
                except Exception as error:
                    if not forgiving:
                        raise
                    errors |= dict.fromkeys(group, sentence_of(error))
        outcome = {"paths": saving.paths(), "errors": errors | saving.errors()}
        found = gathered("outcome", outcome) if forgiving else [outcome]
    paths = {**there, **{int(n): path for part in found for n, path in part["paths"].items()}}
    failed = {int(n): error for part in found for n, error in part["errors"].items()}
    return Outcome({number: Path(path) for number, path in paths.items()}, failed)


def sentence_of(error: Exception) -> str:
    """What an error says, as one line."""
    sentence = told(error)[0] if is_mistake(error) else f"{type(error).__name__}: {error}"
    return sentence.removeprefix("error: ").partition("\n")[0]


@contextmanager
def _saved_at_the_end(sheet: Sheet, bars: ProgressBars) -> Iterator[None]:
    """Within it the sheet is filled; after it, also after an error, it is saved."""
    try:
        yield
    finally:
        if path := sheet.save():
            bars.say(f"sheet: {path}")


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


def _there(gallery: Gallery, jobs: Sequence[Job], skip: bool | None) -> dict[int, str]:
    """The pictures that are there already, by the jobs' numbers; none, unless `skip`.

    None stands for whether a launcher started it. The first process looks, before any starts: what it has
    made by then, another one would leave out.
    """
    if not (launch.is_launched() if skip is None else skip):
        return {}
    found = agreed(
        "there", lambda: {n: str(path) for n, job in enumerate(jobs) if (path := gallery.find(job))}
    )
    if found and launch.is_main():
        say(f"{len(found)} of {len(jobs)} pictures are there already: {gallery.folder}", sys.stderr)
    return {int(number): path for number, path in found.items()}


class Saving:
    """Saves pictures in a thread of its own while the next ones compute; one that fails, fails alone.

    As a context, it ends when all are saved, also after an error or Ctrl-C, which then waits for no hashes.
    What is told of them the first thread tells: where a stream breaks, bars keep their lock, and another one
    would wait for it in vain.
    """

    def __init__(
        self, gallery: Gallery, bars: ProgressBars, control: ControlOf | None, forgiving: bool = False
    ) -> None:
        self._gallery, self._bars, self._control = gallery, bars, control
        self._forgiving = forgiving  # errors are raised by nobody, only found
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._saved: list[Future[Path]] = []
        self._numbers: list[int] = []  # of the jobs
        self._told: deque[str] = deque()

    def add(self, picture: Picture, number: int) -> None:
        """Save a job's picture, once the one before is saved, so that few are held."""
        self._numbers.append(number)
        self._saved.append(self._pool.submit(self._save, picture))
        futures.wait(self._saved[-2:-1])
        self.tell()

    def tell(self, _: Progress | None = None) -> None:
        """Say where pictures lie that were saved since; an observer, so that it is said soon."""
        while self._told:
            self._bars.say(self._told.popleft())

    def check(self) -> None:
        """Raise the first error of what has been saved by now."""
        for saved in () if self._forgiving else self._saved:
            if saved.done():
                saved.result()

    def paths(self) -> dict[int, str]:
        """Where pictures lie, by the numbers of their jobs, once all are saved."""
        return {n: str(saved.result()) for n, saved in self._by_number() if saved.exception() is None}

    def errors(self) -> dict[int, str]:
        """Why pictures could not be saved, likewise."""
        failed = ((n, saved.exception()) for n, saved in self._by_number())
        return {n: sentence_of(error) for n, error in failed if error is not None}

    def _by_number(self) -> Iterator[tuple[int, Future[Path]]]:
        return zip(self._numbers, self._saved, strict=True)

    def _save(self, picture: Picture) -> Path:
        path = self._gallery.add(picture)
        for control in () if self._control is None else several(self._control(_size(picture.job))):
            save_beside(path, control)
        self._told.append(f"seed {picture.job.seed}: {path}")
        return path

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
