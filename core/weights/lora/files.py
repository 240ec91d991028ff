"""LoRA files of Stage C: the one form that every layout is read into (`.reading`), and its writers.

Our own layout is a safetensors file with `<weight>.lora_down` (rank, in) and `<weight>.lora_up` (out, rank)
for each weight, the text encoder's behind `text_encoder.`, beside `tokens.embeddings` and `tokens.indices`.
Its metadata entry `lora` is JSON with all alphas and what is known of the tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config.sizes import StageCSizes
from core.weights.checkpoint import PathLike, config_metadata, name_some, save_tensors
from core.weights.lora.layouts import KOHYA, LAYOUTS, OWN, PEFT, PUBLISHED
from core.weights.lora.names import (
    PACKED,
    PARTS,
    TEXT,
    TEXT_PROJECTION,
    diffusers_module,
    flattened,
    original_module,
    published_orders,
    stage_c_weights,
)
from modules.lora import LoraUpdate

NOTES = "lora"  # the metadata entry with alphas and tokens
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOTHING = "the LoRA has no update that is not zero: there is nothing to write"


# --- the one form ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraTokens:
    """Rows that a LoRA brings for the text encoder's token embedding.

    The base row of a new token is the mean of the rows whose vocabulary entries match its expression, 0 if
    that is None; the base row of a known one is its own. ValueError if the parts differ in length.
    """

    values: Tensor  # (n, width): offsets to add to the base rows, or the rows themselves if `absolute`
    # (n) each, None where not known: rows in the embedding; the tokens, one that has several rows at each of
    # them; expressions
    indices: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None
    initialise_from: tuple[str | None, ...] | None = None
    absolute: bool = False

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise ValueError(f"token embeddings are rows (n, width), not {tuple(self.values.shape)}")
        for what in ("indices", "names", "initialise_from"):
            given = getattr(self, what)
            if given is not None and len(given) != len(self.values):
                raise ValueError(f"the LoRA brings {len(self.values)} token rows, but {len(given)} {what}")


@dataclass(frozen=True, eq=False)  # one that is read again is another: tensors have no one truth value
class LoraFile:
    """A LoRA of Stage C, whatever layout it came in; `MergedLora` takes `updates` and `text_updates`.

    A packed weight has one update. Queries, keys and values that came apart lie in it side by side: their
    downs stacked, their ups on a block diagonal (of ranks r, s and t: rank r + s + t), exactly.
    """

    updates: dict[str, LoraUpdate]  # by the parameter of Stage C
    sizes: StageCSizes
    text_updates: dict[str, LoraUpdate] = field(default_factory=dict)  # of CLIPTextModelWithProjection
    tokens: LoraTokens | None = None
    layout: str = OWN  # that it was read from
    metadata: dict[str, str] = field(default_factory=dict)  # further entries of a safetensors file


def name_tokens(
    lora: LoraFile, names: Sequence[str], initialise_from: Sequence[str | None] | None = None
) -> LoraFile:
    """The LoRA with the tokens' strings and, unless None, the expressions of their base rows, in row order.

    ValueError if it has not that many rows, or an expression is none.
    """
    if lora.tokens is None:
        raise ValueError("the LoRA brings no tokens to name")
    if initialise_from is not None and lora.tokens.absolute:
        raise ValueError("the LoRA's token rows are whole, not offsets: they have no expression")
    for expression in initialise_from or ():
        try:
            re.compile(expression or "")
        except re.error as error:
            raise ValueError(f"{expression!r} is no regular expression: {error}") from None
    expressions = lora.tokens.initialise_from if initialise_from is None else tuple(initialise_from)
    return replace(lora, tokens=replace(lora.tokens, names=tuple(names), initialise_from=expressions))


# --- writing --------------------------------------------------------------------------------------


@torch.no_grad()
def write_lora(path: PathLike, lora: LoraFile, layout: str = OWN, dtype: torch.dtype | None = None) -> None:
    """Write a LoRA in one of `LAYOUTS`; ValueError for what that cannot hold, before anything is written.

    own: as above. published: UltraPixel's, with zeros for attention weights that have no update. kohya: reads
    ComfyUI too. peft: a folder, for diffusers' StableCascadeUNet. `dtype`: of matrices and token rows; None:
    as they are.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown LoRA layout {layout!r}: use {', '.join(LAYOUTS)}")
    if layout == PEFT:
        tensors, config = _to_peft(lora)
        tensors = _in_format(tensors, dtype)
        Path(path).mkdir(parents=True, exist_ok=True)
        save_tensors(Path(path) / PEFT_WEIGHTS, tensors, {"format": "pt"})
        (Path(path) / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    else:
        tensors, metadata = {OWN: _to_own, PUBLISHED: _to_published, KOHYA: _to_kohya}[layout](lora)
        if not tensors:
            raise ValueError(NOTHING)
        save_tensors(path, _in_format(tensors, dtype), metadata)


def _in_format(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The matrices and rows in a number format; ValueError where it cannot hold them."""
    if dtype is None:
        return dict(tensors)
    kept = {name: t for name, t in tensors.items() if name.endswith(".alpha") or not t.is_floating_point()}
    cast = {name: t if name in kept else t.to(dtype) for name, t in tensors.items()}
    if too_large := [name for name in tensors if not cast[name].isfinite().all()]:
        raise ValueError(f"{dtype} has no room for the numbers of {name_some(too_large)}: use bfloat16")
    return cast


def _to_own(lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    updates = lora.updates | {TEXT + weight: update for weight, update in lora.text_updates.items()}
    tensors = {}
    for weight, update in updates.items():
        tensors |= {f"{weight}.lora_down": update.down, f"{weight}.lora_up": update.up}
    notes = {"alphas": {weight: update.alpha for weight, update in updates.items()}}
    return tensors | _token_tensors(lora.tokens, "tokens"), _metadata(lora, notes)


def _to_published(lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    order = published_orders(lora.sizes)[0]
    _refuse(PUBLISHED, [*lora.text_updates, *(weight for weight in lora.updates if weight not in order)])
    if lora.tokens is not None and (lora.tokens.absolute or lora.tokens.indices is None):
        raise ValueError(
            "the published layout holds offsets of numbered token rows, not whole ones: leave the tokens out"
        )
    rank = max((update.rank for update in lora.updates.values()), default=1)  # readers ask for a single one
    tensors = {}
    for i, weight in enumerate(order):
        rows, columns = stage_c_weights(lora.sizes)[weight]
        down, up = torch.zeros(rank, columns), torch.zeros(rows, rank)
        if (update := lora.updates.get(weight)) is not None:
            down[: update.rank] = update.down
            up[:, : update.rank] = update.up.float() * (update.alpha * rank / update.rank)
        tensors |= {f"module.{i}.lora_down": down, f"module.{i}.lora_up": up}
    return tensors | _token_tensors(lora.tokens, f"module.{len(order)}"), _metadata(lora, {})


def _to_kohya(lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    for weight, part, update in _layers(lora.updates):
        name = "lora_unet_" + flattened(original_module(weight, part))
        tensors |= _kohya_tensors(name, update, stage_c_weights(lora.sizes)[weight])
    for weight, _, update in _layers(lora.text_updates):
        module = weight.removesuffix(".weight")
        prefix = "lora_prior_te_" if module == TEXT_PROJECTION else "lora_te_"  # as ComfyUI knows it
        tensors |= _kohya_tensors(prefix + flattened(module), update, (len(update.up), update.down.shape[1]))
    if lora.tokens is not None:
        if not lora.tokens.absolute or lora.tokens.names is None:
            raise ValueError(
                "the kohya layout holds whole token rows with their names, not offsets: leave the tokens out"
            )
        for token in dict.fromkeys(lora.tokens.names):
            rows = [i for i, name in enumerate(lora.tokens.names) if name == token]
            tensors[f"bundle_emb.{token}.clip_g"] = lora.tokens.values[rows]
    return tensors, lora.metadata | {"modelspec.architecture": "stable-cascade/lora"}


def _kohya_tensors(name: str, update: LoraUpdate, shape: Sequence[int]) -> dict[str, Tensor]:
    down, up = _layer_matrices(update, shape)
    alpha = torch.tensor(float(update.alpha))
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}


def _to_peft(lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """With alpha in the matrices, so that they are right without the configuration too."""
    weights = stage_c_weights(lora.sizes)
    grouped = [weight for weight in lora.updates if weight.endswith("depthwise.weight")]
    tokens = [] if lora.tokens is None else ["the tokens"]
    _refuse(PEFT, [*lora.text_updates, *grouped, *tokens])
    tensors, ranks = {}, {}
    for weight, part, update in _layers(lora.updates):
        module = diffusers_module(weight, part)
        down, up = _layer_matrices(update, weights[weight])
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": down,
            f"base_model.model.{module}.lora_B.weight": up.float() * update.scale,
        }
        ranks[module] = update.rank
    if not ranks:
        raise ValueError(NOTHING)
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": None, "task_type": None,
        "inference_mode": True, "r": common, "lora_alpha": common, "rank_pattern": others,
        "alpha_pattern": others, "target_modules": list(ranks), "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    return tensors, config


def _layers(updates: Mapping[str, LoraUpdate]) -> Iterator[tuple[str, int | None, LoraUpdate]]:
    """Weight, part and update of each layer: packed weights taken apart, without ranks that do nothing."""
    for weight, update in updates.items():
        packed = weight.endswith(PACKED)
        for part, up in zip(PARTS, update.up.chunk(3), strict=True) if packed else [(None, update.up)]:
            used = up.any(dim=0)
            if used.any():
                alpha = update.alpha * int(used.sum()) / update.rank
                yield weight, part, LoraUpdate(update.down[used], up[:, used], alpha)


def _layer_matrices(update: LoraUpdate, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Down and up in the shapes of layers: those of convolutions have the taps in the down one."""
    if len(shape) == 2:
        return update.down, update.up
    per_tap = update.down.shape[1] == math.prod(shape[1:])
    down = update.down.view(update.rank, *shape[1:]) if per_tap else update.down[:, :, None, None]
    return down.expand(update.rank, *shape[1:]), update.up[:, :, None, None]


def _token_tensors(tokens: LoraTokens | None, prefix: str) -> dict[str, Tensor]:
    if tokens is None:
        return {}
    indices = {} if tokens.indices is None else {f"{prefix}.indices": torch.tensor(tokens.indices)}
    return {f"{prefix}.embeddings": tokens.values, **indices}


def _metadata(lora: LoraFile, notes: dict[str, Any]) -> dict[str, str]:
    if lora.tokens is not None:
        tokens = {name: getattr(lora.tokens, name) for name in ("names", "initialise_from", "absolute")}
        notes = notes | {name: value for name, value in tokens.items() if value not in (None, False)}
    return lora.metadata | config_metadata(notes, NOTES)


def _refuse(layout: str, names: Sequence[str]) -> None:
    if names:
        raise ValueError(f"the {layout} layout has no place for {name_some(names)} ({len(names)} in all)")
