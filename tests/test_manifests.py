"""At full size every network has the published tensors: names and shapes, on the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from core.config.sizes import STAGE_B_VERSIONS, STAGE_C_VERSIONS
from core.weights.layouts import to_published_guidance
from modules.controlnet import ControlNet
from modules.effnet import EfficientNetEncoder
from modules.guidance import Guidance
from modules.previewer import Previewer
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "stage_c_3.6b": lambda: StageC(**asdict(STAGE_C_VERSIONS["3.6B"])),
    "stage_c_1b": lambda: StageC(**asdict(STAGE_C_VERSIONS["1B"])),
    "stage_b_3b": lambda: StageB(**asdict(STAGE_B_VERSIONS["3B"])),
    "stage_b_700m": lambda: StageB(**asdict(STAGE_B_VERSIONS["700M"])),
    "stage_a": StageA,
    "previewer": Previewer,
    "effnet_encoder": EfficientNetEncoder,
    "controlnet_canny": lambda: ControlNet(c_in=1),
    "controlnet_inpainting": lambda: ControlNet(c_in=4),
    "controlnet_super_resolution": lambda: ControlNet(c_in=16, bottleneck_mode="large"),
}


def manifest(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((folder / "manifests" / f"{name}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in tensors.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_the_published_ones(reference_folder: Path, name: str) -> None:
    with torch.device("meta"):
        network = NETWORKS[name]()
    assert {key: tuple(t.shape) for key, t in network.state_dict().items()} == manifest(
        reference_folder, name
    )


def test_the_guidance_exports_to_the_published_names(reference_folder: Path) -> None:
    with torch.device("meta"):
        guidance = Guidance()
    exported = to_published_guidance(guidance.state_dict(), 64)
    assert {key: tuple(t.shape) for key, t in exported.items()} == manifest(
        reference_folder, "ultrapixel_t2i"
    )


def test_the_guidance_adds_less_than_three_percent() -> None:
    with torch.device("meta"):
        added, base = (
            sum(p.numel() for p in net().parameters()) for net in (Guidance, NETWORKS["stage_c_3.6b"])
        )
    assert added / base < 0.03
