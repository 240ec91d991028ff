"""Pictures that are made at once are those made alone: whatever steers them, and where memory is full."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import random_pipeline
from torch import Tensor

import core.pipeline.batches
from core.config.schema import stage_c_sizes
from core.config.settings import Job, Settings
from core.pipeline.batches import neighbours
from core.pipeline.control import Control
from core.pipeline.controls import SetControls
from core.pipeline.made import Pictures
from core.pipeline.offload import Offloaded
from core.pipeline.passes import Start
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Progress
from core.pipeline.sources import Source
from modules.controlnet import ControlNet

QUICK = Settings(steps=3, steps_b=2)
JOBS = [Job("a red house", 64, 96, 0), Job("a blue boat", 64, 96, 1, "fog"), Job("a fox", 96, 64, 2)]


@pytest.fixture(scope="module")
def pipeline(family_folder: Path) -> UltraPixelPipeline:
    pipeline = random_pipeline(family_folder)
    sizes = stage_c_sizes(pipeline.config_c)
    torch.manual_seed(0)
    network = ControlNet(c_in=1, c_proj=sizes.c_hidden[0], proj_blocks=(0, 1))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    held = Offloaded(lambda *_: network.eval(), pipeline._placement)
    pipeline.controls = SetControls(networks=(held,))
    return pipeline


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def controls() -> list[Control]:
    seen = [normal(1, 1, 64, 64, seed=i) for i in range(len(JOBS))]
    return [Control(one, torch.zeros(1, 64, 64), 1.0, end=0.3, hr=True) for one in seen]


def sources(kind: str) -> list[Source]:
    low = [(1, 16, 10, 15)] * 2 + [(1, 16, 15, 10)]
    high = [(1, 16, 6, 9)] * 2 + [(1, 16, 9, 6)]
    if kind == "guide":
        return [Source(guide=normal(*shape, seed=i)) for i, shape in enumerate(low)]
    return [Source(high=Start(normal(*shape, seed=i), 0.7)) for i, shape in enumerate(high)]


def latents(pictures: Pictures) -> list[list[Tensor]]:
    kept = [picture.latents for picture in pictures]
    return [[one.high, one.stage_b, *([] if one.low is None else [one.low.x0])] for one in kept]


def assert_close(found: list[list[Tensor]], wanted: list[list[Tensor]]) -> None:
    for these, those in zip(found, wanted, strict=True):
        for one, other in zip(these, those, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    ("settings", "steered"),
    [
        (QUICK, ""),
        (replace(QUICK, cfg=1.0, cfg_b=1.0, guidance_r="last_step"), ""),
        (replace(QUICK, cfg_interval=(0.3, 0.7), sampler="dpmpp_2m", reuse=2), ""),
        (replace(QUICK, sampler="heun", times="karras", cfg_lr=3.0, cfg_hr=1.0), "control"),
        (replace(QUICK, cfg_interval=(0.3, 0.7), guidance_unconditional=-2.0), "control"),
        (QUICK, "guide"),
        (QUICK, "high"),
    ],
)
def test_pictures_at_once_are_those_made_alone(
    pipeline: UltraPixelPipeline, settings: Settings, steered: str
) -> None:
    steering = {"control": {"controls": controls()}} if steered == "control" else {}
    steering = steering.get(steered) or ({"sources": sources(steered)} if steered else {})
    alone = latents(pipeline.run(JOBS, settings, **steering))
    together = pipeline.run(JOBS, settings, **steering, batch=9)
    assert [picture.job for picture in together] == JOBS
    assert_close(latents(together), alone)


def test_networks_see_so_many_pictures_at_once(
    pipeline: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, stage_c = [], pipeline.stage_c.module
    predict = stage_c.predict
    monkeypatch.setattr(stage_c, "predict", lambda x, *a, **k: sizes.append(len(x)) or predict(x, *a, **k))
    pipeline.run(JOBS, replace(QUICK, steps=1), batch=2)
    assert sizes == [4, 4, 2, 2]  # of both halves, by pass; the third picture has another size


def test_neighbours_of_one_kind_are_together() -> None:
    found = [(part.start, part.stop) for part in neighbours("aaabbab", 2)]
    assert found == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]


def test_an_observer_is_told_of_each_picture(pipeline: UltraPixelPipeline) -> None:
    seen: list[Progress] = []
    pipeline.run(JOBS[:2], QUICK, seen.append, batch=2)
    for stage, count in (("stage C, low resolution", 3), ("stage B", 2)):
        told = [progress for progress in seen if progress.stage == stage]
        assert [(p.step, p.job.seed) for p in told] == [(i + 1, s) for i in range(count) for s in (0, 1)]
        assert all(len(progress.latent) == 1 for progress in told)


def test_where_memory_is_full_the_batch_halves(
    pipeline: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [replace(JOBS[0], seed=seed) for seed in range(5)]
    alone = latents(pipeline.run(jobs, QUICK))
    seen: dict[str, list[int]] = {}

    def limited(name: str, work, most: int, *args, **named):
        noise = next(a for a in args if hasattr(a, "count") and hasattr(a, "draw"))
        seen.setdefault(name, []).append(noise.count)
        if noise.count > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return work(*args, **named)

    for name, most in (("high_resolution_pass", 2), ("stage_b_pass", 1)):
        work = getattr(core.pipeline.batches, name)
        monkeypatch.setattr(core.pipeline.batches, name, partial(limited, name, work, most))
    with pytest.warns(UserWarning) as told:
        together = latents(pipeline.run(jobs, QUICK, batch=4))
    assert [str(w.message) for w in told] == [
        "the device's memory is full in stage C: it goes on with 2 pictures at once",
        "the device's memory is full in stage B: it goes on with one picture at a time",
    ]
    assert seen == {"high_resolution_pass": [4, 2, 2, 1], "stage_b_pass": [2, 1, 1, 1, 1, 1]}
    assert_close(together, alone)
    pipeline._most = None


@pytest.mark.parametrize(("batch", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_a_batch_that_cannot_be_is_refused(pipeline: UltraPixelPipeline, batch, error) -> None:
    with pytest.raises(error, match="batch must be"):
        pipeline("a fox", 64, 64, batch=batch, progress=False)


def test_the_cfg_of_each_pass_is_its_own() -> None:
    both, own = Settings(cfg=4.0), Settings(cfg=4.0, cfg_lr=2.0, cfg_hr=1.0)
    assert both.cfg_low == both.cfg_high
    assert (own.cfg_low.weight, own.cfg_high.weight) == (2.0, 1.0)
    for name in ("cfg_lr", "cfg_hr"):
        with pytest.raises(ValueError, match=f"{name} must be a number from 0 up, not -1"):
            Settings(**{name: -1.0})
    with pytest.raises(ValueError, match="'exponential' is not one of uniform, karras"):
        Settings(times="exponential")
    assert asdict(own)["cfg_lr"] == 2.0
    assert Settings(times="karras").extra_guidance_r == 0.05  # its last step has another noise level


def test_the_halves_follow_the_cfg_of_each_pass(
    pipeline: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, stage_c = [], pipeline.stage_c.module
    predict = stage_c.predict
    monkeypatch.setattr(stage_c, "predict", lambda x, *a, **k: sizes.append(len(x)) or predict(x, *a, **k))
    pipeline.run(JOBS[:1], replace(QUICK, cfg_lr=2.0, cfg_hr=1.0))
    assert sizes == [2, 2, 2, 1, 1, 1]
    sizes.clear()
    interval = replace(QUICK, steps=4, cfg_interval=(0.44, 0.48))  # none of the steps from 1 on lies within
    begun = Source(high=Start(normal(1, 16, 6, 9, seed=0), 0.9))
    pipeline.run(JOBS[:1], interval, sources=[begun])
    assert sizes == [1] * 4 + [1, 1, 2, 1]
