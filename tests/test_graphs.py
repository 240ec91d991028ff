"""Recorded steps, with a stand-in for CUDA graphs: the function, run again in the same memory."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import random_pipeline
from peers import random_stage_c
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from core.config.settings import Job, Settings
from core.pipeline import graphs
from core.pipeline.graphs import Outputs, PassRecordings, Recordings
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.steps import low_step
from modules.lora import LoraUpdate, MergedLora
from modules.stage_c import StageC

QUICK = Settings(steps=3, steps_b=1, cfg_interval=(0.5, 1.0), guidance_unconditional=-2.0)


class Recorder:
    """Records as a graph does: what is replayed reads and writes the memory of the recording alone."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function):
        self.recorded += 1
        outputs = tuple(torch.empty_like(t) for t in function())

        def replay() -> None:
            self.replayed += 1
            for place, value in zip(outputs, function(), strict=True):
                place.copy_(value)

        return replay, outputs


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def stage_c() -> StageC:
    torch.manual_seed(0)
    return random_stage_c(c=32, heads=2, blocks=((1, 1), (1, 1)))


def inputs(stage_c: StageC, batch: int, side: int = 4):
    text = torch.randn(batch, 7, 48), torch.randn(batch, 1, 48), torch.randn(batch, 1, 32)
    return torch.randn(batch, 16, side, side), stage_c.prepare(*text)


@torch.no_grad()
def test_replayed_steps_are_those_of_the_network(stage_c: StageC, recorder: Recorder) -> None:
    made, times = Recordings(9, recorder), stage_c.pass_times(torch.tensor([0.9, 0.5, 0.1]))
    control = [torch.randn(1, 32, 4, 4), None, torch.randn(1, 32, 2, 2)]
    step = partial(low_step, stage_c)
    for batch, side, entries in ((2, 4, None), (2, 4, None), (1, 4, None), (2, 3, None), (2, 4, control)):
        x, held = inputs(stage_c, batch, side)
        for i in range(3):
            got = made.for_pass(x.device, stage_c).run(step, (x, times.at(i)), (held, entries))
            wanted = step((x, times.at(i)), (held, entries))
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    # Of each shape the first step is run as it is.
    assert (recorder.recorded, recorder.replayed) == (4, 11)


@torch.no_grad()
def test_recordings_follow_the_weights(stage_c: StageC, recorder: Recorder) -> None:
    made, times = Recordings(9, recorder), stage_c.pass_times(torch.tensor([0.5]))
    x, held = inputs(stage_c, 2)

    def step():
        here, function = made.for_pass(x.device, stage_c), partial(low_step, stage_c)
        return here.run(function, (x, times.at(0)), (held, None))[0].clone()

    before = step()
    assert torch.equal(step(), before) and recorder.recorded == 1
    name = "down_blocks.0.2.attention.attn.in_proj_weight"
    merged = MergedLora(stage_c, {name: LoraUpdate(torch.randn(2, 32), torch.randn(96, 2))})
    assert not torch.equal(step(), before) and recorder.recorded == 1  # merged in place
    merged.undo()
    assert torch.equal(step(), before) and recorder.recorded == 1
    weight = stage_c.get_parameter(name)
    weight.data = weight.data.clone()  # moved
    assert torch.equal(step(), before) and recorder.recorded == 2
    made.clear()
    assert torch.equal(step(), before) and recorder.recorded == 3


def test_the_last_ones_used_are_kept(recorder: Recorder) -> None:
    made = Recordings(2, recorder)

    def run(count: int) -> None:
        (doubled,) = made.run(lambda x, _: (2 * x,), torch.ones(count), None)
        assert torch.equal(doubled, torch.full((count,), 2.0))

    for count, recorded in ((1, 0), (1, 1), (2, 1), (2, 2), (1, 2), (3, 2), (3, 3), (1, 3), (2, 4)):
        run(count)
        assert recorder.recorded == recorded


def test_each_thread_runs_a_step_as_it_is_first(recorder: Recorder) -> None:
    made, x = Recordings(9, recorder), torch.ones(3)

    def run() -> None:
        made.run(lambda x, _: (2 * x,), x, None)

    run()
    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert recorder.recorded == 0
    run()
    assert recorder.recorded == 1


def test_what_is_no_tensor_is_a_part_of_the_shape(recorder: Recorder) -> None:
    made, x = Recordings(9, recorder), torch.ones(3)
    for factor in (2.0, 2.0, 3.0, 3.0, 2.0):
        (product,) = made.run(lambda x, held: (held[0] * x,), x, [factor, None])
        assert torch.equal(product, factor * x)
    assert recorder.recorded == 2


def test_weights_elsewhere_are_not_recorded(stage_c: StageC, recorder: Recorder) -> None:
    stage_c.clf.to("meta")
    assert Recordings(9, recorder).for_pass(torch.device("cpu"), stage_c) is None


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_gpu_without_a_number_is_the_current_one(recorder: Recorder) -> None:
    with FakeTensorMode():
        there = nn.ParameterList([torch.empty(1, device="cuda")])  # on cuda:0
    for name, found in {"cuda": True, "cuda:0": True, "cuda:1": False, "cpu": False}.items():
        assert (Recordings(9, recorder).for_pass(torch.device(name), there) is not None) == found


def test_a_failed_recording_costs_a_warning(stage_c: StageC) -> None:
    def failing(_) -> Outputs:
        raise RuntimeError("no capture here")

    def doubled(x: torch.Tensor, _) -> Outputs:
        assert sys.exc_info()[0] is None  # an error would hold the memory of what failed
        return (2 * x,)

    made, x = Recordings(9, failing), torch.ones(3)
    made.run(doubled, x, None)
    with pytest.warns(UserWarning, match="no capture here"):
        (found,) = made.run(doubled, x, None)
    assert torch.equal(found, 2 * x) and made.for_pass(x.device, stage_c) is None
    assert torch.equal(made.run(lambda x, _: (2 * x,), x, None)[0], 2 * x)


# One size with cfg in all steps and in some, several pictures at once, a control that ends, other settings.
@pytest.mark.parametrize(("settings", "at_once", "recorded", "replayed"), [
    (QUICK, 1, 5, 9),
    (Settings(steps=4, steps_b=3), 1, 3, 19),
    (Settings(steps=3, steps_b=2, sampler="heun"), 2, 3, 9),
    (Settings(steps=3, steps_b=3, reuse=2), 1, 2, 10),
    (Settings(steps=3, steps_b=3, fp8="on"), 1, 1, 5),
])  # fmt: skip
def test_pictures_by_recordings_are_the_same(
    family_folder: Path, recorder: Recorder, settings: Settings, at_once: int, recorded: int, replayed: int
) -> None:
    plain, by_recordings = (random_pipeline(family_folder) for _ in range(2))
    kept = PassRecordings.of_all(recorder)
    by_recordings._recordings = lambda: nullcontext(kept)
    jobs = [Job("a house", 256, 256, seed) for seed in (1, 2)]
    pictures = [pipeline.run(jobs, settings, batch=at_once) for pipeline in (plain, by_recordings)]
    for one, other in zip(*pictures, strict=True):
        torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-5)
    assert (recorder.recorded, recorder.replayed) == (recorded, replayed)


@pytest.mark.parametrize(("pixels", "at_once"), [(256 * 256 - 1, 1), (2 * 256 * 256 - 1, 2)])
def test_large_pictures_and_many_at_once_are_not_recorded(
    family_folder: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, pixels: int, at_once: int
) -> None:
    monkeypatch.setattr(graphs, "RECORDED_PIXELS", pixels)
    pipeline, kept = random_pipeline(family_folder), PassRecordings.of_all(recorder)
    pipeline._recordings = lambda: nullcontext(kept)
    jobs = [Job("a house", 256, 256, seed) for seed in range(at_once)]
    pipeline.run(jobs, Settings(steps=3, steps_b=3), batch=at_once)
    assert recorder.recorded == 1  # the low-resolution step


def test_plain_pipelines_use_pytorchs_operators_alone(family_folder: Path) -> None:
    pipeline = random_pipeline(family_folder)
    assert isinstance(pipeline, UltraPixelPipeline) and not pipeline.plain
    job = Job("a house", 256, 256, 1)
    settings = Settings(steps=1, steps_b=1)
    fast = pipeline.run([job], settings)[0].pixels
    pipeline.plain = True
    torch.testing.assert_close(pipeline.run([job], settings)[0].pixels, fast, rtol=0, atol=1 / 255)
    assert pipeline.stage_c.module.plain and pipeline.stage_b.module.plain
    with pipeline._recordings() as recordings:
        assert recordings == PassRecordings()
