"""Names in LoRA files: how the layouts in use spell the weights of Stage C and of the text encoder.

Every spelling is built from the weights' own names, and what a file's name stands for is looked up: in the
flattened ones (`lora_unet_down_blocks_0_2_…`) the dots cannot be told from the underscores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from core.config.sizes import StageCSizes
from core.weights.lora.layouts import KOHYA, OWN, PEFT
from modules.stage_c import StageC

PACKED = "in_proj_weight"  # queries, keys and values in one matrix: parts 0, 1 and 2 of its rows
PARTS = (0, 1, 2)
ATTENTION = ".attn."  # the published filter
ONETRAINER, COMFYUI, DIFFUSERS = "OneTrainer", "ComfyUI", "diffusers"  # that are only read

DOTTED = {  # what stands before a module's name, and whose layout it is
    "": "original names", "diffusion_model.": COMFYUI, "prior.": ONETRAINER, "base_model.model.": PEFT,
    "unet.": DIFFUSERS, "transformer.": DIFFUSERS,
}  # fmt: skip
FLATTENED = {"lora_unet_": KOHYA, "lora_prior_unet_": "OneTrainer's legacy", "lycoris_": "LyCORIS"}

TEXT = "text_encoder."  # before the text encoder's weights in our own layout
TEXT_DOTTED = {
    TEXT: ONETRAINER, "text_encoders.clip_g.transformer.": COMFYUI, "base_model.model.": PEFT,
}  # fmt: skip
TEXT_FLATTENED = {"lora_te_": KOHYA, "lora_prior_te_": "OneTrainer's legacy"}
TEXT_LAYERS = 32  # of CLIP bigG; a smaller encoder has fewer
TEXT_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
TEXT_PROJECTION = "text_projection"


@dataclass(frozen=True)
class Target:
    """What a name in a LoRA file acts on."""

    weight: str  # our name of it; transformers' for the text encoder
    part: int | None = None  # of a packed weight: 0 queries, 1 keys, 2 values; None: all of it
    layout: str = OWN  # that spells it so
    text: bool = False  # of the text encoder


# --- weights --------------------------------------------------------------------------------------


@lru_cache
def stage_c_weights(sizes: StageCSizes) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the weights that a LoRA can act on, in the published order without a filter.

    That order is the published code's walk through its modules; it meets `out_proj` before `in_proj_weight`.
    """
    with torch.device("meta"):
        parameters = dict(StageC(**asdict(sizes)).named_parameters())
    order = sorted((name for name in parameters if name.endswith("weight")), key=_place)
    for i in [i for i, name in enumerate(order) if name.endswith(PACKED)]:
        order[i], order[i + 1] = order[i + 1], order[i]
    return {name: tuple(parameters[name].shape) for name in order}


def _place(name: str) -> int:
    """Before the levels, in them or after them."""
    return 0 if name.startswith(("clip_", "embedding.")) else 2 if name.startswith("clf.") else 1


def published_orders(sizes: StageCSizes) -> tuple[list[str], list[str]]:
    """The weights that the published layouts' numbers stand for: with the filter `.attn`, and without."""
    weights = list(stage_c_weights(sizes))
    return [name for name in weights if ATTENTION in name], weights


def text_modules() -> Iterator[str]:
    """The text encoder's modules that a LoRA can act on, by transformers' names."""
    for layer in range(TEXT_LAYERS):
        yield from (f"text_model.encoder.layers.{layer}.{module}" for module in TEXT_LAYER)
    yield TEXT_PROJECTION


# --- spellings ------------------------------------------------------------------------------------


def original_module(weight: str, part: int | None = None) -> str:
    """The module of a weight by the names of Stability, kohya and ComfyUI, with to_q, to_k and to_v apart."""
    return weight.removesuffix(".weight") if part is None else weight.replace(PACKED, f"to_{'qkv'[part]}")


def diffusers_module(weight: str, part: int | None = None) -> str:
    """The module of a weight in diffusers' StableCascadeUNet."""
    module = original_module(weight, part)
    return module.replace(".attn.to_", ".to_").replace(".attn.out_proj", ".to_out.0")


def module_names(target: Target) -> tuple[str, ...]:
    """The dotted names of a target's module, in diffusers or transformers and in the original."""
    if target.text:
        return (target.weight.removesuffix(".weight"),)
    names = diffusers_module(target.weight, target.part), original_module(target.weight, target.part)
    return names if target.part is None else (*names, target.weight.replace(PACKED, f"in_proj.{target.part}"))


def flattened(module: str) -> str:
    """A module's name as kohya writes it."""
    return module.replace(".", "_")


@lru_cache
def stage_c_targets(sizes: StageCSizes) -> Mapping[str, Target]:
    """What every known spelling of a Stage C of these sizes stands for, and of the text encoder."""
    targets = _text_targets()
    for weight in stage_c_weights(sizes):
        targets[weight] = Target(weight)
        for part in PARTS if weight.endswith(PACKED) else (None,):
            modules = {original_module(weight, part), diffusers_module(weight, part)}
            if part is not None:
                modules.add(weight.replace(PACKED, f"in_proj.{part}"))  # OneTrainer
            for name, layout in _spellings(modules, DOTTED, FLATTENED):
                targets[name] = Target(weight, part, layout)
    return targets


def _text_targets() -> dict[str, Target]:
    targets = {}
    for module in text_modules():
        weight = f"{module}.weight"
        targets[TEXT + weight] = Target(weight, text=True)
        for name, layout in _spellings({module}, TEXT_DOTTED, TEXT_FLATTENED):
            targets[name] = Target(weight, None, layout, text=True)
    targets["lora_te2_text_projection"] = Target(f"{TEXT_PROJECTION}.weight", None, COMFYUI, text=True)
    return targets


def _spellings(
    modules: set[str], dotted: Mapping[str, str], flat: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    for module in modules:
        yield from ((prefix + module, layout) for prefix, layout in dotted.items())
        yield from ((prefix + flattened(module), layout) for prefix, layout in flat.items())
