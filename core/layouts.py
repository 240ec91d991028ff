"""Published layouts: tensor names of the guidance and LoRA files, both ways, and which network a file is of.

Own names are those of `modules.guidance.Guidance` (`down.0.…`, `up.1.…`) and, for a LoRA, the weight it acts
on with `.lora_down` (rank, in) or `.lora_up` (out, rank), beside `tokens.embeddings` and `tokens.indices`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

UNKNOWN = "unknown weights"
STAGE_C_VERSIONS = {2048: "3.6B", 1536: "1B"}  # by the width of its levels
STAGE_B_VERSIONS = {640: "3B", 576: "700M"}  # by the width of its second level, the first that differs
CONTROLNETS = {1: "canny", 4: "inpainting", 16: "super resolution"}  # by the channels of the control input

BLOCKS_PER_ATTENTION = 3  # Stage C's levels repeat ResBlock, TimestepBlock, AttnBlock
LEVELS = (("down_blocks", 0), ("up_blocks", 1))


# --- guidance -------------------------------------------------------------------------------------

_GUIDANCE_NAME = re.compile(r"(?:module\.)?(\d+|agg_net|agg_net_up|down|up)\.(\d+)\.(.+)")
_UNUSED = ("hr_norm.alpha", "hr_norm.gamma")  # 1×1 convolutions that are stored and used nowhere


def guidance_names(names: Iterable[str]) -> dict[str, str]:
    """Names in a guidance file -> own names, without the tensors that are dropped; other names stay.

    Of the two numbers in the published layout (64 and 65) the lower is the way down.
    """
    matches = {name: _GUIDANCE_NAME.fullmatch(name) for name in names}
    numbers = sorted({int(match[1]) for match in matches.values() if match and match[1].isdigit()})
    sides = {"agg_net": "down", "agg_net_up": "up", "down": "down", "up": "up"}
    sides |= {str(number): side for number, side in zip(numbers, ("down", "up"), strict=False)}
    own = {}
    for name, match in matches.items():
        if match is None or match[1] not in sides:
            own[name] = name
        elif not match[3].startswith(_UNUSED):
            own[name] = f"{sides[match[1]]}.{match[2]}.{match[3]}"
    return own


def from_published_guidance(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a guidance file in any spelling, under own names."""
    return {own: tensors[name] for name, own in guidance_names(tensors).items()}


def to_published_guidance(tensors: Mapping[str, Tensor], n_res_blocks: int) -> dict[str, Tensor]:
    """Tensors under own names in the published layout; `n_res_blocks` counts all of Stage C's (64 at 3.6B).

    The tensors that the published file stores and nothing uses are written as zeros.
    """
    published = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(down|up)\.(\d+)\.(.+)", name)
        if match is None:
            raise ValueError(f"{name!r} is no guidance tensor: names begin with down.0., up.0. and so on")
        block = f"module.{n_res_blocks + (match[1] == 'up')}.{match[2]}"
        published[f"{block}.{match[3]}"] = tensor
        if match[3] == "input_layer.weight":
            width = tensor.shape[1]
            for unused in _UNUSED:
                published[f"{block}.{unused}.weight"] = tensor.new_zeros(width, width, 1, 1)
                published[f"{block}.{unused}.bias"] = tensor.new_zeros(width)
    return published


# --- LoRA -----------------------------------------------------------------------------------------

_PUBLISHED_LORA = re.compile(r"(?:module\.)?(\d+)\.(lora_down|lora_up|embeddings|indices)")
_OWN_LORA = re.compile(r".+\.lora_(?:down|up)|tokens\.(?:embeddings|indices)")


def attention_lora_order(blocks: Sequence[Sequence[int]]) -> list[str]:
    """The weights a LoRA with the filter `.attn` acts on, in the order of the published layout.

    `blocks` are Stage C's: attention blocks per level on the way down and, in running order, up.
    """
    order = []
    for path, side in LEVELS:
        for level, count in enumerate(blocks[side]):
            for block in range(count):
                attention = f"{path}.{level}.{BLOCKS_PER_ATTENTION * block + 2}.attention.attn"
                order += [f"{attention}.out_proj.weight", f"{attention}.in_proj_weight"]
    return order


def lora_names(names: Iterable[str], order: Sequence[str]) -> dict[str, str]:
    """Names in a LoRA file, in the published layout or in our own -> own names.

    `order` lists the weights that `module.0`, `module.1`, … act on; the number after them holds new tokens.
    ValueError if the file's updates are not those.
    """
    entries = {name: _PUBLISHED_LORA.fullmatch(name) for name in names}
    for name, entry in entries.items():
        if not (entry or _OWN_LORA.fullmatch(name)):
            raise ValueError(f"the LoRA holds {name!r}, of another layout: give it in the published one")
    numbers = {int(entry[1]) for entry in entries.values() if entry and entry[2].startswith("lora")}
    if numbers and numbers != set(range(len(order))):
        raise ValueError(
            f"the LoRA has updates for {len(numbers)} weights, but this model takes {len(order)}: "
            "it belongs to another model size or was trained with another filter"
        )
    own = {name: _own_lora_name(name, entry, order) for name, entry in entries.items()}
    _require_pairs(own.values())
    return own


def _own_lora_name(name: str, entry: re.Match[str] | None, order: Sequence[str]) -> str:
    if entry is None:
        return name
    return f"{order[int(entry[1])] if entry[2].startswith('lora') else 'tokens'}.{entry[2]}"


def from_published_lora(tensors: Mapping[str, Tensor], order: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a LoRA file under own names; `order` and errors as in `lora_names`."""
    return {own: tensors[name] for name, own in lora_names(tensors, order).items()}


def _require_pairs(names: Iterable[str]) -> None:
    names = set(names)
    for name in sorted(names):
        weight, _, kind = name.rpartition(".")
        partner = {"lora_down": "lora_up", "lora_up": "lora_down"}.get(kind)
        if partner and f"{weight}.{partner}" not in names:
            raise ValueError(f"the LoRA has {kind} of {weight} without {partner}: the file is not complete")


def to_published_lora(tensors: Mapping[str, Tensor], order: Sequence[str]) -> dict[str, Tensor]:
    """Tensors under own names in the published layout, which has an update for every weight in `order`."""
    _require_pairs(tensors)
    place = {weight: number for number, weight in enumerate([*order, "tokens"])}
    published = {}
    for name, tensor in tensors.items():
        weight, _, kind = name.rpartition(".")
        if weight not in place:
            raise ValueError(f"the published LoRA layout has no place for {name!r}")
        published[f"module.{place[weight]}.{kind}"] = tensor
    absent = [weight for weight in order if f"{weight}.lora_down" not in tensors]
    if absent:
        raise ValueError(
            f"the published LoRA layout needs an update for each of {len(order)} weights; "
            f"{len(absent)} have none, the first {absent[0]}"
        )
    return published


# --- which network ---------------------------------------------------------------------------------


def identify(shapes: Mapping[str, Sequence[int]]) -> str:
    """The network that tensors of these names and shapes belong to, such as "Stage C 3.6B" or "a LoRA".

    "unknown weights" where no network is recognised.
    """

    def size(suffix: str, axis: int = 0) -> int | None:
        return next((shape[axis] for name, shape in shapes.items() if name.endswith(suffix)), None)

    if any(".lora_" in name for name in shapes):
        return "a LoRA"
    if any(name.endswith(".wtokens") for name in shapes):
        return _versioned("guidance for Stage C", size(".input_layer.weight", 1), STAGE_C_VERSIONS)
    if size("clip_txt_mapper.weight"):
        return _versioned("Stage C", size("down_blocks.0.0.depthwise.weight"), STAGE_C_VERSIONS)
    if size("effnet_mapper.0.weight"):
        return _versioned("Stage B", size("down_blocks.1.0.depthwise.weight"), STAGE_B_VERSIONS)
    if size("vquantizer.codebook.weight"):
        return "Stage A"
    if size("projections.0.0.weight"):
        channels = size("backbone.0.0.weight", 1) or size("backbone.0.weight", 1)
        return f"the {CONTROLNETS[channels]} ControlNet" if channels in CONTROLNETS else "a ControlNet"
    if size("mapper.1.running_mean"):
        return "the EfficientNet encoder"
    return "the previewer" if size("blocks.2.running_mean") else UNKNOWN


def _versioned(network: str, width: int | None, versions: Mapping[int, str]) -> str:
    if width in versions:
        return f"{network} {versions[width]}"
    return network if width is None else f"{network} of width {width}"


def describe_mismatch(given: str, wanted: str) -> str:
    """Why one network's file cannot be used for another, both as `identify` calls them, and the way out."""
    network, version = given.rpartition(" ")[::2]
    wanted_network, wanted_version = wanted.rpartition(" ")[::2]
    known = {*STAGE_C_VERSIONS.values(), *STAGE_B_VERSIONS.values()}
    if network == wanted_network and {version, wanted_version} <= known:
        return (
            f"is {given}, but the {wanted_version} model was asked for: "
            f"set model_version: {version} or give the {wanted_version} file"
        )
    return f"is {given}, but {wanted} was asked for: correct the path or the configuration"
