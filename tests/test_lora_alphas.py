"""The alpha of a LoRA whose tensors do not hold it: found where files have it, or refused; never guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_lora_files import SIZES
from torch import Tensor

from core.weights.checkpoint import CheckpointError
from core.weights.lora.files import write_lora
from core.weights.lora.names import published_orders, stage_c_weights
from core.weights.lora.reading import read_lora

RANK = 4
FIRST, OTHER = "down_blocks.0.2.attention", "up_blocks.1.2.attention"
DIFFUSERS = (f"{FIRST}.to_out.0", f"{OTHER}.to_out.0")
COMFYUI = (f"{FIRST}.attn.out_proj", f"{OTHER}.attn.out_proj")
FLAT = tuple(name.replace(".", "_") for name in COMFYUI)
WEIGHTS = tuple(f"{name}.weight" for name in COMFYUI)
TEXT = "text_model.encoder.layers.0.mlp.fc1"


def pair(base: str, alpha: Tensor | None = None, rank: int = RANK, width: int = 8) -> dict[str, Tensor]:
    down, up = torch.ones(rank, width), torch.ones(width, rank)
    tensors = {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
    return tensors if alpha is None else {**tensors, f"{base}.alpha": alpha.clone()}


def layers(prefix: str, names: tuple[str, ...] = DIFFUSERS, **options: Any) -> dict[str, Tensor]:
    return {key: tensor for name in names for key, tensor in pair(prefix + name, **options).items()}


def write(
    folder: Path, tensors: Mapping[str, Tensor], metadata: object = None, adapter: object = None
) -> Path:
    """A file whose metadata may hold more than texts, and a configuration of peft beside it."""
    path = folder / "lora.safetensors"
    save_file(dict(tensors), path)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.dumps({**json.loads(whole[8:end]), "__metadata__": metadata or {}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
    if adapter is not None:
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return path


def scales(path: Path) -> list[float]:
    updates = read_lora(path, SIZES).updates
    assert tuple(updates) == WEIGHTS
    return [round(update.scale, 4) for update in updates.values()]


def entry(**values: Any) -> dict[str, str]:
    """As diffusers and SimpleTuner write it."""
    return {"lora_adapter_metadata": json.dumps({key.replace("__", "."): v for key, v in values.items()})}


PEFT = {"r": RANK, "lora_alpha": 16}
TO_OUT = {"to_out.0": 8}
BY_LAYER = {COMFYUI[0]: 2, COMFYUI[1]: 16}
CONVOLUTIONS = {"conv_dim": "2", "conv_alpha": "1"}
FOUND = {
    "diffusers, a component": ("prior.", entry(prior__r=4, prior__lora_alpha=16), [4, 4]),
    "another component": ("unet.", entry(transformer__r=4, transformer__lora_alpha=16), [4, 4]),
    "transformer": ("transformer.", entry(transformer__r=4, transformer__lora_alpha=16), [4, 4]),
    "diffusers, a model": ("", entry(**PEFT, use_dora=False, use_rslora=False, alpha_pattern={}), [4, 4]),
    "peft's names": ("base_model.model.", entry(**PEFT), [4, 4]),
    "rsLoRA": ("prior.", entry(prior__r=4, prior__lora_alpha=16, prior__use_rslora=True), [8, 8]),
    "patterns": ("prior.", entry(**PEFT, alpha_pattern={f"{FIRST}.to_out.0": 2}), [0.5, 4]),
    "patterns of a component": (
        "prior.", entry(prior__r=4, prior__lora_alpha=16, prior__alpha_pattern=TO_OUT), [2, 2],
    ),
    "anchored": ("prior.", entry(**PEFT, alpha_pattern={f"^{FIRST}.to_out.0": 2}), [0.5, 4]),
    "patterns of ranks": ("", entry(r=9, lora_alpha=16, rank_pattern={"to_out.0": 4}), [4, 4]),
    "by components": (
        "", entry(prior__r=4, prior__lora_alpha=16, text_encoder__r=4, text_encoder__lora_alpha=2), [4, 4],
    ),
    "its own component first": ("prior.", entry(prior__lora_alpha=16, unet__lora_alpha=2), [4, 4]),
    "nested": ("prior.", {"lora_adapter_metadata": {"prior": PEFT}}, [4, 4]),
    "no text": ("prior.", {"lora_adapter_metadata": {**PEFT, "lora_alpha": 16.0}}, [4, 4]),
    "flat": ("", {"lora_alpha": "16", "r": "4"}, [4, 4]),
    "flat, a component": ("prior.", {"prior.lora_alpha": "16.0", "prior.r": "4"}, [4, 4]),
    "flat numbers": ("prior.", {"lora_alpha": 16, "rank": 4}, [4, 4]),
    "flat rsLoRA": ("prior.", {"lora_alpha": "16", "use_rslora": "True"}, [8, 8]),
    "flat patterns": ("prior.", {"lora_alpha": "16", "alpha_pattern": json.dumps(TO_OUT)}, [2, 2]),
    "alpha": ("prior.", {"alpha": " 16 "}, [4, 4]),
    "by layer": ("prior.", {f"prior.{DIFFUSERS[0]}.alpha": "2", "alpha": "16"}, [0.5, 4]),
    "an object of layers": ("prior.", {"alpha": json.dumps(BY_LAYER)}, [0.5, 4]),
    "a list of one number": ("prior.", {"alpha": "[16, 16.0, 16]"}, [4, 4]),
    "kohya": ("diffusion_model.", {"ss_network_alpha": "16", "ss_network_dim": "4"}, [4, 4]),
    "kohya, None": ("", {"ss_network_alpha": "None", "ss_network_dim": "None"}, [1, 1]),
    "kohya, 0": ("", {"ss_network_alpha": "0"}, [1, 1]),
    "kohya, rsLoRA": (
        "", {"ss_network_alpha": "16", "ss_network_args": json.dumps({"rs_lora": "True"})}, [8, 8],
    ),
    "kohya, convolutions": (
        "", {"ss_network_alpha": "16", "ss_network_args": json.dumps(CONVOLUTIONS)}, [4, 4],
    ),
    "all agree": ("prior.", {**entry(**PEFT), "ss_network_alpha": "16", "lora_alpha": 16}, [4, 4]),
    "nothing": ("prior.", {"r": "8", "ss_network_dim": "8", "title": "alpha"}, [1, 1]),
    "OneTrainer, in the matrices": ("prior.", {"ot_config": json.dumps({"lora_alpha": 16})}, [1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("prefix, metadata, wanted", FOUND.values(), ids=FOUND)
def test_metadata_tell_the_alpha(
    tmp_path: Path, prefix: str, metadata: dict[str, Any], wanted: list[float]
) -> None:
    path = write(tmp_path, layers(prefix), metadata)
    assert scales(path) == wanted
    for layout in ("own", "kohya"):
        write_lora(tmp_path / "again.safetensors", read_lora(path, SIZES), layout)
        assert scales(tmp_path / "again.safetensors") == wanted


def test_patterns_fit_flattened_and_original_names(tmp_path: Path) -> None:
    metadata = entry(**PEFT, alpha_pattern={f"{FIRST}.to_out.0": 2, "attn.out_proj": 8})
    for prefix, names in (("lora_unet_", FLAT), ("diffusion_model.", COMFYUI)):
        assert scales(write(tmp_path, layers(prefix, names), metadata)) == [0.5, 2]


def test_convolutions_of_several_taps_have_kohyas_other_alpha(tmp_path: Path) -> None:
    weight = "down_blocks.0.0.depthwise"
    tensors = {
        f"{weight}.lora_A.weight": torch.ones(2, 1, 3, 3), f"{weight}.lora_B.weight": torch.ones(8, 2, 1, 1),
    } | pair(DIFFUSERS[0])  # fmt: skip
    metadata = {"ss_network_alpha": "16", "ss_network_dim": "4", "ss_network_args": json.dumps(CONVOLUTIONS)}
    path = write(tmp_path, tensors, metadata)
    updates = read_lora(path, SIZES).updates
    assert (updates[f"{weight}.weight"].alpha, updates[WEIGHTS[0]].alpha) == (1, 16)


def test_the_text_encoder_has_its_own(tmp_path: Path) -> None:
    tensors = layers("prior.") | pair(f"text_encoder.{TEXT}")
    metadata = entry(prior__r=4, prior__lora_alpha=16, text_encoder__r=4, text_encoder__lora_alpha=2)
    lora = read_lora(write(tmp_path, tensors, metadata), SIZES)
    assert [update.alpha for update in lora.text_updates.values()] == [2]
    assert {update.alpha for update in lora.updates.values()} == {16}


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor(2), torch.tensor([2.0]), torch.tensor([[2]], dtype=torch.int32), torch.tensor(2.0).half(),
     torch.tensor(2.0).to(torch.float8_e4m3fn)],
)  # fmt: skip
def test_tensors_come_first(tmp_path: Path, alpha: Tensor) -> None:
    tensors = layers("prior.", alpha=alpha)
    assert scales(write(tmp_path, tensors, entry(**PEFT), PEFT)) == [0.5, 0.5]
    for metadata in ({"alpha": "many"}, {"ss_network_alpha": "Dynamic"}, {"lora_adapter_metadata": "{"}):
        assert scales(write(tmp_path, tensors, metadata)) == [0.5, 0.5]


def test_a_configuration_beside_a_file_that_needs_none_is_another_ones(tmp_path: Path) -> None:
    for adapter in ({"r": 8, "use_dora": True}, {"r": 8, "use_rslora": True}, [1]):
        assert scales(write(tmp_path, layers("prior.", alpha=torch.tensor(2.0)), {}, adapter)) == [0.5, 0.5]


def test_the_configuration_beside_the_file_holds_for_every_layout(tmp_path: Path) -> None:
    for prefix in ("prior.", "base_model.model.", ""):
        assert scales(write(tmp_path, layers(prefix), {"title": "x"}, PEFT)) == [4, 4]
    assert scales(write(tmp_path, layers("prior."), {"ss_network_alpha": "16"}, PEFT)) == [4, 4]
    assert scales(write(tmp_path, layers("lora_unet_", FLAT), {}, {**PEFT, "alpha_pattern": TO_OUT})) == [
        2,
        2,
    ]


REFUSED = {
    "no number": ({"lora_alpha": "much"}, "lora_alpha in the metadata is 'much', not a number above 0"),
    "changing": ({"ss_network_alpha": "Dynamic"}, "ss_network_alpha in the metadata is 'Dynamic'"),
    "0": ({"lora_alpha": "0"}, "lora_alpha in the metadata is 0.0, not a number above 0"),
    "below 0": ({"alpha": "-4"}, "not a number above 0"),
    "true": ({"lora_alpha": True}, "not a number above 0"),
    "NaN": ({"lora_alpha": "nan"}, "not a number above 0"),
    "a list": ({"alpha": "[1, 2]"}, r"alpha in the metadata is \[1, 2\]"),
    "in itself": (
        {"lora_alpha": "4", "ss_network_alpha": "8"},
        "the metadata contradicts itself: lora_alpha is 4.0, and ss_network_alpha is 8.0",
    ),
    "two places": (
        {**entry(**PEFT), "ss_network_alpha": "8"}, "is 16 in the metadata entry .*, but 8 in the metadata",
    ),
    "components": (
        entry(unet__lora_alpha=4, transformer__lora_alpha=8), "is 4 in unet the .* but 8 in transformer the",
    ),
    "rank": (entry(r=8, lora_alpha=16), "says rank 8, but the update of prior.* has rank 4: it belongs to"),
    "kohya's rank": ({"ss_network_alpha": "8", "ss_network_dim": "8"}, "says rank 8"),
    "no alpha": (entry(r=4), "'lora_adapter_metadata' has no alpha of prior"),
    "rsLoRA alone": ({"use_rslora": "true"}, "the metadata has no alpha of prior"),
    "unclear rsLoRA": ({"alpha": "4", "use_rslora": "perhaps"}, "use_rslora .* 'perhaps', neither true nor"),
    "DoRA": (entry(**PEFT, use_dora=True), "it is a DoRA, which is not read: use_dora in"),
    "LyCORIS's DoRA": ({"ss_network_args": json.dumps({"dora_wd": "True"})}, "it is a DoRA, .* dora_wd in"),
    "blocks": ({"alpha": "4", "network_args": json.dumps({"block_alphas": "1,2"})}, "block_alphas in the"),
    "no JSON": ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata in .* is '{', which tells no alpha"),
    "no object": ({"lora_adapter_metadata": "[1]"}, "which tells no alpha of prior"),
    "no pattern": (entry(**PEFT, alpha_pattern={"(": 1}), r"alpha_pattern in the metadata .* holds '\('"),
    "a pattern's value": (entry(**PEFT, alpha_pattern={"to_out.0": "x"}), "is 'x', not a number above 0"),
    "no patterns": (entry(**PEFT, alpha_pattern=[1]), r"alpha_pattern is \[1\], not an object in braces"),
}  # fmt: skip


@pytest.mark.parametrize("metadata, message", REFUSED.values(), ids=REFUSED)
def test_what_is_unclear_is_refused_in_a_sentence(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        scales(write(tmp_path, layers("prior."), metadata))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "adapter, metadata, message",
    [
        ({"r": 8, "lora_alpha": 8}, {}, "adapter_config.json says rank 8, but the update of prior"),
        ({**PEFT, "use_dora": True}, {}, "it is a DoRA, which is not read: use_dora in adapter_config.json"),
        ({**PEFT, "lora_alpha": None}, {}, "adapter_config.json has no alpha of prior"),
        (PEFT, entry(r=4, lora_alpha=8), "is 16 in adapter_config.json, but 8 in the metadata entry"),
    ],
)
def test_unclear_configurations_beside_the_file_are_refused(
    tmp_path: Path, adapter: dict[str, Any], metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        scales(write(tmp_path, layers("prior."), metadata, adapter))


def test_unclear_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the alpha of prior.* is 0: its update would do nothing"):
        scales(write(tmp_path, layers("prior.", alpha=torch.zeros(()))))
    with pytest.raises(CheckpointError, match="is no number but of shape"):
        scales(write(tmp_path, layers("prior.", alpha=torch.ones(2))))
    said = {"ss_network_alpha": "16", "ss_network_args": json.dumps({"rs_lora": True})}
    with pytest.raises(CheckpointError, match="is 16, but 32 by what is said of rsLoRA"):
        scales(write(tmp_path, layers("prior.", alpha=torch.tensor(16.0)), said))
    assert scales(write(tmp_path, layers("prior.", alpha=torch.tensor(32.0)), said)) == [8, 8]  # LyCORIS


def test_the_published_layouts_have_alpha_1_whatever_is_said(tmp_path: Path) -> None:
    tensors = {}
    for i, name in enumerate(published_orders(SIZES)[0]):
        rows, columns = stage_c_weights(SIZES)[name]
        tensors[f"module.{i}.lora_down"] = torch.ones(RANK, columns)
        tensors[f"module.{i}.lora_up"] = torch.ones(rows, RANK)
    lora = read_lora(write(tmp_path, tensors, {"lora_alpha": "16"}), SIZES)
    assert {update.alpha for update in lora.updates.values()} == {1}
    assert lora.metadata == {}
