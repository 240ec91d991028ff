"""Other devices than NVIDIA's cards and the CPU, none of which is here: one is faked, AMD's is only told."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from fake_device import fake_device

from core.devices import device_named
from core.pipeline import offload
from core.pipeline.graphs import PassRecordings
from core.pipeline.passes import tensor_float32
from core.pipeline.pipeline import UltraPixelPipeline
from modules import fp8
from modules.blocks import PLAIN
from modules.fp8 import computes_in_fp8
from modules.operators import of_nvidia, operators_for

PROMPT = "a red house by the sea"
ASKED = {"height": 128, "width": 128, "seed": 5, "steps": 1, "steps_b": 1, "progress": False}
CUDA, MPS = torch.device("cuda"), torch.device("mps")


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch finds a GPU of Apple's; what is loaded ahead is loaded at once, as the fake has one thread."""

    def at_once(work: Callable[[], Any]) -> Future:
        future: Future = Future()
        future.set_result(work())
        return future

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(offload, "_in_thread", at_once)


@pytest.fixture(scope="module")
def on_cpu() -> torch.Tensor:
    return UltraPixelPipeline.from_preset("tiny", "cpu")(PROMPT, **ASKED)[0].pixels


@pytest.mark.parametrize("mode", ["none", "stage", "block"])
def test_apples_gpu_makes_the_same_picture(apple: None, on_cpu: torch.Tensor, mode: str) -> None:
    """No call that is CUDA's own is on the way; with tiles the last copies go from device to host."""
    with fake_device("mps") as device:
        pipeline = UltraPixelPipeline.from_preset("tiny", "mps", offload=mode, dtype="bfloat16")
        made = pipeline(PROMPT, stage_a_tiled=mode != "none", **ASKED)[0].pixels
    assert torch.allclose(made, on_cpu, atol=1e-4)
    assert {"conv2d", "scaled_dot_product_attention", "layer_norm"} <= device.functions
    assert (pipeline.config_c.dtype, pipeline.config_b.dtype) == ("float32", "float32")


def test_apples_gpu_has_no_float8(apple: None, on_cpu: torch.Tensor) -> None:
    with fake_device("mps"), pytest.warns(UserWarning, match="fp8 does not go with the device mps"):
        made = UltraPixelPipeline.from_preset("tiny", "mps")(PROMPT, fp8="on", **ASKED)[0].pixels
    assert torch.allclose(made, on_cpu, atol=1e-4)


def test_the_fake_tells_devices_apart() -> None:
    """As otherwise it would find nothing."""
    with fake_device("mps"):
        there, here = torch.ones(2, device="mps"), torch.ones(2)
        assert (there * 2).device.type == "mps" and (there * 2).cpu().tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="one is on the CPU"):
            there * here


def test_apples_gpu_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'mps' is not there .*: use cpu"):
        device_named("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_named("mps") == MPS and device_named(None).type != "mps"
    with pytest.raises(ValueError, match="'xpu' is not supported: use cpu, cuda, cuda:N or mps"):
        device_named("xpu")


def test_amds_cards_get_nothing_that_is_for_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch calls both cuda, and AMD's tell numbers of their own as the capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    monkeypatch.setattr(fp8, "_tried", lambda _: True)
    assert of_nvidia(CUDA) and computes_in_fp8(CUDA) and not of_nvidia(MPS)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not of_nvidia(CUDA) and not computes_in_fp8(CUDA)
    with torch.device("meta"):
        x = torch.empty(1, 64, 64, 64, dtype=torch.bfloat16)
    assert operators_for(x) is PLAIN
    pipeline = UltraPixelPipeline.from_preset("tiny", "cpu")
    pipeline.device = CUDA
    with pipeline._recordings() as recordings:
        assert recordings == PassRecordings()
    with tensor_float32(of_nvidia(CUDA)):
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
