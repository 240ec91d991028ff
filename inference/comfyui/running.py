"""Runs of the pipeline within ComfyUI: it makes room for them, its bar shows them, its button ends them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from comfy import model_management
from comfy.utils import ProgressBar
from torch import Tensor

from core.config.settings import Job, Settings
from core.pictures.images import to_image
from core.pipeline.control import Control
from core.pipeline.pipeline import UltraPixelPipeline, finished
from core.pipeline.progress import Progress
from core.pipeline.resolution import Plan, plan_for
from core.pipeline.sources import NOISE_ALONE, Source
from core.weights.clip import TextCondition
from modules.previewer import Previewer

from .model import Model

PREVIEW_SIDE = 512  # px, the largest that ComfyUI is to show
PREVIEW_EVERY = 4  # steps of the high-resolution pass
POSITIVE, NEGATIVE = "the positive conditioning", "the negative conditioning"  # where there is no prompt

P = ParamSpec("P")
T = TypeVar("T")


def as_elsewhere(work: Callable[P, T]) -> Callable[P, T]:
    """The function, outside of the inference mode in which ComfyUI calls nodes.

    Tensors that are made in that mode cannot be changed outside of it, as in the threads that load weights.
    """

    @wraps(work)
    def done(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return work(*args, **kwargs)

    return done


@dataclass
class Watch:
    """An observer that moves ComfyUI's bar, shows previews, and asks whether the user has cancelled."""

    bar: ProgressBar
    previewer: Previewer | None = None
    done: int = field(default=0, init=False)

    def __call__(self, progress: Progress) -> None:
        model_management.throw_exception_if_processing_interrupted()  # nothing here holds it back
        self.done += 1
        self.bar.update_absolute(self.done, preview=self._preview(progress))

    def _preview(self, progress: Progress) -> tuple[str, Any, int] | None:
        if self.previewer is None or not progress.stage.startswith("stage C"):
            return None
        if "high" in progress.stage and progress.step % PREVIEW_EVERY and progress.step < progress.steps:
            return None
        pixels = self.previewer(progress.latent.float())[0].clamp(0, 1)
        return "JPEG", to_image(pixels), PREVIEW_SIDE


@dataclass(frozen=True)
class Texts:
    """What pictures are made of: prompts, or conditions that other nodes made, which go before them."""

    prompt: str = ""
    negative_prompt: str = ""
    positive: TextCondition | None = None
    negative: TextCondition | None = None

    def jobs(self, height: int, width: int, seed: int, count: int) -> list[Job]:
        """Pictures of one size, the i-th with `seed + i`."""
        positive = self.prompt if self.positive is None else POSITIVE
        negative = self.negative_prompt if self.negative is None else NEGATIVE
        return [Job(positive, height, width, seed + i, negative) for i in range(count)]

    def encoded(self, model: Model, jobs: Sequence[Job]) -> dict[str, TextCondition]:
        """The conditions of jobs' texts and of the empty one, on the device."""
        given = {POSITIVE: self.positive, NEGATIVE: self.negative}
        names = [name for job in jobs for name in (job.prompt, job.negative_prompt)]
        known = model.encode([name for name in names if given.get(name) is None])
        known |= {name: held for name, held in given.items() if held is not None}
        device = model.held.pipeline.device
        return {name: TextCondition(c.tokens.to(device), c.pooled.to(device)) for name, c in known.items()}


@dataclass(frozen=True)
class Made:
    """What a run made of each of its pictures, on the CPU."""

    stage_c: list[Tensor]  # latents (1, 16, h, w)
    stage_b: list[Tensor]  # latents (1, 4, h, w)
    pictures: list[Tensor]  # (3, height, width) in [0, 1]


@dataclass(frozen=True)
class Started:
    """A run that ComfyUI has made room for."""

    pipeline: UltraPixelPipeline
    jobs: Sequence[Job]
    plans: Sequence[Plan]
    texts: dict[str, TextCondition]
    settings: Settings
    watch: Watch

    def stage_c(self, controls: Sequence[Control], sources: Sequence[Source]) -> list[Tensor]:
        """Stage C's latents."""
        entries = self.pipeline.run_controlnet(controls)
        rest = self.texts, self.settings, self.watch, entries, sources
        return self.pipeline.run_stage_c(self.jobs, self.plans, *rest)

    def stage_b(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Stage B's latents of Stage C's."""
        rest = self.texts, latents, self.settings, self.watch
        return list(self.pipeline.run_stage_b(self.jobs, self.plans, *rest))

    def stage_a(
        self, latents: Sequence[Tensor], controls: Sequence[Control] = (), sources: Sequence[Source] = ()
    ) -> list[Tensor]:
        """The pictures of Stage B's latents, with what controls and sources do to them in the end."""
        made = self.pipeline.run_stage_a(self.jobs, self.plans, latents, self.settings, self.watch)
        own = ((controls[i : i + 1], sources[i : i + 1]) for i in range(len(self.jobs)))
        return [finished(picture, *ends).pixels for picture, ends in zip(made, own, strict=True)]


@dataclass(frozen=True)
class Run:
    """One run of a model: of which texts, how, and whether previews are shown."""

    model: Model
    texts: Texts
    settings: Settings
    preview: bool = False

    def whole(self, jobs: Sequence[Job], sources: Sequence[Source] = ()) -> Made:
        """All stages."""
        with self._started(jobs, self._steps_c(sources) + self.settings.steps_b + 1) as run:
            controls = self.model.controls(jobs)
            latents_c = run.stage_c(controls, sources)
            latents_b = run.stage_b(latents_c)
            return Made(latents_c, latents_b, run.stage_a(latents_b, controls, sources))

    def from_stage_c(self, jobs: Sequence[Job], latents: Sequence[Tensor]) -> Made:
        """Stages B and A, of Stage C's latents."""
        with self._started(jobs, self.settings.steps_b + 1) as run:
            latents_b = run.stage_b(latents)
            return Made(list(latents), latents_b, run.stage_a(latents_b))

    def from_stage_b(self, jobs: Sequence[Job], latents: Sequence[Tensor]) -> Made:
        """Stage A, of Stage B's latents."""
        with self._started(jobs, 1, encodes=False) as run:
            return Made([], list(latents), run.stage_a(latents))

    def _steps_c(self, sources: Sequence[Source]) -> int:
        """Stage C's steps of each picture."""
        low, high = self.settings.steps_low, self.settings.steps
        source = sources[0] if sources else NOISE_ALONE
        low = 0 if source.guide is not None else low
        return low + (high if source.high is None else source.high.steps(high))

    @contextmanager
    def _started(self, jobs: Sequence[Job], steps: int, encodes: bool = True) -> Iterator[Started]:
        """Within it, ComfyUI has made room on the device, if it can; after it, it gets the memory back."""
        pipeline = self.model.ready()
        plans = [plan_for(pipeline.config_c, job.height, job.width) for job in jobs]
        watch = Watch(ProgressBar(len(jobs) * steps), self.model.held.previewer() if self.preview else None)
        try:
            # First of all, as ComfyUI's own encoder may do it, on the device.
            texts = self.texts.encoded(self.model, jobs) if encodes else {}
            needed = pipeline.memory_needed(plans[0], self.settings)
            model_management.free_memory(needed, pipeline.device)
            pipeline.settle_offload(jobs[0].height, jobs[0].width, self.settings)
            yield Started(pipeline, jobs, plans, texts, self.settings, watch)
        finally:
            model_management.soft_empty_cache()
