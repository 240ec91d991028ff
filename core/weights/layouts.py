"""Published layouts: tensor names of the guidance files, both ways, and which network a file is of.

Own names are those of `modules.guidance.Guidance` (`down.0.…`, `up.1.…`).
LoRA files: `core.weights.lora.files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor

from core.config.control_types import CONTROL_TYPES, controlnet_name
from core.config.sizes import STAGE_B_VERSIONS, STAGE_C_VERSIONS, TINY_VERSION

UNKNOWN = "unknown weights"
LORA = "a LoRA"
A_CONTROLNET = "a ControlNet"
# What is published, by what tells it apart: the width of Stage C's levels and of Stage B's second level, the
# first that differs, and the channels that a ControlNet sees.
_STAGE_C = {sizes.c_hidden[0]: name for name, sizes in STAGE_C_VERSIONS.items() if name != TINY_VERSION}
_STAGE_B = {sizes.c_hidden[1]: name for name, sizes in STAGE_B_VERSIONS.items() if name != TINY_VERSION}
_CONTROLNETS = {kind.sizes.c_in: controlnet_name(name) for name, kind in CONTROL_TYPES.items() if kind.file}


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


# --- which network ---------------------------------------------------------------------------------


def identify(shapes: Mapping[str, Sequence[int]]) -> str:
    """The network that tensors of these names and shapes belong to, such as "Stage C 3.6B" or "a LoRA".

    "unknown weights" where no network is recognised.
    """

    size = partial(_size, shapes)
    if any("lora" in name for name in shapes):
        return LORA
    if any(name.endswith(".toout.0.weight") for name in shapes):
        return _versioned("guidance for Stage C", size(".toout.2.weight"), _STAGE_C)
    if size("clip_txt_mapper.weight"):
        return _versioned("Stage C", size("down_blocks.0.0.depthwise.weight"), _STAGE_C)
    if size("effnet_mapper.0.weight"):
        return _versioned("Stage B", size("down_blocks.1.0.depthwise.weight"), _STAGE_B)
    if size("vquantizer.codebook.weight"):
        return "Stage A"
    if size("projections.0.0.weight"):
        return _CONTROLNETS.get(control_channels(shapes), A_CONTROLNET)
    if size("mapper.1.running_mean"):
        return "the EfficientNet encoder"
    return "the previewer" if size("blocks.2.running_mean") else UNKNOWN


def control_channels(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The channels of what a ControlNet sees, of the shapes of its tensors; None of other networks'."""
    return _size(shapes, "backbone.0.0.weight", 1) or _size(shapes, "backbone.0.weight", 1)


def _size(shapes: Mapping[str, Sequence[int]], suffix: str, axis: int = 0) -> int | None:
    return next((shape[axis] for name, shape in shapes.items() if name.endswith(suffix)), None)


def _versioned(network: str, width: int | None, versions: Mapping[int, str]) -> str:
    if width in versions:
        return f"{network} {versions[width]}"
    return network if width is None else f"{network} of width {width}"


def describe_mismatch(given: str, wanted: str) -> str:
    """Why one network's file cannot be used for another, both as `identify` calls them, and the way out."""
    network, version = given.rpartition(" ")[::2]
    wanted_network, wanted_version = wanted.rpartition(" ")[::2]
    known = {*_STAGE_C.values(), *_STAGE_B.values()}
    if network == wanted_network and {version, wanted_version} <= known:
        return (
            f"is {given}, but the {wanted_version} model was asked for: "
            f"set model_version: {version} or give the {wanted_version} file"
        )
    return f"is {given}, but {wanted} was asked for: correct the path or the configuration"
