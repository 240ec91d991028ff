"""What a client asks for, and whether it may."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from core.config.arguments import number, text, whole_number
from core.config.control_types import HOLE
from core.config.given_control import GivenControl
from core.config.presets import PRESETS, Preset
from core.config.settings import Settings, changed
from core.pipeline.origins import mended_size
from core.pipeline.passes import check_strength
from core.pipeline.region import Region
from core.pipeline.steering import CONTROLLED
from core.pipeline.upscaling import Upscaling
from core.server.limits import MAX_PROMPT, Limits

MAX_SEED = 2**63 - 1
STEPS = ("steps", "steps_lr", "steps_b")


@dataclass(frozen=True)
class Beginning:
    """A picture that is gone out from: another one is made of it, or it is itself made large as a whole."""

    picture: Image.Image
    strength: float | None = None
    large: bool = False
    factor: float | None = None  # of its own size, where it is made large
    region: tuple[int, int, int, int] | None = None  # x, y, width, height: these pixels alone are made anew

    @property
    def size(self) -> tuple[int, int]:
        """The picture's height and width."""
        return self.picture.height, self.picture.width


@dataclass(frozen=True)
class Order:
    """Pictures that a client asks for; what is None is the preset's."""

    prompt: str
    preset: str
    height: int | None = None
    width: int | None = None
    count: int = 1
    seed: int = -1  # draws one
    negative_prompt: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)  # of Settings
    loras: Mapping[str, float] = field(default_factory=dict)  # weights, by the names that the server lists
    controls: tuple[GivenControl, ...] = ()
    begin: Beginning | None = None
    prompts: tuple[tuple[Image.Image, float], ...] = ()  # pictures beside the prompt, with their weights

    @property
    def large(self) -> bool:
        """Whether a picture is made large."""
        return self.begin is not None and self.begin.large

    @property
    def mends(self) -> bool:
        """Whether a region of a picture is made anew."""
        return self.begin is not None and self.begin.region is not None

    @property
    def given(self) -> bool:
        """Whether pictures came with it."""
        return bool(self.controls or self.begin or self.prompts)

    def without_pictures(self) -> Order:
        """The same without pictures that came with it."""
        return replace(self, controls=(), begin=None, prompts=())

    def with_pictures_of(self, other: Order) -> Order:
        """The same with those that came with another one."""
        return replace(self, controls=other.controls, begin=other.begin, prompts=other.prompts)

    @property
    def settings(self) -> Settings:
        """All settings; ValueError or TypeError for a wrong one."""
        default = PRESETS[self.preset].settings if not self.controls else CONTROLLED
        return changed(None, default, self.changes)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width; a picture with a hole or a region has its own, and one made large its shape."""
        preset: Preset = PRESETS[self.preset]
        height, width = preset.height, preset.width
        if self.large:
            sides = self.height, self.width, self.begin.factor
            return Upscaling((height, width), *sides, strength=self.begin.strength or 1.0).size(
                self.begin.size
            )
        if self.mends:
            return mended_size(self.begin.size, self.height, self.width)
        for control in self.controls:
            if control.control == HOLE:
                height, width = control.picture.height, control.picture.width
        return self.height or height, self.width or width


def going_on(order: Order, height: int | None, width: int | None, changes: Mapping[str, Any]) -> Order:
    """The order of a picture, at a size or at its own, after the low-resolution pass of this order's."""
    own, before = (order.height, order.width), order.settings
    size = height or own[0], width or own[1]
    lr_size = before.lr_size or (None if size == own else own)
    changes = {**order.changes, "lr_only": False, "lr_size": lr_size, **changes}
    return replace(order, height=size[0], width=size[1], changes=changes)


def check_order(order: Order, limits: Limits, presets: Collection[str], loras: Collection[str]) -> None:
    """ValueError or TypeError for what is wrong with an order, or more than the limits allow.

    `presets` and `loras` are the names that the server has.
    """
    for name in ("prompt", "negative_prompt"):
        if len(text(name, getattr(order, name))) > MAX_PROMPT:
            raise ValueError(f"{name} has more than {MAX_PROMPT} letters, the most that is taken")
    if not order.prompt.strip() and not order.large and not order.prompts:
        raise ValueError("prompt is empty: say what the picture shows")
    if order.preset in PRESETS and order.preset not in presets:
        way = f"python models/download.py --preset {order.preset}"
        raise ValueError(f"the weights of the preset {order.preset} are not here: {way} fetches them")
    check_known("preset", order.preset, presets)
    for name in ("height", "width"):
        if getattr(order, name) is not None:
            whole_number(name, getattr(order, name))
    if max(order.size) > limits.side:
        raise ValueError(
            f"the picture has at most {limits.side} pixels a side here, not {order.size[0]} x "
            f"{order.size[1]} (height x width)"
        )
    if not 1 <= whole_number("the number of pictures", order.count) <= limits.pictures:
        raise ValueError(f"1 to {limits.pictures} pictures can be asked for at a time, not {order.count}")
    if not -1 <= whole_number("seed", order.seed) <= MAX_SEED:
        raise ValueError(f"seed must be -1, which draws one, or a number from 0 up, not {order.seed}")
    _check_steps(order.settings, limits)
    if order.begin is not None:
        _check_begin(order, order.begin)
    for _, weight in order.prompts:
        number("the weight of the image prompt", weight)
    for name, weight in order.loras.items():
        check_known("LoRA", name, loras)
        if not math.isfinite(number(f"the weight of {name}", weight)):
            raise ValueError(f"the weight of {name} must be a number, not {weight}")


def _check_begin(order: Order, begin: Beginning) -> None:
    if order.large and order.settings.lr_only:
        raise ValueError("no small picture comes before one that is made large: leave lr_only out")
    if order.large and (order.controls or order.prompts or order.mends):
        raise ValueError("what is made large takes neither a control, nor an image prompt, nor a region")
    if begin.strength is not None:
        check_strength(number("strength", begin.strength))
    if begin.region is not None:
        Region(*begin.region).check(begin.size)


def _check_steps(settings: Settings, limits: Limits) -> None:
    for name in STEPS:
        if (getattr(settings, name) or 0) > limits.steps:
            raise ValueError(f"{name} is at most {limits.steps} here, not {getattr(settings, name)}")


def check_known(what: str, name: object, known: Collection[str]) -> None:
    """ValueError, with the nearest or all of the known names, for another one."""
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    way = f"did you mean {near[0]}?" if near else f"there is {', '.join(known) or 'none'}"
    raise ValueError(f"{what} {str(name)[:80]!r} is not known here: {way}")
