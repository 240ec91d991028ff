"""ComfyUI's combined files of Stable Cascade: one network of denoising, a text encoder and a decoder in one.

The parts stand behind prefixes: `model.diffusion_model.` Stage C or B with queries, keys and values apart;
`text_encoder.clip_g.` or the like CLIP in transformers' names; `vae.` Stage A, or the encoder and previewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.weights.layouts import identify
from core.weights.quantised import split_scales

_ONLY_IN_COMBINED = re.compile(
    r"(model\.)?diffusion_model\.clf\.1\.weight|(vae|first_stage_model|clip_l_vision)\..+"
    r"|(text_encoders?|cond_stage_model)\..*\btoken_embedding\.weight"
)
_DECODER = r"(vae|first_stage_model)\."
_PARTS = {  # what stands before the names of each
    "network": re.compile(r"(model\.)?diffusion_model\."),
    "text": re.compile(r"(text_encoders?|cond_stage_model)\.(clip_g\.)?(model\.)?(transformer\.)?"),
    "vision": re.compile(r"clip_l_vision\."),
    "encoder": re.compile(_DECODER + r"((encoder|effnet)\.)?(?=(backbone|mapper)\.|mean$|std$)"),
    "previewer": re.compile(_DECODER + r"(previewer\.)?(?=blocks\.)"),
    "decoder": re.compile(_DECODER),
}
_FILES = {  # by the first words of what `identify` calls them
    "Stage C": "stage_c", "Stage B": "stage_b", "Stage A": "stage_a",
    "the EfficientNet": "effnet_encoder", "the previewer": "previewer",
}  # fmt: skip
_CLIP = {"text": ("text_model.", "text_projection"), "vision": ("vision_model.", "visual_projection.")}
_BUFFERS = ("position_ids", "logit_scale")
_IMAGE_STATISTICS = ("mean", "std")  # ImageNet's, which the encoder here has in code
_QUERIES = re.compile(r"(.+\.attn)\.to_q\.(weight|bias)")
_HEAD_WIDTH = 64  # of every CLIP
_BIG_G = 1280  # the width of CLIP bigG, whose activation is another one than OpenAI's


@dataclass(frozen=True)
class Part:
    """A network of a combined file, in the names of its own file, with the scales of float8 weights."""

    file: str  # where it belongs in a folder of weights
    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None  # transformers', for config.json beside the file


def is_combined(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names holds several networks as ComfyUI writes them."""
    return any(_ONLY_IN_COMBINED.fullmatch(name) for name in names)


def take_apart(tensors: Mapping[str, Tensor]) -> tuple[list[Part], list[str]]:
    """The networks in a combined file's tensors, and the names of what belongs to none.

    ValueError for an attention without all of its queries, keys and values.
    """
    groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in _PARTS}
    others = []
    for name, tensor in tensors.items():
        kind, match = next(((k, m) for k, form in _PARTS.items() if (m := form.match(name))), (None, None))
        if kind is None:
            others.append(name)
        else:
            groups[kind][name[match.end() :]] = tensor
    parts = []
    for kind, group in groups.items():
        part = _clip(kind, group) if kind in _CLIP else _network(group)
        if part is not None:
            parts.append(part)
        elif group:
            others += [name for name in tensors if _PARTS[kind].match(name)]
    return parts, [name for name in others if not name.endswith("scaled_fp8")]


def _network(group: Mapping[str, Tensor]) -> Part | None:
    weights, scales = split_scales(group)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    name = identify(shapes)
    file = next((file for start, file in _FILES.items() if name.startswith(start)), None)
    if file is None:
        return None
    _pack_attention(weights, scales)
    if file == "effnet_encoder":
        weights = {key: tensor for key, tensor in weights.items() if key not in _IMAGE_STATISTICS}
    return Part(f"{file}.safetensors", name, weights | _named_scales(scales))


def _pack_attention(weights: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
    """Join queries, keys and values, which ComfyUI keeps apart."""
    for name in list(weights):
        if (match := _QUERIES.fullmatch(name)) is None:
            continue
        names = [f"{match[1]}.to_{letter}.{match[2]}" for letter in "qkv"]
        if absent := [part for part in names if part not in weights]:
            raise ValueError(f"{absent[0]} is not beside {name}: the file is not complete")
        packed, parts = f"{match[1]}.in_proj_{match[2]}", [weights.pop(part) for part in names]
        if scales.keys() & set(names):
            found = [scales.pop(part, torch.ones(())) for part in names]
            scales[packed] = torch.cat([_by_rows(s, len(p)) for s, p in zip(found, parts, strict=True)])
        same = len({part.dtype for part in parts}) == 1
        weights[packed] = torch.cat(parts if same else [part.float() for part in parts])


def _by_rows(scale: Tensor, rows: int) -> Tensor:
    return scale.float().reshape(-1, 1).expand(rows, 1)


def _named_scales(scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name.removesuffix('weight')}scale_weight": scale for name, scale in scales.items()}


# --- CLIP -------------------------------------------------------------------------------------------


def _clip(kind: str, group: Mapping[str, Tensor]) -> Part | None:
    """The text or the image encoder, in transformers' names."""
    tensors = {
        name: tensor
        for name, tensor in group.items()
        if name.startswith(_CLIP[kind]) and not name.endswith(_BUFFERS)
    }
    if (projection := tensors.pop("text_projection", None)) is not None:  # of OpenCLIP, (in, out)
        tensors["text_projection.weight"] = projection.T.contiguous()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        config = _text_config(shapes) if kind == "text" else _vision_config(shapes)
    except KeyError:
        return None
    what = "text" if kind == "text" else "image"
    return Part(f"{what}_encoder/model.safetensors", f"the {what} encoder", tensors, config)


def _text_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    vocabulary = shapes["text_model.embeddings.token_embedding.weight"][0]
    return {
        "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
        **_common_config(shapes, "text_model"), "vocab_size": vocabulary,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "projection_dim": shapes["text_projection.weight"][0],
        "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 1,
    }  # fmt: skip


def _vision_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    patch = shapes["vision_model.embeddings.patch_embedding.weight"][-1]
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
    return {
        "architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model",
        **_common_config(shapes, "vision_model"), "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
        "projection_dim": shapes["visual_projection.weight"][0],
    }  # fmt: skip


def _common_config(shapes: Mapping[str, tuple[int, ...]], tower: str) -> dict[str, Any]:
    inner, width = shapes[f"{tower}.encoder.layers.0.mlp.fc1.weight"]
    layers = {match[1] for name in shapes if (match := re.search(r"\.layers\.(\d+)\.", name))}
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // _HEAD_WIDTH), "layer_norm_eps": 1e-5,
        "hidden_act": "gelu" if width == _BIG_G else "quick_gelu",
    }  # fmt: skip
