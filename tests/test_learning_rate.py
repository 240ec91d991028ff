"""The learning rate: its curve, and that it goes on rightly from checkpoints of all kinds."""

from __future__ import annotations

import io
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_training import read_weights, train

from core.training.learning_rate import Course, LearningRate
from core.training.trainer import checkpoints


def formula(course: Course, step: int) -> float:
    """The rate of an update counted from 0: linear warm-up, then constant, or a cosine down to `lr_end`."""
    warm = min(1.0, (step + 1) / max(1, course.warmup_updates))
    if course.lr_end is None:
        return course.lr * warm
    share = max(0, step - course.warmup_updates) / max(1, course.updates - course.warmup_updates)
    return warm * (course.lr_end + (course.lr - course.lr_end) * (1 + math.cos(math.pi * share)) / 2)


class Run:
    """An optimizer that never steps and its rate, over which a checkpoint can be laid."""

    def __init__(self, course: Course, checkpoint: bytes | None = None, step: int = 0) -> None:
        self.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=course.lr)
        self.rate, self.step = LearningRate(self.optimizer, course), step
        if checkpoint is not None:
            state = torch.load(io.BytesIO(checkpoint), weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.rate.resume(state.get("rate"), step)

    def to(self, step: int) -> list[float]:
        """The rates of the updates up to that one."""
        rates = []
        while self.step < step:
            rates.append(self.optimizer.param_groups[0]["lr"])
            self.rate.step()
            self.step += 1
        return rates

    def checkpoint(self) -> bytes:
        """What training keeps of both."""
        stream = io.BytesIO()
        torch.save({"optimizer": self.optimizer.state_dict(), "rate": self.rate.state_dict()}, stream)
        return stream.getvalue()


COURSES = [
    Course(2.0, updates, warmup, end)
    for updates, warmup in [(40, 0), (40, 1), (40, 10), (12, 10), (11, 10), (10, 10), (5, 10), (1, 0)]
    for end in (None, 1e-3)
]


@pytest.mark.parametrize("course", COURSES)
def test_the_rate_follows_its_formula_and_torch_warns_of_nothing(course: Course) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = Run(course).to(course.updates)
    assert rates == pytest.approx([formula(course, step) for step in range(course.updates)], rel=1e-12)
    assert rates[0] > 0 and max(rates) <= course.lr


@pytest.mark.parametrize("course", [Course(2.0, 30, 10, 1e-3), Course(2.0, 30, 0, 1e-3), Course(2.0, 30, 7)])
def test_a_resumed_rate_equals_an_uninterrupted_one(course: Course) -> None:
    whole = Run(course).to(course.updates)
    for step in (1, 5, 9, 10, 11, 12, 29):
        first = Run(course)
        assert first.to(step) + Run(course, first.checkpoint(), step).to(course.updates) == whole


@pytest.mark.parametrize("warmup", [0, 4, 20])
@pytest.mark.parametrize("stop", [2, 10, 15, 29])
def test_with_more_updates_the_rate_goes_on_falling_from_where_it_is(warmup: int, stop: int) -> None:
    course = Course(2.0, 30, warmup, 0.1)
    first, longer = Run(course), replace(course, updates=60)
    rates = first.to(stop)
    second = Run(longer, first.checkpoint(), stop)
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    rates += second.to(45)
    rates += Run(longer, second.checkpoint(), 45).to(60)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    falls = [a - b for a, b in zip(rates, rates[1:], strict=False)]
    assert max(falls[stop:]) < 0.1 * max(rates) and rates[-1] == pytest.approx(0.1, abs=0.005)


def test_a_run_that_had_ended_takes_the_longer_cosine() -> None:
    course = Course(2.0, 30, 10, 0.1)
    first, longer = Run(course), replace(course, updates=60)
    first.to(30)
    rates = Run(longer, first.checkpoint(), 30).to(60)
    assert rates == pytest.approx([formula(longer, step) for step in range(30, 60)], rel=1e-12)


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"lr_end": 0.2}, {"lr_end": None}, {"warmup_updates": 3}])
def test_other_rates_hold_from_the_next_update_on(change: dict[str, float | None]) -> None:
    first = Run(Course(2.0, 30, 10, 0.1))
    first.to(15)
    other = replace(Course(2.0, 30, 10, 0.1), **change)
    rates = Run(other, first.checkpoint(), 15).to(30)
    assert rates == pytest.approx([formula(other, step) for step in range(15, 30)], rel=1e-12)


# --- in the trainer -------------------------------------------------------------------------------


def rates_of(folder: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]


def as_written_before(path: Path, lr: float) -> None:
    """Make of a checkpoint what versions without schedulers wrote: the last update's rate, and no more."""
    state = torch.load(path, weights_only=True)
    del state["rate"]
    for group in state["optimizer"]["param_groups"]:
        group.pop("initial_lr", None)
        group["lr"] = lr
    torch.save(state, path)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("lr_end", [None, 0.001])
def test_training_with_a_warm_up_resumes_bit_for_bit(
    tmp_path: Path, before: bool, lr_end: float | None
) -> None:
    settings = dict(updates=20, lr_end=lr_end, save_every=5)
    train(tmp_path / "whole", **settings)
    for stop in (3, 11):
        train(tmp_path / "parts", **settings, stop=stop)
        if before:
            as_written_before(checkpoints(tmp_path / "parts")[-1], rates_of(tmp_path / "parts")[-1])
    train(tmp_path / "parts", **settings)
    assert rates_of(tmp_path / "parts") == rates_of(tmp_path / "whole")
    whole, parts = read_weights(tmp_path / "whole"), read_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_skipped_updates_count_and_nothing_warns(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        train(tmp_path, updates=8, warmup_updates=4, lr_end=0.001, bad_updates=(0, 1, 5))
    course = Course(0.05, 8, 4, 0.001)
    assert rates_of(tmp_path) == pytest.approx([formula(course, step) for step in (2, 3, 4, 6, 7)])
