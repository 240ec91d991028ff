"""Reading LoRA files of Stage C: published, of Stability, kohya, ComfyUI, OneTrainer, peft, and our own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config.sizes import STAGE_C_VERSIONS, StageCSizes
from core.weights.checkpoint import (
    CheckpointError,
    PathLike,
    count_tensors,
    name_some,
    read_config,
    read_metadata,
    read_tensors,
)
from core.weights.layouts import LORA, UNKNOWN, describe_mismatch, identify
from core.weights.lora.alphas import (
    Layer,
    Statement,
    agreed_alpha,
    check_alpha,
    check_plain,
    is_outdated,
    stated_by_adapter,
    stated_by_metadata,
)
from core.weights.lora.files import NOTES, PEFT_CONFIG, PEFT_WEIGHTS, LoraFile, LoraTokens
from core.weights.lora.layouts import OWN, PEFT
from core.weights.lora.names import (
    PARTS,
    Target,
    module_names,
    published_orders,
    stage_c_targets,
    stage_c_weights,
)
from modules.lora import LoraUpdate

ULTRAPIXEL, STABILITY = "UltraPixel's published", "Stability's"
IN_FOLDERS = (PEFT_WEIGHTS, "adapter_model.bin", "lora/lora.safetensors")  # the last in OneTrainer's backups
SUPPORTED = "only LoRA matrices are read, no DoRA, LoHa, LoKr, biases or output embeddings"

_MATRIX = re.compile(
    r"(.+?)(?:(?:\.lora_|_lora\.|\.lora\.|\.lora_linear_layer\.)(down|up|A|B)(?:\.default)?(?:\.weight)?"
    r"|\.(alpha))"
)
_KINDS = {"down": "down", "A": "down", "up": "up", "B": "up", "alpha": "alpha"}
_NUMBERED = re.compile(r"(module\.|weights\.)?(\d+)")
_TOKENS = re.compile(r"(?:(?:module\.)?\d+|embeddings|tokens)\.(embeddings|indices)")
_BUNDLED = re.compile(r"bundle_emb\.(.+)\.clip_g")
_SKIPPED = "_aux."  # OneTrainer's
_STALE = "sshs_"  # hashes of the file that is read

# Updates of a packed weight's queries, keys and values; None: of all of a weight.
Parts = dict[int | None, LoraUpdate]


@dataclass(frozen=True)
class _Source:
    """What a file holds, sorted by the forms of its names, whatever they mean."""

    tensors: Mapping[str, Tensor]
    matrices: Mapping[str, Mapping[str, str]]  # names of down, up and alpha by what they have in front
    tokens: LoraTokens | None
    unknown: Sequence[str]  # names of no known form
    notes: Mapping[str, Any]  # the metadata entry `lora`
    statements: Sequence[Statement]  # of alphas, in peft's configuration and the metadata


@dataclass
class _Reading:
    """What the names mean for a Stage C of certain sizes, and what has no meaning for it."""

    sizes: StageCSizes
    updates: dict[str, Parts] = field(default_factory=dict)
    text_updates: dict[str, Parts] = field(default_factory=dict)
    layouts: dict[str, None] = field(default_factory=dict)  # in the order they were met
    unknown: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)  # sentences

    def problems(self) -> int:
        return len(self.unknown) + len(self.misfits)


def read_lora(path: PathLike, sizes: StageCSizes | None = None) -> LoraFile:
    """Read a LoRA of Stage C in any layout, in float32: a file, or a folder of peft or OneTrainer.

    Without `sizes`, those of the known version that all names and shapes fit. CheckpointError names what
    cannot be mapped, and says if the LoRA is for another size.
    """
    file = find_lora_file(path)
    tensors = read_tensors(file, torch.float32)
    network = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if network not in (LORA, UNKNOWN):
        raise CheckpointError(f"{path} {describe_mismatch(network, LORA)}")
    notes = read_config(file, NOTES)
    try:
        notes = {} if notes is None else _braces(notes, f"the metadata entry {NOTES!r}")
        source = _sort(tensors, notes, file)
        lora = _understand(source, sizes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return replace(lora, metadata=_kept(read_metadata(file)))


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries that still hold for what is written of a LoRA."""
    return {
        entry: text
        for entry, text in metadata.items()
        if entry != NOTES and not entry.startswith(_STALE) and not is_outdated(entry, text)
    }


def find_version(sizes: StageCSizes) -> str | None:
    """The version of Stage C that has these sizes."""
    return next((version for version, known in STAGE_C_VERSIONS.items() if known == sizes), None)


def find_lora_file(path: PathLike) -> Path:
    """The file of a LoRA that may be a folder; CheckpointError if the folder has none."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} is a folder without a LoRA: it has none of {', '.join(IN_FOLDERS)}")


# --- by the forms of the names --------------------------------------------------------------------


def _sort(tensors: Mapping[str, Tensor], notes: Mapping[str, Any], file: Path) -> _Source:
    matrices: dict[str, dict[str, str]] = {}
    token_names, unknown = [], []
    for name in tensors:
        if match := _MATRIX.fullmatch(name):
            kinds, kind = matrices.setdefault(match[1], {}), _KINDS[match[2] or match[3]]
            if kind in kinds:
                raise ValueError(f"the LoRA holds the same twice, as {kinds[kind]} and {name}")
            kinds[kind] = name
        elif _TOKENS.fullmatch(name) or _BUNDLED.fullmatch(name):
            token_names.append(name)
        elif not name.startswith(_SKIPPED):
            unknown.append(name)
    for base in [base for base, kinds in matrices.items() if list(kinds) == ["alpha"]]:
        unknown += matrices.pop(base).values()  # of something else than LoRA
    tokens = _read_tokens({name: tensors[name] for name in token_names}, notes)
    whole = all("alpha" in kinds for kinds in matrices.values())
    return _Source(tensors, matrices, tokens, unknown, notes, _read_statements(file, with_adapter=not whole))


def _read_tokens(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> LoraTokens | None:
    bundled = {match[1]: tensors[name] for name in tensors if (match := _BUNDLED.fullmatch(name))}
    parts = {match[1]: tensors[name] for name in tensors if (match := _TOKENS.fullmatch(name))}
    if not tensors:
        return None
    if len(parts) + len(bundled) != len(tensors) or (parts and bundled):
        raise ValueError(f"the LoRA brings tokens in several places: {name_some(list(tensors))}")
    if bundled:
        return _join_bundled({name: torch.atleast_2d(value) for name, value in bundled.items()})
    absolute = bool(notes.get("absolute"))
    if "embeddings" not in parts or ("indices" not in parts and not absolute):
        raise ValueError("the LoRA has embeddings or indices of its tokens without the other")
    indices = parts.get("indices")
    if indices is not None and (indices.dim() != 1 or indices.is_floating_point() or (indices < 0).any()):
        raise ValueError("the indices of the LoRA's tokens are no row numbers")
    rows = None if indices is None else tuple(indices.tolist())
    names, initialise_from = _texts(notes, "names", str), _texts(notes, "initialise_from", str | None)
    return LoraTokens(parts["embeddings"], rows, names, initialise_from, absolute)


def _join_bundled(rows: Mapping[str, Tensor]) -> LoraTokens:
    """OneTrainer's tokens, whole rows (n, width) by the token they spell together."""
    if len({value.shape[1:] for value in rows.values()}) > 1:
        shapes = [tuple(value.shape) for value in rows.values()]
        raise ValueError(f"the LoRA's tokens are of different widths: {shapes}")
    names = tuple(name for name, value in rows.items() for _ in value)
    return LoraTokens(torch.cat(list(rows.values())), names=names, absolute=True)


def _texts(notes: Mapping[str, Any], key: str, kind: Any) -> tuple[Any, ...] | None:
    texts = notes.get(key)
    if texts is None:
        return None
    if not (isinstance(texts, list) and all(isinstance(text, kind) for text in texts)):
        raise ValueError(f"{key!r} in the metadata entry {NOTES!r} is no list of texts")
    return tuple(texts)


def _read_statements(file: Path, with_adapter: bool) -> list[Statement]:
    """What stands of alphas in a file's metadata, and in peft's configuration beside it."""
    statements = stated_by_metadata(read_metadata(file))
    if with_adapter and (path := file.with_name(PEFT_CONFIG)).is_file():
        try:
            config = _braces(json.loads(path.read_text("utf-8")), "it")
        except ValueError as error:
            raise ValueError(f"{path.name} is no configuration of peft: {error}") from None
        statements.insert(0, stated_by_adapter(config, path.name))
    check_plain(statements)
    return statements


def _braces(value: object, what: str) -> Mapping[str, Any]:
    """What JSON gave, ValueError unless it is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}, not an object in braces")
    return value


def _number(value: object, what: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r}, not a number")
    return float(value)


# --- for a Stage C of certain sizes ---------------------------------------------------------------


def _understand(source: _Source, sizes: StageCSizes | None) -> LoraFile:
    if not (source.matrices or source.tokens or source.unknown):
        raise ValueError("the file holds no LoRA")
    readings = []
    for candidate in STAGE_C_VERSIONS.values() if sizes is None else (sizes,):
        reading = _read_as(source, candidate)
        if not reading.problems():
            return _assemble(source, reading)
        readings.append(reading)
    if sizes is not None:
        _check_other_versions(source, sizes)
    raise ValueError(_explain(source, min(readings, key=_Reading.problems)))


def _read_as(source: _Source, sizes: StageCSizes) -> _Reading:
    reading = _Reading(sizes, unknown=list(source.unknown))
    targets = {**stage_c_targets(sizes), **_numbered_targets(source, sizes)}
    for base, names in source.matrices.items():
        target = targets.get(base)
        if target is None:
            reading.unknown += names.values()
            continue
        try:
            update = _read_update(source, base, target)
            if not target.text:  # the text encoder's sizes are not known here
                update.check(base, _shape(target, sizes))
            _add(reading.text_updates if target.text else reading.updates, target, update)
        except ValueError as error:
            reading.misfits.append(str(error))
        reading.layouts[target.layout] = None
    if source.tokens is not None and (width := source.tokens.values.shape[1]) != sizes.c_clip_text:
        reading.misfits.append(
            f"the LoRA's tokens are of width {width}, but the text encoder's are of {sizes.c_clip_text}"
        )
    return reading


def _numbered_targets(source: _Source, sizes: StageCSizes) -> dict[str, Target]:
    """What the entries of the published layouts act on: their number, and how many there are, alone tell."""
    matches = {base: match for base in source.matrices if (match := _NUMBERED.fullmatch(base))}
    for order in published_orders(sizes):
        if sorted(int(match[2]) for match in matches.values()) == list(range(len(order))):
            return {
                base: Target(order[int(match[2])], None, STABILITY if match[1] == "weights." else ULTRAPIXEL)
                for base, match in matches.items()
            }
    return {}


def _shape(target: Target, sizes: StageCSizes) -> tuple[int, ...]:
    rows, *others = stage_c_weights(sizes)[target.weight]
    return (rows if target.part is None else rows // len(PARTS), *others)


def _add(updates: dict[str, Parts], target: Target, update: LoraUpdate) -> None:
    parts = updates.setdefault(target.weight, {})
    if target.part in parts or (parts and None in (target.part, *parts)):
        raise ValueError(f"the LoRA has two updates of {target.weight}")
    parts[target.part] = update


def _read_update(source: _Source, base: str, target: Target) -> LoraUpdate:
    names = source.matrices[base]
    if absent := [kind for kind in ("down", "up") if kind not in names]:
        raise ValueError(f"the LoRA has no lora_{absent[0]} of {base}: the file is not complete")
    down, up = (source.tensors[names[kind]] for kind in ("down", "up"))
    if down.dim() < 2 or up.dim() < 2:
        raise ValueError(f"the LoRA of {base} is no matrix: {tuple(down.shape)} and {tuple(up.shape)}")
    update = LoraUpdate(down.flatten(1), up.flatten(1))
    if update.rank == 0 or update.up.shape[1] != update.rank:
        raise ValueError(f"the LoRA of {base} is of rank {update.rank} and {update.up.shape[1]}")
    return replace(update, alpha=_find_alpha(source, base, target, update, down[0, 0].numel() > 1))


def _find_alpha(source: _Source, base: str, target: Target, update: LoraUpdate, taps: bool) -> float:
    """From where its layout has it; the published ones mean 1, the others the rank if it is nowhere."""
    layer = Layer(base, module_names(target), update.rank, target.text, taps)
    if name := source.matrices[base].get("alpha"):
        alpha = source.tensors[name]
        if alpha.numel() != 1:
            raise ValueError(f"the alpha of {base} is no number but of shape {tuple(alpha.shape)}")
        check_alpha(float(alpha), source.statements, layer, source.matrices)
        return float(alpha)
    if target.layout in (ULTRAPIXEL, STABILITY):
        return 1.0
    if target.layout == OWN:
        alphas = _braces(source.notes.get("alphas", {}), "'alphas'")
        if base not in alphas:
            raise ValueError(f"the metadata entry {NOTES!r} has no alpha of {base}: the file is not complete")
        return _number(alphas[base], f"the alpha of {base}")
    stated = agreed_alpha(source.statements, layer, source.matrices)
    if stated is None and target.layout == PEFT:
        raise ValueError(f"the alpha of a peft adapter is in {PEFT_CONFIG}, which must lie beside it")
    return float(update.rank) if stated is None else stated


# --- the result -----------------------------------------------------------------------------------


def _check_other_versions(source: _Source, sizes: StageCSizes) -> None:
    for version, other in STAGE_C_VERSIONS.items():
        if other != sizes and not _read_as(source, other).problems():
            raise ValueError(
                f"the LoRA is for Stage C {version}, not for {find_version(sizes) or 'this size'}"
            )


def _explain(source: _Source, reading: _Reading) -> str:
    """Why a file cannot be read, in one sentence."""
    numbered = sum(_NUMBERED.fullmatch(base) is not None for base in source.matrices)
    attention, everything = (len(order) for order in published_orders(reading.sizes))
    if numbered not in (0, attention, everything):
        return (
            f"the LoRA has updates for {numbered} weights, but this model takes {attention} (attention) or "
            f"{everything} (all): it belongs to another model size or was trained with another filter"
        )
    causes = []
    if reading.unknown:
        names = reading.unknown
        causes.append(f"{count_tensors(names)} of no known meaning ({name_some(names)}): {SUPPORTED}")
    if reading.misfits:
        first, *others = reading.misfits
        causes.append(f"{first} (and {len(others)} more like this)" if others else first)
    return "; ".join(causes)


def _assemble(source: _Source, reading: _Reading) -> LoraFile:
    order = stage_c_weights(reading.sizes)
    return LoraFile(
        updates={name: _joined(reading.updates[name]) for name in order if name in reading.updates},
        sizes=reading.sizes,
        text_updates={weight: parts[None] for weight, parts in reading.text_updates.items()},
        tokens=source.tokens,
        layout=" and ".join(reading.layouts) or "tokens alone",
    )


def _joined(parts: Parts) -> LoraUpdate:
    """One update of a packed weight from those of its queries, keys and values, of which some may be absent.

    Where all three share their down matrix, as those that were cut out of a packed update do, it keeps its
    rank; else the ranks add up, see `LoraFile`.
    """
    if None in parts:
        return parts[None]
    parts = dict(sorted(parts.items()))
    updates = list(parts.values())
    down, alpha = updates[0].down, updates[0].alpha
    if len(parts) == len(PARTS) and all(u.alpha == alpha and torch.equal(u.down, down) for u in updates):
        return LoraUpdate(down, torch.cat([update.up for update in updates]), alpha)
    scale = max((update.scale for update in updates), key=abs) or 1.0  # where all have it, matrices stay
    rows, rank = len(updates[0].up), sum(update.rank for update in updates)
    up = torch.zeros(len(PARTS) * rows, rank)
    start = 0
    for part, update in parts.items():
        end = start + update.rank
        up[part * rows : (part + 1) * rows, start:end] = update.up * (update.scale / scale)
        start = end
    return LoraUpdate(torch.cat([update.down for update in updates]), up, scale * rank)
