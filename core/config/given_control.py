"""A control as a user names it, in Python or as KIND:PICTURE[:WEIGHT[:START:END]]; no torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config.arguments import last_number, number
from core.config.control_types import control_type

if TYPE_CHECKING:
    from PIL.Image import Image

FORM = "KIND:PICTURE[:WEIGHT[:START:END]]"


@dataclass(frozen=True)
class GivenControl:
    """A picture that controls, and how; a weight, file or size of None is the preset's or the file's own.

    It acts at times t of a pass, which runs from 1 (noise) to 0 (the picture): from `start` down to `end`.
    ValueError or TypeError for an unknown control, and for times that are none.
    """

    control: str
    picture: str | Path | Image | None = None
    mask: str | Path | Image | None = None  # for inpainting, white where it fills
    weight: float | None = None
    file: str | Path | None = None  # the ControlNet's weights
    size: int | None = None  # px at which edges are found
    keep_aspect: bool = False  # they are found without squeezing the picture to a square
    ready: bool = False  # the picture shows what the ControlNet sees
    start: float = 1.0
    end: float = 0.0
    hr: bool = False  # it acts in the high-resolution pass too
    outpaint: Sequence[int] | None = None  # px to fill around the picture: left, top, right, bottom

    def __post_init__(self) -> None:
        control_type(self.control)
        start, end = number("start", self.start), number("end", self.end)
        if not 0 <= end < start <= 1:  # a NaN is neither
            raise ValueError(
                "a control acts from START down to END, between 1 (noise) and 0 (the picture), as in 1 and "
                f"0.4, not from {start:g} to {end:g}"
            )


def check_hr(controls: Sequence[Any], reuse: int, region: bool) -> None:
    """ValueError where controls act in a high-resolution pass of which inner levels or a region are made."""
    if not any(control.hr for control in controls):
        return
    if reuse > 1:
        raise ValueError(
            f"control of the high-resolution pass and reuse {reuse} (--fast sets it) do not go together, as "
            "inner levels are controlled: use reuse 1"
        )
    if region:
        raise ValueError("control of the high-resolution pass is for whole pictures: leave out the region")


def read_control(text: str, ready: bool = False) -> GivenControl:
    """The control that a text names in the form KIND:PICTURE[:WEIGHT[:START:END]]; ValueError if none."""
    kind, _, place = text.partition(":")
    numbers: list[float] = []
    while len(numbers) < 3 and (found := last_number(place, "number", FORM)) is not None:
        place, numbers = found[0], [found[1], *numbers]
    if not place or len(numbers) == 2:
        raise ValueError(f"a control is {FORM}, as in canny:house.png:0.8, not {text!r}")
    weight, start, end = {0: (None, 1.0, 0.0), 1: (*numbers, 1.0, 0.0), 3: numbers}[len(numbers)]
    return GivenControl(kind, place, weight=weight, ready=ready, start=start, end=end)
