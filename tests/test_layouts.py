"""Published layouts of guidance and LoRA: round trips, names of the real files, and recognising a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from core.layouts import (
    UNKNOWN,
    attention_lora_order,
    describe_mismatch,
    from_published_guidance,
    from_published_lora,
    guidance_names,
    identify,
    lora_names,
    to_published_guidance,
    to_published_lora,
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


@pytest.fixture(scope="module")
def lora() -> dict[str, Tensor]:
    tensors = {"tokens.embeddings": torch.rand(1, 12), "tokens.indices": torch.tensor([49408])}
    for weight in attention_lora_order(BLOCKS):
        tensors |= {f"{weight}.lora_down": torch.rand(2, 6), f"{weight}.lora_up": torch.rand(6, 2)}
    return tensors


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


# --- LoRA -----------------------------------------------------------------------------------------


def test_the_published_order_of_lora_updates(reference_folder: Path) -> None:
    manifest = json.loads((reference_folder / "manifests" / "lora_personalized.json").read_text())
    assert attention_lora_order(((8, 24), (24, 8))) == manifest["targets"]
    with safe_open(reference_folder / "lora_stage_c.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    assert attention_lora_order(config["stage_c"]["blocks"]) == config["order"]


def test_lora_order_names_weights_of_stage_c() -> None:
    with torch.device("meta"):
        names = set(StageC(c_hidden=(8, 8), nhead=(1, 1), blocks=BLOCKS).state_dict())
    attention = {name for name in names if name.endswith(("attn.in_proj_weight", "attn.out_proj.weight"))}
    assert set(attention_lora_order(BLOCKS)) == attention


def test_the_published_lora_file_is_translated_both_ways(reference_folder: Path) -> None:
    published = on_meta(read_manifest(reference_folder, "lora_personalized"))
    order = attention_lora_order(((8, 24), (24, 8)))
    own = from_published_lora(published, order)
    assert own["down_blocks.0.2.attention.attn.in_proj_weight.lora_up"].shape == (6144, 4)
    assert own["tokens.embeddings"].shape == (1, 1280)
    assert shapes_of(to_published_lora(own, order)) == shapes_of(published)


def test_lora_comes_back_from_the_published_layout(lora: dict[str, Tensor]) -> None:
    order = attention_lora_order(BLOCKS)
    published = to_published_lora(lora, order)
    assert published["module.0.lora_down"] is lora["down_blocks.0.2.attention.attn.out_proj.weight.lora_down"]
    assert published["module.12.indices"] is lora["tokens.indices"]
    assert_same(from_published_lora(published, order), lora)
    bare = {name.removeprefix("module."): tensor for name, tensor in published.items()}
    assert_same(from_published_lora(bare, order), lora)


def test_own_layout_and_parts_of_a_lora_are_read_as_they_are(lora: dict[str, Tensor]) -> None:
    order = attention_lora_order(BLOCKS)
    assert_same(from_published_lora(lora, order), lora)
    tokens = {name: lora[f"tokens.{name}"] for name in ("embeddings", "indices")}
    read = from_published_lora({f"module.12.{name}": tensor for name, tensor in tokens.items()}, order)
    assert_same(read, {f"tokens.{name}": tensor for name, tensor in tokens.items()})


@given(blocks=st.tuples(*[st.tuples(*[st.integers(1, 9)] * 2)] * 2))
def test_a_lora_of_another_size_is_refused(blocks: tuple[tuple[int, int], tuple[int, int]]) -> None:
    order, other = attention_lora_order(blocks), attention_lora_order(BLOCKS)
    names = [f"module.{i}.lora_{way}" for i in range(len(order)) for way in ("down", "up")]
    if len(order) == len(other):
        assert len(lora_names(names, other)) == len(names)
    else:
        with pytest.raises(ValueError, match=f"for {len(order)} weights, but this model takes 12"):
            lora_names(names, other)


def test_a_lora_with_a_gap_is_refused(lora: dict[str, Tensor]) -> None:
    order = attention_lora_order(BLOCKS)
    published = to_published_lora(lora, order)
    without_up = {name: t for name, t in published.items() if name != "module.3.lora_up"}
    with pytest.raises(ValueError, match="lora_down of .*in_proj_weight without lora_up"):
        from_published_lora(without_up, order)
    with pytest.raises(ValueError, match="'weights.0.lora.down', of another layout"):
        from_published_lora({"weights.0.lora.down": torch.ones(1)}, order)


def test_a_lora_that_the_published_layout_cannot_hold_is_refused(lora: dict[str, Tensor]) -> None:
    order = attention_lora_order(BLOCKS)
    last = {name: t for name, t in lora.items() if not name.startswith(order[-1])}
    with pytest.raises(ValueError, match=f"each of 12 weights; 1 have none, the first {order[-1]}"):
        to_published_lora(last, order)
    stray = {"clf.1.weight.lora_down": torch.ones(1, 1), "clf.1.weight.lora_up": torch.ones(1, 1)}
    with pytest.raises(ValueError, match="no place for 'clf.1.weight.lora_down'"):
        to_published_lora({**lora, **stray}, order)


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


def test_other_sizes_are_recognised_by_their_width(
    guidance: dict[str, Tensor], lora: dict[str, Tensor]
) -> None:
    with torch.device("meta"):
        small = StageC(c_hidden=(8, 8), nhead=(1, 1), blocks=BLOCKS).state_dict()
    assert identify(shapes_of(small)) == "Stage C of width 8"
    assert identify(shapes_of(guidance)) == "guidance for Stage C of width 8"
    assert identify(shapes_of(lora)) == "a LoRA"
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
