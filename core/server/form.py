"""What a user of the page fills in, and the order that it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from core.config.control_types import HOLE
from core.config.given_control import GivenControl
from core.config.presets import PRESETS
from core.config.settings import FAST, Settings
from core.pipeline.resolution import same_aspect
from core.server.api import control_of
from core.server.orders import Beginning, Order
from core.server.service import Service
from core.server.stored import SHOWN
from core.server.uploads import from_base64, read_upload

LORAS = 3  # rows of the page
TEXT, LARGE, CONTROL = "Text to image", "Upscale", "Control"
LORA, HISTORY = "Personalised", "History"
SIDES = {  # height and width, in the preset's own size
    "square": (1, 1), "landscape": (0.75, 1), "portrait": (1, 0.75), "wide": (9 / 16, 1), "tall": (1, 9 / 16),
}  # fmt: skip
FEW = 4  # small pictures, where no other number is asked for
STEP = 32  # px that sizes are rounded to


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
    x: float | None  # of the region that is made anew
    y: float | None
    region_width: float | None
    region_height: float | None
    beside: str | None  # path of an upload that says what to show
    beside_weight: float
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
        loras = {name: weight for name, weight in self.loras if name} if self.tab == LORA else {}
        begin, beside = self._begin(service), self._beside(service)
        own = begin is not None and (begin.large or begin.region is not None)
        sides = (None, None) if own else (whole("height", self.height), whole("width", self.width))
        others = self._others(sides, service)
        changes = {**(FAST if self.fast else {}), **others, **({} if self.fast else shown)}
        return Order(
            self.prompt or "", self.preset, *sides,
            whole("pictures", self.count) or 1, -1 if self.seed is None else whole("seed", self.seed),
            self.negative_prompt or "", changes, loras,
            (self._control(service),) if self.tab == CONTROL else (), begin, beside,
        )  # fmt: skip

    def explored(self, service: Service) -> Order:
        """The order of small pictures, of which one can be rendered high; errors as in `order`."""
        order = self.order(service)
        count = order.count if order.count > 1 else min(FEW, service.limits.pictures)
        return replace(order, count=count, changes={**order.changes, "lr_only": True})

    def _others(self, sides: tuple[int | None, int | None], service: Service) -> Mapping[str, Any]:
        """The settings that have no field; a low-resolution pass of another shape is not among them."""
        if (lr_size := self.others.get("lr_size")) is None:
            return self.others
        if None not in sides and same_aspect(sides, lr_size, service.models.geometry(self.preset)):
            return self.others
        return {name: value for name, value in self.others.items() if name != "lr_size"}

    def _begin(self, service: Service) -> Beginning | None:
        if self.tab == LARGE:
            if self.small is None:
                raise ValueError("add the picture that is to be made large")
            picture = opened(self.small, "the picture", service)
            return Beginning(picture, self.large_strength, True, self.factor)
        region = self._region() if self.tab == TEXT else None
        if self.tab != TEXT or self.start is None:
            return None
        picture = opened(self.start, "the picture", service)
        return Beginning(picture, self.start_strength, region=region)

    def _region(self) -> tuple[int, int, int, int] | None:
        given = {"x": self.x, "y": self.y, "width": self.region_width, "height": self.region_height}
        x, y, width, height = (whole(f"the region's {name}", value) or 0 for name, value in given.items())
        if not any((x, y, width, height)):
            return None
        if self.start is None:
            raise ValueError("add the picture of which a region is made anew, or set the region to 0")
        if 0 in (width, height):
            raise ValueError("a region has a width and a height: fill in both, or set all four numbers to 0")
        return x, y, width, height

    def _beside(self, service: Service) -> tuple[tuple[Image.Image, float], ...]:
        if self.tab != TEXT or self.beside is None:
            return ()
        return ((opened(self.beside, "the picture beside the prompt", service), self.beside_weight),)

    def _control(self, service: Service) -> GivenControl:
        if not self.kind:
            raise ValueError("no ControlNet is here for these models")
        if self.picture is None:
            raise ValueError("add the picture that controls")
        picture = opened(self.picture, "the picture", service)
        mask = None
        if self.kind == HOLE:
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
