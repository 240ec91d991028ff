"""Many pictures at once, for a device that a single one does not fill: figures of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from core.config.settings import Job, Settings
from core.family.evaluation import Case, Judge, Measured, View, enlarge
from core.pipeline.batches import parts
from core.pipeline.pipeline import UltraPixelPipeline


def make_pictures(pipeline: UltraPixelPipeline, jobs: Sequence[Job], settings: Settings) -> Tensor:
    """Pictures (B, 3, height, width) in [0, 1] of jobs of one size; ValueError where sizes differ."""
    if len({(job.height, job.width) for job in jobs}) != 1:
        raise ValueError("pictures of different sizes cannot be made in one batch")
    made = pipeline.run(jobs, settings, batch=len(jobs))
    return torch.stack([picture.pixels for picture in made])


def in_batches(
    pipeline: UltraPixelPipeline, cases: Sequence[Case], side: int, batch: int, settings: Settings
) -> Iterator[tuple[Case, Tensor]]:
    """Every case with its picture (3, side, side)."""
    for group in parts(cases, batch):
        jobs = [Job(case.prompt, side, side, case.seed) for case in group]
        yield from zip(group, make_pictures(pipeline, jobs, settings), strict=True)


def measured(
    pipeline: UltraPixelPipeline,
    judge: Judge,
    cases: Sequence[Case],
    side: int,
    views: Sequence[View],
    batch: int,
    settings: Settings,
) -> list[Measured]:
    """What the cases' pictures of one size are worth, under each of the views."""
    start, seen = time.perf_counter(), [[] for _ in views]
    for case, pixels in in_batches(pipeline, cases, side, batch, settings):
        for view, found in zip(views, seen, strict=True):
            found.append(judge.look(enlarge(pixels, view.size), case.seed))
    seconds = time.perf_counter() - start
    return [judge.measure(view, cases, s, seconds) for view, s in zip(views, seen, strict=True)]
