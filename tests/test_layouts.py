"""The published layout of guidance: round trips, names of the real file; and recognising a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.weights.layouts import (
    UNKNOWN,
    describe_mismatch,
    from_published_guidance,
    guidance_names,
    identify,
    to_published_guidance,
)
from modules.guidance import Guidance
from modules.stage_c import StageC

BLOCKS = ((1, 2), (2, 1))
IDENTITIES = {
    "stage_c_3.6b": "Stage C 3.6B",
    "stage_c_1b": "Stage C 1B",
    "stage_b_3b": "Stage B 3B",
    "stage_b_700m": "Stage B 700M",
    "stage_a": "Stage A",
    "previewer": "the previewer",
    "effnet_encoder": "the EfficientNet encoder",
    "controlnet_canny": "the canny ControlNet",
    "controlnet_inpainting": "the inpainting ControlNet",
    "controlnet_super_resolution": "the super resolution ControlNet",
    "ultrapixel_t2i": "guidance for Stage C 3.6B",
    "lora_personalized": "a LoRA",
}


def read_manifest(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((folder / "manifests" / f"{name}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in tensors.items()}


def on_meta(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def guidance() -> dict[str, Tensor]:
    module = Guidance(ind=8, ch=8, n_head=2, head_dim=4, n_groups=2, f_dim=8)
    module.init_weights()
    return module.state_dict()


# --- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_res_blocks", [6, 9, 64, 99])
def test_guidance_comes_back_from_the_published_layout(
    guidance: dict[str, Tensor], n_res_blocks: int
) -> None:
    assert_same(from_published_guidance(to_published_guidance(guidance, n_res_blocks)), guidance)


def test_unused_guidance_tensors_are_written_as_zeros(guidance: dict[str, Tensor]) -> None:
    published = to_published_guidance(guidance, 64)
    added = {
        name: t for name, t in published.items() if ".hr_norm.alpha." in name or ".hr_norm.gamma." in name
    }
    assert len(added) == 16 and len(published) == len(guidance) + 16
    assert not any(tensor.any() for tensor in added.values())
    assert published["module.65.1.hr_norm.gamma.weight"].shape == (8, 8, 1, 1)


def test_the_published_guidance_file_has_exactly_our_tensors(reference_folder: Path) -> None:
    with torch.device("meta"):
        own = Guidance().state_dict()
    published = read_manifest(reference_folder, "ultrapixel_t2i")
    assert shapes_of(from_published_guidance(on_meta(published))) == shapes_of(own)
    assert shapes_of(to_published_guidance(own, 64)) == published


def test_the_lower_number_is_the_way_down_as_a_number() -> None:
    names = guidance_names(["module.100.0.wtokens", "module.99.1.wtokens"])
    assert names == {"module.99.1.wtokens": "down.1.wtokens", "module.100.0.wtokens": "up.0.wtokens"}


@pytest.mark.parametrize("down, up", [("agg_net", "agg_net_up"), ("64", "65"), ("down", "up")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_all_spellings_of_guidance_are_read(
    guidance: dict[str, Tensor], down: str, up: str, prefix: str
) -> None:
    spelt = {}
    for name, tensor in guidance.items():
        side, _, rest = name.partition(".")
        spelt[f"{prefix}{down if side == 'down' else up}.{rest}"] = tensor
    assert_same(from_published_guidance(spelt), guidance)


def test_names_of_other_networks_stay_for_the_strict_loading_to_report() -> None:
    names = ["clf.1.weight", "down_blocks.0.0.depthwise.weight", "module.3.lora_down", "66.0.wtokens"]
    assert guidance_names([*names, "64.0.wtokens", "65.0.wtokens"]) == {
        **{name: name for name in names},
        "64.0.wtokens": "down.0.wtokens",
        "65.0.wtokens": "up.0.wtokens",
    }


def test_exporting_something_else_as_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match="'clf.1.weight' is no guidance tensor"):
        to_published_guidance({"clf.1.weight": torch.ones(1)}, 64)


# --- which network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_published_file_is_recognised(reference_folder: Path, name: str, prefix: str) -> None:
    shapes = {
        prefix + key.removeprefix("module."): s for key, s in read_manifest(reference_folder, name).items()
    }
    assert identify(shapes) == IDENTITIES[name]


def test_every_manifest_is_covered(reference_folder: Path) -> None:
    assert {path.stem for path in (reference_folder / "manifests").glob("*.json")} == set(IDENTITIES)


def test_other_sizes_are_recognised_by_their_width(guidance: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        small = StageC(c_hidden=(8, 8), nhead=(1, 1), blocks=BLOCKS).state_dict()
    assert identify(shapes_of(small)) == "Stage C of width 8"
    assert identify(shapes_of(guidance)) == "guidance for Stage C of width 8"
    assert identify({"prior.clf.1.lora_A.weight": (4, 8)}) == "a LoRA"
    assert (
        identify({"projections.0.0.weight": (3, 3, 1, 1), "backbone.0.weight": (12, 3, 3, 3)})
        == "a ControlNet"
    )
    assert identify({"weight": (3, 3)}) == identify({}) == UNKNOWN


@pytest.mark.parametrize(
    "found, wanted, message",
    [
        (
            "Stage C 1B", "Stage C 3.6B",
            "is Stage C 1B, but the 3.6B model was asked for: set model_version: 1B or give the 3.6B file",
        ),
        (
            "Stage B 3B", "Stage B 700M",
            "is Stage B 3B, but the 700M model was asked for: set model_version: 3B or give the 700M file",
        ),
        (
            "Stage B 700M", "Stage C 3.6B",
            "is Stage B 700M, but Stage C 3.6B was asked for: correct the path or the configuration",
        ),
        (
            "Stage C of width 8", "Stage C 1B",
            "is Stage C of width 8, but Stage C 1B was asked for: correct the path or the configuration",
        ),
    ],
)  # fmt: skip
def test_mismatches_say_the_way_out(found: str, wanted: str, message: str) -> None:
    assert describe_mismatch(found, wanted) == message
