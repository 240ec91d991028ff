"""Passes that begin at a latent instead of at noise alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_pipeline

from core.config.settings import Job, Settings
from core.pipeline.passes import Start
from core.pipeline.progress import Progress
from core.pipeline.sources import Source
from gdf.samplers import steps
from gdf.schedules import cosine

QUICK = Settings(steps=4, steps_b=1, guidance_r="last_step")
JOB = Job("a red house", 128, 128, 1)


def test_steps_from_a_start_end_clean_and_keep_their_length() -> None:
    whole, half = steps(cosine, 20), steps(cosine, 10, start=0.5)
    assert [step.t for step in half] == pytest.approx([step.t for step in whole[10:]])
    assert half[-1].t_next == 0 and half[-1].is_last
    for start in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            steps(cosine, 10, start=start)
        with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
            Start(torch.zeros(1), start)


@pytest.mark.parametrize(("strength", "left"), [(1.0, 20), (0.5, 10), (0.01, 1), (0.3, 6), (0.31, 7)])
def test_a_start_leaves_a_share_of_the_steps(strength: float, left: int) -> None:
    assert Start(torch.zeros(1), strength).steps(20) == left


def test_pictures_go_out_from_latents(family_folder: Path) -> None:
    pipeline, seen = random_pipeline(family_folder), []

    def made(source: Source, job: Job = JOB) -> torch.Tensor:
        def observe(progress: Progress) -> None:
            seen.append(progress.stage)

        seen.clear()
        return next(pipeline.pictures([job], QUICK, observe, sources=[source])).pixels

    alone, latent = made(Source()), torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    assert len(seen) == 4 + 4 + 1 + 1
    assert torch.equal(made(Source(low=Start(torch.zeros_like(latent), 1.0))), alone)
    changed = made(Source(low=Start(latent, 0.5)))
    assert len(seen) == 2 + 4 + 1 + 1 and not torch.equal(changed, alone)
    guided = made(Source(guide=latent))
    assert not any("low" in stage for stage in seen) and not torch.equal(guided, alone)
    assert torch.equal(made(Source(guide=latent)), guided)
    assert not torch.equal(made(Source(guide=latent), replace(JOB, seed=2)), guided)
    with pytest.raises(ValueError, match="begins at a latent of 16 x 3 x 3, but it is of 16 x 12 x 12"):
        made(Source(low=Start(torch.zeros(1, 16, 3, 3), 0.5)))
