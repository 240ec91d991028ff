"""Recorded steps, with a stand-in for CUDA graphs: the function, run again in the same memory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import random_pipeline
from peers import random_stage_c
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from core.config.settings import Job, Settings
from core.pipeline.graphs import LowPassGraphs, Outputs
from core.pipeline.pipeline import UltraPixelPipeline
from modules.lora import LoraUpdate, MergedLora
from modules.stage_c import StageC

QUICK = Settings(steps=3, steps_b=1, cfg_interval=(0.5, 1.0))


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
    graphs, times = LowPassGraphs(recorder), stage_c.pass_times(torch.tensor([0.9, 0.5, 0.1]))
    control = [torch.randn(1, 32, 4, 4), None, torch.randn(1, 32, 2, 2)]
    kept = []
    for batch, side, entries in ((2, 4, None), (2, 4, None), (1, 4, None), (2, 3, None), (2, 4, control)):
        x, held = inputs(stage_c, batch, side)
        for i in range(3):
            one = graphs.for_pass(stage_c, x.device).step(stage_c, x, times.at(i), held, entries)
            wanted = stage_c.predict_with_features(x, times.at(i), held, control=entries)
            assert torch.equal(one[0], wanted[0])
            assert all(torch.equal(a, b) for a, b in zip(one[1].maps, wanted[1].maps, strict=True))
            kept.append((one[0], wanted[0]))
    assert all(torch.equal(a, b) for a, b in kept)  # a later step overwrites no earlier prediction
    assert (recorder.recorded, recorder.replayed) == (4, 15)


@torch.no_grad()
def test_recordings_follow_the_weights(stage_c: StageC, recorder: Recorder) -> None:
    graphs, times = LowPassGraphs(recorder), stage_c.pass_times(torch.tensor([0.5]))
    x, held = inputs(stage_c, 2)

    def step():
        return graphs.for_pass(stage_c, x.device).step(stage_c, x, times.at(0), held, None)[0]

    before = step()
    name = "down_blocks.0.2.attention.attn.in_proj_weight"
    merged = MergedLora(stage_c, {name: LoraUpdate(torch.randn(2, 32), torch.randn(96, 2))})
    assert not torch.equal(step(), before) and recorder.recorded == 1  # merged in place
    merged.undo()
    assert torch.equal(step(), before) and recorder.recorded == 1
    weight = stage_c.get_parameter(name)
    weight.data = weight.data.clone()  # moved
    assert torch.equal(step(), before) and recorder.recorded == 2
    graphs.clear()
    assert torch.equal(step(), before) and recorder.recorded == 3


def test_weights_elsewhere_are_not_recorded(stage_c: StageC, recorder: Recorder) -> None:
    stage_c.clf.to("meta")
    assert LowPassGraphs(recorder).for_pass(stage_c, torch.device("cpu")) is None


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_gpu_without_a_number_is_the_current_one(recorder: Recorder) -> None:
    with FakeTensorMode():
        there = nn.ParameterList([torch.empty(1, device="cuda")])  # on cuda:0
    for name, found in {"cuda": True, "cuda:0": True, "cuda:1": False, "cpu": False}.items():
        assert (LowPassGraphs(recorder).for_pass(there, torch.device(name)) is not None) == found


@torch.no_grad()
def test_a_failed_recording_costs_a_warning(stage_c: StageC) -> None:
    def failing(_) -> Outputs:
        raise RuntimeError("no capture here")

    graphs, times = LowPassGraphs(failing), stage_c.pass_times(torch.tensor([0.5]))
    x, held = inputs(stage_c, 1)
    with pytest.warns(UserWarning, match="no capture here"):
        found = graphs.step(stage_c, x, times.at(0), held, None)[0]
    assert torch.equal(found, stage_c.predict(x, times.at(0), held))
    assert graphs.for_pass(stage_c, x.device) is None


def test_pictures_by_recordings_are_the_same(family_folder: Path, recorder: Recorder) -> None:
    plain, recorded = (random_pipeline(family_folder) for _ in range(2))
    graphs = LowPassGraphs(recorder)
    recorded._recordings = lambda: nullcontext(graphs)
    jobs = [Job("a house", 256, 256, seed) for seed in (1, 2)]
    pictures = [pipeline.run(jobs, QUICK) for pipeline in (plain, recorded)]
    for one, other in zip(*pictures, strict=True):
        torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-5)
    assert recorder.recorded == 2 and recorder.replayed == 6  # with and without cfg


def test_plain_pipelines_use_pytorchs_operators_alone(family_folder: Path) -> None:
    pipeline = random_pipeline(family_folder)
    assert isinstance(pipeline, UltraPixelPipeline) and not pipeline.plain
    job = Job("a house", 256, 256, 1)
    settings = Settings(steps=1, steps_b=1)
    fast = pipeline.run([job], settings)[0].pixels
    pipeline.plain = True
    torch.testing.assert_close(pipeline.run([job], settings)[0].pixels, fast, rtol=0, atol=1 / 255)
    assert pipeline.stage_c.module.plain and pipeline.stage_b.module.plain
    with pipeline._recordings() as graphs:
        assert graphs is None
