"""The one thread that owns the models: it takes a job after the other and tells how far each is."""

from __future__ import annotations

import sys
import threading
import time
import traceback
import warnings

import torch

from core.commands.flags import is_mistake, told
from core.commands.pictures import Previewing
from core.config.settings import Job as Wanted
from core.pipeline.made import Pictures
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Progress
from core.printable import say
from core.server.jobs import Job, Jobs, StageBar
from core.server.models import Models
from core.server.orders import Order
from core.server.outputs import Outputs, png_bytes
from core.weights.lora.merging import WeightedLora, load_loras, uncalled

STAGES = ("stage C, low resolution", "stage C, high resolution", "stage B", "stage A")
UNEXPECTED = "something went wrong in the server, which its own output tells more about"
LOST = "the device failed, and no more pictures can be made: start the server again"


class Worker(threading.Thread):
    """Makes the pictures of all jobs."""

    def __init__(self, jobs: Jobs, models: Models, outputs: Outputs) -> None:
        super().__init__(name="pictures", daemon=True)
        self._jobs, self._models, self._outputs = jobs, models, outputs
        self._loras: tuple[object, tuple[WeightedLora, ...]] = (None, ())  # the last ones, by their files
        self.lost = False  # whether the device failed, until a picture shows that it works

    def run(self) -> None:
        """Work until the queue is closed."""
        while (job := self._jobs.next()) is not None:
            start = time.perf_counter()
            try:
                self._make(job)
                job.update(seconds=time.perf_counter() - start)
                job.finish("cancelled" if job.stop.is_set() else "done")
                self.lost = False
            except Exception as error:  # whatever it is: the next job must run
                if isinstance(error, torch.AcceleratorError):
                    self.lost = True
                job.finish("failed", sentence(error), status_of(error))

    def _make(self, job: Job) -> None:
        """Make and save a job's pictures; those that are done are saved also where an error ends the rest."""
        order = job.order
        job.update(stages=_bars(order), doing="loading the models")
        pipeline = self._models.pipeline(order.preset)
        try:
            self._prepare(pipeline, job)
            telling = Telling(job, self._models.previews(order.preset))
            made = self._rescued(pipeline, job, telling)
        finally:
            pipeline.set_control(None)  # the next job's pictures are another's
        if made and not (job.stop.is_set() or order.settings.lr_only or order.mends):
            size = made[0].job.height, made[0].job.width
            self._models.learn(order.preset, size, order.settings, telling.seconds / len(made))
        self._save(job, made)

    def _rescued(self, pipeline: UltraPixelPipeline, job: Job, telling: Telling) -> Pictures:
        """The job's pictures; those that are done before an error are saved."""
        try:
            return self._pictures(pipeline, job, telling)
        except Exception:
            self._save(job, pipeline.rescued)
            raise

    def _prepare(self, pipeline: UltraPixelPipeline, job: Job) -> None:
        """Set what the order changes of the models, and note what may not do what it is meant to do."""
        order = job.order
        loras = self._read(order, pipeline)
        pipeline.set_loras(loras)
        if order.controls:
            pipeline.set_controls(order.controls)
        wanted = Wanted(order.prompt, *order.size, job.seed, order.negative_prompt)
        doubts = pipeline.doubts([wanted], order.settings)
        job.update(notes=(*doubts, *uncalled(loras, [order.prompt])))

    def _read(self, order: Order, pipeline: UltraPixelPipeline) -> tuple[WeightedLora, ...]:
        """The order's LoRAs: the last ones, if they are the same files, as these are merged already."""
        paths = self._models.loras(order.preset)
        if lacking := [name for name in order.loras if name not in paths]:
            raise ValueError(f"the LoRA {lacking[0]} is not there any longer")
        stamps = {name: paths[name].stat() for name in order.loras}
        own = [(paths[name], s.st_mtime_ns, s.st_size, order.loras[name]) for name, s in stamps.items()]
        key = order.preset, tuple(own)
        if self._loras[0] != key:
            named = [f"{path}:{weight}" for path, _, _, weight in own]
            self._loras = key, tuple(load_loras(named, pipeline.config_c))
        return self._loras[1]

    def _pictures(self, pipeline: UltraPixelPipeline, job: Job, telling: Telling) -> Pictures:
        order, begin = job.order, job.order.begin
        asked = {"seed": job.seed, "negative_prompt": order.negative_prompt, "settings": order.settings,
                 "observer": telling, "progress": False}  # fmt: skip
        if order.large:
            if begin.strength is not None:
                asked["strength"] = begin.strength
            sides = {"factor": begin.factor, "height": order.height, "width": order.width}
            return pipeline.upscale([begin.picture] * order.count, prompt=order.prompt, **sides, **asked)
        if begin is not None:
            asked |= {"init_image": begin.picture, "strength": begin.strength, "region": begin.region}
        if order.prompts:
            asked["image_prompt"] = order.prompts
        return pipeline(order.prompt, *order.size, num_images=order.count, **asked)

    def _save(self, job: Job, made: Pictures) -> None:
        job.update(doing="saving")
        errors: list[OSError] = []
        for picture in made:
            try:
                job.update(pictures=(*job.status.pictures, self._outputs.add(picture)))
            except OSError as error:  # the next one may be smaller than what is left of the disk
                errors.append(error)
        if errors:
            raise errors[0]


class Telling:
    """An observer that writes a job's progress into its status, and ends it where that is asked for."""

    __name__ = "the page's display of progress"  # in a warning, should it fail

    def __init__(self, job: Job, previews: Previewing | None) -> None:
        self._job, self._previews = job, previews
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Since the first step: weights were loaded before it, at least those of Stage C."""
        return 0.0 if self._started is None else time.perf_counter() - self._started

    def __call__(self, progress: Progress) -> bool:
        self._started = self._started or time.perf_counter()
        steps = progress.steps * self._job.order.count  # a picture that is gone out from takes fewer
        stages = tuple(
            StageBar(bar.name, steps, bar.done + 1) if bar.name == progress.stage else bar
            for bar in self._job.status.stages
        )
        self._job.update(stages=stages, doing=progress.stage)
        self._show(progress)
        return self._job.stop.is_set()

    def _show(self, progress: Progress) -> None:
        """A preview, if there are any; its first error ends them alone."""
        try:
            if self._previews is not None and (image := self._previews.of(progress)) is not None:
                self._job.update(preview=png_bytes(image))
        except Exception as error:  # whatever it is: the picture does not depend on it
            self._previews = None
            warnings.warn(f"the page's previews failed ({error}); the run goes on without", stacklevel=2)


def _bars(order: Order) -> tuple[StageBar, ...]:
    """A bar for each stage, with the steps of all pictures."""
    settings = order.settings
    steps = dict(zip(STAGES, (settings.steps_low, settings.steps, settings.steps_b, 1), strict=True))
    if order.large:
        del steps[STAGES[0]]
    if settings.lr_only:
        del steps[STAGES[1]]
    return tuple(StageBar(name, count * order.count) for name, count in steps.items())


def sentence(error: Exception) -> str:
    """What a client is told about an error; of one that is no mistake, the server's output tells the rest."""
    if is_mistake(error) or isinstance(error, TypeError):
        message = told(error)[0] if is_mistake(error) else str(error)
        return message.removeprefix("error: ")
    say("".join(traceback.format_exception(error)), sys.stderr)
    return LOST if isinstance(error, torch.AcceleratorError) else UNEXPECTED


def status_of(error: Exception) -> int:
    """The HTTP status of an error: 400 where the order is to blame."""
    if isinstance(error, torch.AcceleratorError):
        return 503
    own = isinstance(error, TypeError) or is_mistake(error)
    return 400 if own and not isinstance(error, OSError) else 500
