"""The alpha of a LoRA's layers where no tensor holds it: in peft's configuration, or in the file's metadata.

Metadata has it in diffusers' entry `lora_adapter_metadata`, a configuration of peft as JSON in which a
component's name may stand before each key (`prior.lora_alpha`), in entries of the same names, or as kohya
writes it (`ss_network_alpha`). What cannot be used, or says two things, is an error: a LoRA at the wrong
strength still makes pictures.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PEFT_ALPHA = 8  # where peft's configuration names none
CONFIGURATIONS = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config")  # JSON entries
ARGUMENTS = ("ss_network_args", "network_args")  # JSON entries of kohya's trainer and LyCORIS
WHOLE = "base_model.model"  # stands before names, and tells no component
TEXT_COMPONENT = re.compile(r".*text.*|(lora_|prior_)*(te1?|te2)|clip(_\w)?")

_KEYS = {  # what they mean
    **dict.fromkeys(("lora_alpha", "alpha", "network_alpha", "ss_network_alpha"), "alpha"),
    **dict.fromkeys(("r", "rank", "lora_rank", "lora_dim", "network_dim", "ss_network_dim"), "rank"),
    **dict.fromkeys(("use_rslora", "rs_lora"), "rslora"), **dict.fromkeys(("use_dora", "dora_wd"), "dora"),
    "alpha_pattern": "alpha_pattern", "rank_pattern": "rank_pattern",
}  # fmt: skip
_ARGUMENT_KEYS = {
    "conv_alpha": "conv_alpha", "conv_dim": "conv_rank", "rs_lora": "rslora", "dora_wd": "dora",
    **dict.fromkeys(("block_alphas", "block_dims", "conv_block_alphas", "conv_block_dims"), "unusable"),
}  # fmt: skip
_ZERO_IS_RANK = ("ss_network_alpha", "conv_alpha")  # as kohya's trainer means it
_NOTHING = ("", "none", "null")
_SWITCHES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "none": False}


@dataclass(frozen=True)
class Layer:
    """A layer with an update, as configurations may name it."""

    name: str  # in the file
    others: tuple[str, ...]  # dotted names without a component
    rank: int
    text: bool = False  # of the text encoder
    taps: bool = False  # a convolution of more than one tap

    def is_named(self, expression: str) -> bool:
        """Whether an expression is one of its names, or the end of one behind a dot, as peft matches."""
        return any(re.fullmatch(rf"(.*\.)?({expression})", name) for name in (self.name, *self.others))


@dataclass(frozen=True)
class Statement:
    """What one place says of the layers of a component, of one layer, or of all."""

    place: str
    owner: str = ""  # a component or a layer; "": all
    complete: bool = False  # a configuration of peft, which always names an alpha
    values: dict[str, dict[str, Any]] = field(default_factory=dict)  # by meaning: of every key that has it

    def add(self, meaning: str, key: str, text: Any) -> None:
        """Take an entry, unless it says nothing."""
        if (value := _parsed(text)) is not None:
            self.values.setdefault(meaning, {})[key] = value

    def is_on(self, switch: str) -> bool:
        """Whether it says so; ValueError for what is neither true nor false."""
        key, value = self._single(switch)
        if str(value).lower() not in _SWITCHES:
            raise ValueError(f"{key} in {self.place} is {value!r}, neither true nor false")
        return _SWITCHES[str(value).lower()]

    def alpha(self, layer: Layer) -> float | None:
        """The alpha of a layer, for a scale of alpha / rank; None where nothing is said of it.

        ValueError for what cannot be used, contradicts itself, or does not fit the layer's rank.
        """
        if "unusable" in self.values:
            key, value = self._single("unusable")
            raise ValueError(f"{key} in {self.place} is {value!r:.60}, which tells no alpha of {layer.name}")
        conv = "conv_" if layer.taps and self.values.keys() & {"conv_alpha", "conv_rank"} else ""
        alpha = self._number(f"{conv}alpha", "alpha_pattern", layer)
        if alpha is None:
            if self.complete or conv or self.is_on("rslora"):
                raise ValueError(f"{self.place} has no alpha of {layer.name}")
            return None
        rank = self._number(f"{conv}rank", "rank_pattern", layer)
        if rank not in (None, layer.rank):
            raise ValueError(
                f"{self.place} says rank {rank:g}, but the update of {layer.name} has rank {layer.rank}: it "
                "belongs to another file"
            )
        return alpha * math.sqrt(layer.rank) if self.is_on("rslora") else alpha

    def _single(self, meaning: str) -> tuple[str, Any]:
        """The key and value of a meaning, which all its keys agree in."""
        (key, value), *others = (self.values.get(meaning) or {"": None}).items()
        for other, second in others:
            if second != value:
                raise ValueError(
                    f"{self.place} contradicts itself: {key} is {value!r}, and {other} is {second!r}"
                )
        return key, value

    def _number(self, meaning: str, pattern: str, layer: Layer) -> float | None:
        """What is said of a layer, first by a pattern; above 0."""
        key, patterns = self._single(pattern)
        if not isinstance(patterns, Mapping | None):
            raise ValueError(f"{key} is {patterns!r}, not an object in braces, in {self.place}")
        for expression, value in (patterns or {}).items():
            if self._fits(layer, expression, key):
                return self._above_zero(key, value, layer)
        key, value = self._single(meaning)
        if isinstance(value, Mapping):  # by the names of layers
            value = next((v for name, v in value.items() if layer.is_named(re.escape(name))), None)
        elif isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        return self._above_zero(key, value, layer)

    def _fits(self, layer: Layer, expression: str, key: str) -> bool:
        try:
            return layer.is_named(expression)
        except re.error as error:
            raise ValueError(f"{key} in {self.place} holds {expression!r}: {error}") from None

    def _above_zero(self, key: str, text: Any, layer: Layer) -> float | None:
        value = _parsed(text)
        if value is None:
            return None
        if value == 0 and key in _ZERO_IS_RANK:
            return float(layer.rank)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{key} in {self.place} is {text!r}, not a number above 0")
        return float(value)


# --- reading ----------------------------------------------------------------------------------------


def stated_by_adapter(config: Mapping[str, Any], place: str) -> Statement:
    """What peft's configuration says."""
    statement = Statement(place, complete=True)
    for key, value in {"lora_alpha": PEFT_ALPHA, **config}.items():
        if key in _KEYS:
            statement.add(_KEYS[key], key, value)
    return statement


def stated_by_metadata(metadata: Mapping[str, str]) -> list[Statement]:
    """What a file's metadata say."""
    statements: dict[tuple[str, str], Statement] = {}
    for entry, text in metadata.items():
        complete = entry in CONFIGURATIONS
        place = f"the metadata entry {entry!r}" if complete else "the metadata"
        keys = _ARGUMENT_KEYS if entry in ARGUMENTS else _KEYS
        values = _object(text) if complete or entry in ARGUMENTS else {entry: text}
        found = [("", entry, "unusable", text)] if values is None else _entries(values, keys)
        for owner, key, meaning, value in found:
            statements.setdefault((place, owner), Statement(place, owner, complete)).add(meaning, key, value)
    return list(statements.values())


def is_outdated(entry: str, text: str) -> bool:
    """Whether a metadata entry says what the tensors say once they are written again, or may not fit them."""
    statements = stated_by_metadata({entry: text})
    return any(not entry.startswith("ss_") or "rslora" in statement.values for statement in statements)


def check_plain(statements: Iterable[Statement]) -> None:
    """ValueError where a place says that there is more than LoRA matrices."""
    for statement in statements:
        if statement.is_on("dora"):
            key = statement._single("dora")[0]
            raise ValueError(f"it is a DoRA, which is not read: {key} in {statement.place} is true")


def _entries(
    values: Mapping[str, Any], keys: Mapping[str, str], owner: str = ""
) -> Iterator[tuple[str, str, str, Any]]:
    """Owner, key, meaning and value of what has a known key."""
    for name, value in values.items():
        before, _, key = name.rpartition(".")
        whose = ".".join(filter(None, (owner, before)))
        if key in keys:
            yield "" if whose == WHOLE else whose, key, keys[key], value
        elif isinstance(value, Mapping):
            yield from _entries(value, keys, ".".join(filter(None, (whose, key))))


def _object(text: str) -> Mapping[str, Any] | None:
    """The object that JSON holds, or a list of key=value; {} for nothing, None for something else."""
    value = _parsed(text)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = dict(one.partition("=")[::2] for one in value)
    return {} if value is None else value if isinstance(value, Mapping) else None


def _parsed(value: Any) -> Any:
    """What a text holds: nothing, a number or JSON; else the text."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in _NOTHING:
        return None
    for parse in (float, json.loads):
        try:
            return parse(value)
        except ValueError:
            continue
    return value


# --- what holds for a layer -------------------------------------------------------------------------


def agreed_alpha(statements: Sequence[Statement], layer: Layer, names: Collection[str]) -> float | None:
    """The alpha of a layer in which all places agree that name one; `names` are those of all layers.

    In each place the layer's own entry counts before its component's, and that before one for all.
    ValueError where they do not agree, and as `Statement.alpha`.
    """
    agreed: dict[str, float] = {}
    for place in dict.fromkeys(statement.place for statement in statements):
        for level in _levels([s for s in statements if s.place == place], layer, names):
            found = {f"{s.owner} {place}".strip(): a for s in level if (a := s.alpha(layer)) is not None}
            if found:
                agreed |= found
                break
    (first, alpha), *others = agreed.items() if agreed else [("", None)]
    for other, value in others:
        if not math.isclose(value, alpha, rel_tol=1e-4):
            raise ValueError(f"the alpha of {layer.name} is {alpha:g} in {first}, but {value:g} in {other}")
    return alpha


def check_alpha(alpha: float, statements: Sequence[Statement], layer: Layer, names: Collection[str]) -> None:
    """ValueError for a tensor's alpha that cannot be used, or may lack the square root of rsLoRA."""
    if alpha == 0:
        raise ValueError(f"the alpha of {layer.name} is 0: its update would do nothing")
    stated = agreed_alpha([s for s in statements if s.is_on("rslora")], layer, names)
    if stated is not None and not math.isclose(alpha, stated, rel_tol=0.05):  # tensors may be coarse
        raise ValueError(f"the alpha of {layer.name} is {alpha:g}, but {stated:g} by what is said of rsLoRA")


def _levels(
    statements: Sequence[Statement], layer: Layer, names: Collection[str]
) -> Iterator[list[Statement]]:
    """Statements of the layer alone, of its component, of all."""
    yield [s for s in statements if s.owner in (layer.name, *layer.others)]
    layers = {*names, *(name.partition(".")[2] for name in names)}
    components = [
        s for s in statements
        if s.owner and "." not in s.owner and s.owner not in layers
        and (TEXT_COMPONENT.fullmatch(s.owner) is not None) == layer.text
    ]  # fmt: skip
    yield [s for s in components if layer.name.startswith(f"{s.owner}.")] or components
    yield [s for s in statements if not s.owner]
