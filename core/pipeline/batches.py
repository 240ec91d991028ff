"""Pictures of one size that are made at once, each with its own noise: the same ones but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from core.config.arguments import whole_number
from core.config.settings import Job, Settings
from core.pipeline.conditioning import Conditions
from core.pipeline.entries import Entries
from core.pipeline.graphs import FIRST_REPLAYED, PassRecordings, Recordings
from core.pipeline.passes import (
    NOISE_STREAMS,
    LowEnd,
    NoiseSource,
    NoiseSources,
    OnStep,
    features_after,
    features_of,
    high_resolution_pass,
    low_resolution_pass,
    prepare_stage_c,
    stage_b_pass,
)
from core.pipeline.progress import Observer, Progress, Stopped
from core.pipeline.region import prepare_guidance
from core.pipeline.resolution import Plan
from core.pipeline.sources import Source, stacked
from core.pipeline.split import Split
from gdf.samplers import Estimate, Step
from gdf.targets import Target
from modules.guidance import Guidance, PreparedGuidance
from modules.stage_b import StageB
from modules.stage_c import StageC


@dataclass(frozen=True)
class Wanted:
    """A picture before Stage C."""

    job: Job
    sizes: Plan
    conditions: Conditions  # [conditional], or [conditional, unconditional]
    entries: Sequence[Entries]  # of each of its controls
    source: Source

    def alike(self) -> tuple:
        """What pictures have in common that can be made at once."""
        added = [own.alike() for own in self.entries]
        return self.sizes, self.conditions.clip_text.shape, added, self.source.alike()


@dataclass(frozen=True)
class Batch:
    """Pictures that are made at once, on a device."""

    jobs: Sequence[Job]
    sizes: Plan
    conditions: Conditions  # all conditional ones, and then, if any, the unconditional ones
    entries: Sequence[Entries]
    source: Source
    device: torch.device

    @classmethod
    def of(cls, wanted: Sequence[Wanted], device: torch.device) -> Batch:
        """Those of pictures that are alike."""
        entries = [
            Entries.together(own).to(device) for own in zip(*(one.entries for one in wanted), strict=True)
        ]
        together = Conditions.together([one.conditions for one in wanted])
        source = stacked([one.source for one in wanted]).to(device)
        return cls([one.job for one in wanted], wanted[0].sizes, together, entries, source, device)

    def noise(self, stream: str) -> NoiseSource | NoiseSources:
        """The pictures' noise for a pass."""
        return noise_of(self.jobs, stream, self.device)


def at_once(batch: object) -> int:
    """The number of pictures at once; TypeError or ValueError for what cannot be one."""
    if whole_number("batch", batch) < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    return int(batch)


def batches(wanted: Sequence[Wanted], most: int, device: torch.device) -> Iterator[Batch]:
    """Neighbours that are alike, at most `most` at once."""
    for alike in neighbours([one.alike() for one in wanted], most):
        yield Batch.of(wanted[alike], device)


def neighbours(kinds: Sequence[object], most: int) -> Iterator[slice]:
    """Where neighbours of the same kind are, at most `most` in each."""
    start = 0
    for _, same in groupby(kinds):
        end = start + len([*same])
        yield from (slice(first, min(first + most, end)) for first in range(start, end, most))
        start = end


def parts(items: Sequence, most: int) -> Iterator[Sequence]:
    """Neighbours, at most `most` at once."""
    for start in range(0, len(items), most):
        yield items[start : start + most]


def noise_of(jobs: Sequence[Job], stream: str, device: torch.device) -> NoiseSource | NoiseSources:
    """The noise of pictures for a pass, a name of `NOISE_STREAMS`."""
    sources = tuple(NoiseSource.of(job.seed, NOISE_STREAMS[stream], device) for job in jobs)
    return sources[0] if len(sources) == 1 else NoiseSources(sources)


def report(observer: Observer | None, stage: str, jobs: Sequence[Job]) -> OnStep | None:
    """What tells an observer of every picture's steps; Stopped once all of a step are told, if it says so."""
    if observer is None:
        return None

    def told(step: Step, estimate: Estimate) -> None:
        latents = estimate.x0.split(1)
        steps = [
            Progress(stage, job, step.index + 1, step.count, latent)
            for job, latent in zip(jobs, latents, strict=True)
        ]
        if any([observer(progress) is True for progress in steps]):  # a list: all are told
            raise Stopped

    return told


# --- the passes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageCRun:
    """What both passes of all batches share."""

    stage_c: StageC
    guidance: Guidance | None
    strengths: Sequence[tuple[int, float]]  # of the guidance, as in `guidance_strength`
    target: Target
    settings: Settings
    observer: Observer | None = None
    recordings: PassRecordings = PassRecordings()
    split: Split | None = None
    load_ahead: Callable[[], None] = lambda: None  # called once no steps are recorded any longer

    def latents(self, batch: Batch) -> Iterator[tuple[Tensor, LowEnd | None]]:
        """Each picture's latent (1, 16, h, w), and the end of its low-resolution pass, on the CPU.

        With `lr_only` the latent is that of the low-resolution pass.
        """
        latent, end = self._made(batch)
        for i in range(len(batch.jobs)):

            def own(x: Tensor, i: int = i) -> Tensor:
                return x[i : i + 1].cpu().clone()  # not a part of all, which would be pickled with it

            yield own(latent), None if end is None else end.mapped(own)

    def _made(self, batch: Batch) -> tuple[Tensor, LowEnd | None]:
        if batch.source.latent is not None:
            return batch.source.latent, batch.source.ended
        held = prepare_stage_c(self.stage_c, batch.conditions)
        end, prepared = self._low(batch, held)
        if self.settings.lr_only:
            self.load_ahead()
            return batch.source.guide if end is None else end.x0, end
        tell = report(self.observer, "stage C, high resolution", batch.jobs)

        def told(step: Step, estimate: Estimate) -> None:
            if step.index == FIRST_REPLAYED or step.is_last:
                self.load_ahead()
            if tell is not None:
                tell(step, estimate)

        high = high_resolution_pass(
            self.stage_c, held, prepared, self.target, batch.sizes, self.settings, batch.noise("hr"),
            split=self.split, on_step=told,
            start=batch.source.high, controls=batch.entries, recordings=self.recordings.high,
        )  # fmt: skip
        return high.x0, end

    def _low(self, batch: Batch, held) -> tuple[LowEnd | None, PreparedGuidance | None]:
        source, noise = batch.source, batch.noise("lr")
        if source.guide is not None:
            end, guide = None, source.guide
            features = features_of(self.stage_c, held, guide, noise.like(guide), controls=batch.entries)
        elif source.ended is not None:
            end, r = source.ended, self.settings.guidance_r
            features = features_after(self.stage_c, held, end, r, batch.entries)
        else:
            end, features = low_resolution_pass(
                self.stage_c, held, self.target, batch.sizes, self.settings, noise, batch.entries,
                report(self.observer, "stage C, low resolution", batch.jobs), self.recordings.low,
                self.split, source.low,
            )  # fmt: skip
        if self.guidance is None or self.settings.lr_only:
            return end, None
        prepared = prepare_guidance(
            self.guidance, features, self.stage_c, batch.sizes, source.part, self.strengths
        )
        both = len(batch.conditions.clip_text) > len(batch.jobs)
        return end, prepared.for_both_halves(self.settings.guidance_unconditional) if both else prepared


def stage_b_latents(
    stage_b: StageB,
    jobs: Sequence[Job],
    sizes: Plan,
    latents: Sequence[Tensor],
    pooled: Tensor,
    target: Target,
    settings: Settings,
    device: torch.device,
    observer: Observer | None = None,
    split: Split | None = None,
    recordings: Recordings | None = None,
) -> Iterator[Tensor]:
    """Stage B's latents (1, 4, h, w), on the CPU, of pictures of one size; `pooled` as in `stage_b_pass`."""
    sampled = stage_b_pass(
        stage_b, torch.cat([*latents]).to(device), pooled, target, sizes, settings,
        noise_of(jobs, "stage_b", device), split=split, on_step=report(observer, "stage B", jobs),
        recordings=recordings,
    )  # fmt: skip
    yield from (latent.clone() for latent in sampled.x0.cpu().split(1))
