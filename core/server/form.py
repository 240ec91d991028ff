"""What a user of the page fills in, and the order that it makes; and back, from a picture's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from core.config.presets import PRESETS
from core.config.settings import FAST, Settings
from core.pipeline.steering import SUFFIX
from core.server.api import control_of
from core.server.orders import Beginning, Order
from core.server.service import Service
from core.server.uploads import from_base64, read_upload
from core.weights.lora.merging import split_weight

LORAS = 3  # rows of the page
TEXT, LARGE, CONTROL = "Text to image", "Upscale", "Control"
LORA, HISTORY = "Personalised", "History"
SIDES = {  # height and width, in the preset's own size
    "square": (1, 1), "landscape": (0.75, 1), "portrait": (1, 0.75), "wide": (9 / 16, 1), "tall": (1, 9 / 16),
}  # fmt: skip
STEP = 32  # px that sizes are rounded to
SHOWN = ("steps", "cfg", "sampler")  # settings that have a field of their own


@dataclass(frozen=True)
class Filled:
    """The values of the form's fields, in the order in which the page lists them."""

    prompt: str
    negative_prompt: str
    preset: str
    height: float | None
    width: float | None
    count: float
    seed: float | None
    steps: float | None
    cfg: float | None  # None: the default of what is done
    sampler: str | None
    fast: bool
    others: Mapping[str, Any]  # settings of a picture that have no field
    tab: str
    kind: str
    picture: str | None  # path of an upload
    mask: str  # a data: URL of what was drawn, or empty
    mask_file: str | None  # path of an upload
    ready: bool
    weight: float | None
    start: str | None  # path of an upload that is gone out from
    start_strength: float
    small: str | None  # path of an upload that is made large
    factor: float
    large_strength: float
    loras: Sequence[tuple[str | None, float]]

    @classmethod
    def of(cls, values: Sequence[Any]) -> Filled:
        """From the values of all fields, those of the LoRAs at the end, name after weight."""
        own = len(fields(cls)) - 1
        rest = list(values[own:])
        return cls(*values[:own], list(zip(rest[::2], rest[1::2], strict=True)))

    def order(self, service: Service) -> Order:
        """The order; ValueError or TypeError for what is wrong with it."""
        shown = {name: getattr(self, name) for name in SHOWN if getattr(self, name) not in (None, "")}
        if "steps" in shown:
            shown["steps"] = whole("steps", shown["steps"])
        changes = {**(FAST if self.fast else {}), **self.others, **({} if self.fast else shown)}
        loras = {name: weight for name, weight in self.loras if name} if self.tab == LORA else {}
        large = self.tab == LARGE
        sides = (None, None) if large else (whole("height", self.height), whole("width", self.width))
        return Order(
            self.prompt or "", self.preset, *sides,
            whole("pictures", self.count) or 1, -1 if self.seed is None else whole("seed", self.seed),
            self.negative_prompt or "", changes, loras,
            self._control(service) if self.tab == CONTROL else None, self._begin(service),
        )  # fmt: skip

    def _begin(self, service: Service) -> Beginning | None:
        if self.tab == LARGE:
            if self.small is None:
                raise ValueError("add the picture that is to be made large")
            picture = opened(self.small, "the picture", service)
            return Beginning(picture, self.large_strength, True, self.factor)
        if self.tab != TEXT or self.start is None:
            return None
        return Beginning(opened(self.start, "the picture", service).convert("RGB"), self.start_strength)

    def _control(self, service: Service) -> Any:
        if not self.kind:
            raise ValueError("no ControlNet is here for these models")
        if self.picture is None:
            raise ValueError("add the picture that controls")
        picture = opened(self.picture, "the picture", service)
        mask = None
        if self.kind == "inpainting":
            if self.mask_file is not None:
                mask = opened(self.mask_file, "the mask", service)
            elif self.mask:
                drawn = read_upload(from_base64(self.mask, "the mask"), "the mask", service.limits)
                mask = drawn.resize(picture.size, Image.Resampling.BILINEAR)
        return control_of(self.kind, picture, mask, self.weight, self.ready)


def opened(path: str, what: str, service: Service) -> Image.Image:
    """An upload, which `core.server.uploads_only` has found to be one; ValueError as `read_upload`."""
    return read_upload(Path(path).read_bytes(), what, service.limits)


def whole(name: str, value: float | None) -> int | None:
    """A number field's value; ValueError for one that is not whole."""
    if value is None:
        return None
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{name} must be a whole number, not {value}")
    return int(value)


# --- from a picture's settings --------------------------------------------------------------------


def from_settings(stored: Mapping[str, Any], presets: Sequence[str]) -> dict[str, Any]:
    """The form's values, by field, that make a picture again, with that one of the presets that made it."""
    known = {field.name: field.default for field in fields(Settings)}
    others = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in stored.items()
        if name in known and name not in SHOWN and value != known[name] and list_of(known[name]) != value
    }
    found = {name: stored[name] for name in ("height", "width", "seed", *SHOWN) if name in stored}
    for name in ("prompt", "negative_prompt"):
        found[name] = str(stored.get(name, ""))
    if stored.get("control"):
        found["prompt"] = found["prompt"].removesuffix(SUFFIX)
    preset = next((name for name in presets if _made_it(name, stored)), None)
    loras = [split_name(text) for text in stored.get("lora") or () if isinstance(text, str)]
    return {**found, "others": others, "count": 1, "fast": False, "loras": loras,
            **({} if preset is None else {"preset": preset})}  # fmt: skip


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


# --- sizes ----------------------------------------------------------------------------------------


def sizes(preset: str, most: int) -> list[tuple[int, int]]:
    """Height and width of sizes to choose from: those of the preset's own, and of half and twice its side."""
    own = PRESETS[preset]
    found = {}
    for scale in (0.5, 1, 2):
        for high, wide in SIDES.values():
            size = tuple(round(scale * s / STEP) * STEP for s in (high * own.height, wide * own.width))
            if max(size) <= most:
                found[size] = None
    return list(found)


def told_size(service: Service, preset: str, size: tuple[int, int], settings: Settings) -> str:
    """A size as the page tells it, with memory and, once a picture was made, time."""
    gib = service.models.memory(preset, size, settings)
    memory = f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.0f} MiB"
    seconds = service.models.seconds(preset, size, settings)
    time = "" if seconds is None else f", about {told_seconds(seconds)}"
    return f"{size[1]} × {size[0]}: {memory} of memory{time}"


def told_seconds(seconds: float) -> str:
    """As people say it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
