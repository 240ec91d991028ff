"""A picture's settings, back to what makes it again: the values of the form, or an order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from core.config.presets import PRESETS
from core.config.settings import Settings, settings_from
from core.pipeline.steering import SUFFIX
from core.server.orders import Order
from core.weights.lora.merging import split_weight

SHOWN = ("steps", "cfg", "sampler")  # settings that have a field of their own
GIVEN = ("control", "controls", "strength", "image_prompt")  # tell that pictures were given, but not which


def from_settings(stored: Mapping[str, Any], presets: Sequence[str]) -> dict[str, Any]:
    """The form's values, by field, that make a picture again, with that one of the presets that made it.

    Those of a small picture make the large one.
    """
    known = {field.name: field.default for field in fields(Settings)}
    others = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in stored.items()
        if name in known and name not in SHOWN and value != known[name] and list_of(known[name]) != value
    }
    if others.pop("lr_only", False):
        others.setdefault("lr_size", (stored["height"], stored["width"]))
    found = {name: stored[name] for name in ("height", "width", "seed", *SHOWN) if name in stored}
    for name in ("prompt", "negative_prompt"):
        found[name] = str(stored.get(name, ""))
    if stored.get("control") or stored.get("controls"):
        found["prompt"] = found["prompt"].removesuffix(SUFFIX)
    preset = next((name for name in presets if _made_it(name, stored)), None)
    loras = [split_name(text) for text in stored.get("lora") or () if isinstance(text, str)]
    return {**found, "others": others, "count": 1, "fast": False, "loras": loras,
            **({} if preset is None else {"preset": preset})}  # fmt: skip


def order_from(stored: Mapping[str, Any], presets: Sequence[str]) -> Order:
    """The order that makes a picture again, but for pictures that it was made of.

    ValueError where none of the presets made it.
    """
    found = from_settings(stored, presets)
    if "preset" not in found:
        raise ValueError("the models that made this picture are not here")
    return Order(
        found["prompt"], found["preset"], stored["height"], stored["width"], 1, stored["seed"],
        found["negative_prompt"], asdict(settings_from(stored)), dict(found["loras"]),
    )  # fmt: skip


def made_of_pictures(stored: Mapping[str, Any]) -> bool:
    """Whether a picture was made of others, which its settings do not hold."""
    return any(stored.get(name) for name in GIVEN)


def list_of(value: Any) -> Any:
    """A tuple as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def split_name(text: str) -> tuple[str, float]:
    """The name and weight of a LoRA as pictures name it; the weight is 1 where it is none."""
    try:
        path, weight = split_weight(text)
    except ValueError:
        path, weight = text, 1.0
    return Path(path).stem, weight


def _made_it(preset: str, stored: Mapping[str, Any]) -> bool:
    named = PRESETS[preset]
    own = {"config_b": named.config_b, "pretrained_path": named.pretrained_path}
    return all(Path(str(stored.get(key))).name == Path(value).name for key, value in own.items())
