"""benchmarks/training_memory.py: what it counts without memory is what a real step takes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from core.config.schema import LatentGeometry
from core.config.sizes import EffnetSizes, GuidanceSizes, StageCSizes

sys.path.insert(0, str(ROOT / "benchmarks"))
from training_memory import (  # noqa: E402
    Job,
    LiveBytes,
    Memory,
    allocator_growth,
    autocast_as_on_cuda,
    count,
    estimate,
    prepare,
)

TOLERANCE = 0.03  # of the growth over what lies there before the step; kernels take a little for themselves
JOB = Job(
    side=192,  # a latent of 24 x 24
    stage_c=StageCSizes(c_cond=64, c_hidden=(64, 64), nhead=(2, 2), blocks=((1, 1), (1, 1))),
    guidance=GuidanceSizes(ind=64, ch=32, n_head=2, head_dim=16, n_groups=4, f_dim=32),
    effnet=EffnetSizes(stem=8, stages=(("fused", 1, 2, 16, 1), ("fused", 2, 2, 16, 1)), head=32),
    geometry=LatentGeometry(stride=8, lr_train_cells=4),
    text_encoder=1000,
)


@pytest.fixture(scope="module")
def estimates() -> dict[tuple[int, bool], Memory]:
    """To the byte, by the picture's side and whether levels are checkpointed."""
    keys = (192, True), (192, False), (384, True)
    return {k: estimate(replace(JOB, side=k[0], gradient_checkpointing=k[1]), granule=1) for k in keys}


def test_checkpointing_takes_less(estimates: dict[tuple[int, bool], Memory]) -> None:
    assert estimates[192, True].growth < 0.9 * estimates[192, False].growth


def test_memory_grows_with_the_pictures_pixels(estimates: dict[tuple[int, bool], Memory]) -> None:
    small, large = estimates[192, True], estimates[384, True]
    assert large.growth / small.growth == pytest.approx(4, rel=0.15)  # not 16: no pixels by pixels
    assert replace(large, peak=small.peak) == small


def test_weights_optimiser_and_gradients_are_those_of_the_networks(
    estimates: dict[tuple[int, bool], Memory],
) -> None:
    training, memory = prepare(JOB, "cpu"), estimates[192, True]
    trained = sum(p.numel() for p in training.module.parameters())
    encoder = sum(t.nbytes for t in training.effnet.state_dict().values())
    frozen = 2 * sum(p.numel() for p in training.module.stage_c.parameters()) + 2 * JOB.text_encoder
    assert memory.weights == 4 * trained + encoder + frozen
    assert memory.gradients == 4 * trained
    steps = 4 * len(training.optimizer.state)
    assert memory.optimiser == 8 * trained + steps


def test_tensors_with_data_take_the_same(estimates: dict[tuple[int, bool], Memory]) -> None:
    assert count(prepare(JOB, "cpu"), granule=1) == estimates[192, True]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_real_step_takes_what_was_counted(
    estimates: dict[tuple[int, bool], Memory], checkpointing: bool
) -> None:
    allocated = allocator_growth(replace(JOB, gradient_checkpointing=checkpointing))
    assert estimates[192, checkpointing].growth == pytest.approx(allocated, rel=TOLERANCE)


def test_attention_holds_no_matrix_of_pixels_by_pixels() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        q = torch.empty(1, 2, 4096, 16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert 4 * q.nbytes < live.peak < 4096 * 4096


def test_a_storage_counts_once_and_until_its_last_view_goes() -> None:
    with LiveBytes(granule=512) as live:
        x = torch.ones(1000)
        view = x[10:].view(2, -1)
        assert live.now == 4096
        del x
        assert live.now == 4096
        del view
        assert (live.now, live.peak) == (0, 4096)


def test_autocast_follows_cudas_lists_only_inside() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16)

    def dtypes() -> list[torch.dtype]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [
                F.layer_norm(x, (8,)),
                x.sum(),
                torch.addcmul(x, x, x.float()),
                F.linear(x, x),
                F.gelu(x),
            ]
        return [output.dtype for output in outputs]

    before = dtypes()
    with autocast_as_on_cuda():
        assert dtypes() == [torch.float32] * 3 + [torch.bfloat16] * 2
        assert F.layer_norm(x, (8,)).dtype == torch.bfloat16  # without autocast
    assert dtypes() == before and before[0] == torch.bfloat16
