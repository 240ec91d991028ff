"""core/training/noising.py: the times at which pictures are noised in training."""

from __future__ import annotations

import math

import pytest
import torch

from core.training.noising import shifted
from gdf.schedules import TIME_MIN, cosine


def test_times_of_larger_pictures_have_more_noise() -> None:
    t = torch.linspace(0.01, 0.9, 50)
    assert shifted(t, torch.ones(50)).allclose(t, atol=1e-5)
    for shift in (1.5, 4.0):
        moved = shifted(t, torch.full((50,), shift))
        free = moved < 1 - 1e-4  # the rest is at the schedule's end
        assert (moved > t).all() and moved.max() <= 1 + 1e-5 and free.sum() > 30
        lowered = cosine(t) - cosine(moved)
        assert lowered[free].tolist() == pytest.approx([2 * math.log(shift)] * int(free.sum()), abs=1e-2)


def test_the_ends_of_time_stay_within_the_schedule() -> None:
    ends = shifted(torch.tensor([0.0, TIME_MIN, 1.0]), torch.full((3,), 4.0))
    assert ends.isfinite().all() and ends.min() > 0 and ends.max() <= 1 + 1e-5
    assert ends[0] == ends[1]
