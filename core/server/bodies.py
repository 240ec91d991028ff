"""What the API takes, in the shape that OpenAI's clients send, with this system's own keys beside theirs."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any, Literal, get_type_hints

from fastapi import UploadFile
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model

from core.config.settings import Settings
from core.server.orders import Order, going_on

MOST_CONTROLS = 8  # at once: each is a picture in memory
SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
REGION = re.compile(",".join([r" *(\d{1,6}) *"] * 4))
SETTINGS = tuple(field.name for field in fields(Settings) if field.default is not MISSING)

# Settings that low-resolution passes do not know.
LATE = ("cfg_hr", "guidance_unconditional", "reuse", "steps_b", "cfg_b", "sampler_b", "stage_a_tiled")


class Ignored(BaseModel):
    """Keys of OpenAI's clients that say nothing here."""

    background: str | None = None
    input_fidelity: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    quality: str | None = None
    style: str | None = None
    user: str | None = None


def _settings_keys() -> dict[str, Any]:
    """The fields of `Settings`, each of which may be left out."""
    hints = get_type_hints(Settings)
    return {name: (hints[name] | None, None) for name in SETTINGS}


class _Own(Ignored):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field("", description="what the picture shows; it may stay empty where one is made large")
    model: str | None = Field(
        None, validation_alias=AliasChoices("model", "preset"), description="a preset of GET /v1/models"
    )
    n: int = Field(1, description="how many pictures")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto")
    seed: int = Field(-1, description="of the first picture; the next count up; -1 draws one")
    negative_prompt: str = Field("", description="what the picture should not show")
    response_format: Literal["url", "b64_json"] = "url"
    output_format: Literal["png"] = "png"
    stream: Literal[False] = False

    def order(self, preset: str, **given: Any) -> Order:
        """The order that it is, of this preset where none is named; ValueError for a wrong size."""
        width, height = _sides(self.size)
        changes = {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}
        return Order(
            self.prompt, self.model or preset, height, width, self.n, self.seed, self.negative_prompt,
            changes, **given,
        )  # fmt: skip


def _sides(size: str | None) -> tuple[int | None, int | None]:
    """Width and height."""
    if size in (None, "auto"):
        return None, None
    if not (found := SIZE.fullmatch(size)):
        raise ValueError(f"size must be WIDTHxHEIGHT, as in 1024x768, or auto, not {size[:80]!r}")
    width, height = int(found[1]), int(found[2])
    if not width or not height:
        raise ValueError(f"size must have at least one pixel a side, not {size}")
    return width, height


BESIDE = (*LATE, *Ignored.model_fields, "from_picture", "size", "response_format")  # when going on


Wanted = create_model("Wanted", __base__=_Own, **_settings_keys())


class Generation(Wanted):
    """Pictures from text, or one from a small one of the server."""

    loras: dict[str, float] = Field(default_factory=dict, description="weights of LoRAs, by name")
    from_picture: str | None = Field(
        None,
        description="the name of a picture that the server made: its low-resolution pass is gone on from, at "
        "the size; everything else is the picture's",
    )

    def further(self, earlier: Order) -> Order:
        """The order that goes on from an earlier one; ValueError for keys that would change its picture."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in BESIDE and value != field.get_default(call_default_factory=True):
                raise ValueError(f"the picture that is gone on from has its own {name}: leave it out")
        width, height = _sides(self.size)
        changes = {name: value for name in LATE if (value := getattr(self, name)) is not None}
        return going_on(earlier, height, width, changes)


class Editing(Wanted):
    """Pictures from text and a picture, which is sent beside it."""

    control: str | None = Field(None, description="by what the picture controls: canny, inpainting, …")
    control_weight: float | None = None
    ready: bool = Field(False, description="the picture shows what is seen, such as edges")
    strength: float | None = Field(None, description="how much of the picture is made anew, 0 to 1")
    upscale: bool = Field(False, description="make the picture itself large, as a whole")
    factor: float | None = Field(None, description="how much larger; or size gives a box that it fits into")
    region: str | None = Field(None, description="X,Y,WIDTH,HEIGHT: these pixels alone are made anew")
    image_prompt_weight: float | None = Field(None, description="how much image_prompt counts; 1 if left out")

    @property
    def pixels(self) -> tuple[int, int, int, int] | None:
        """The region; ValueError for a wrong one."""
        if self.region is None:
            return None
        if not (found := REGION.fullmatch(self.region)):
            raise ValueError(f"region must be X,Y,WIDTH,HEIGHT, as in 20,20,40,40, not {self.region[:80]!r}")
        return tuple(map(int, found.groups()))


class EditForm(Editing):
    """The same as a form, with the files in it."""

    image: list[UploadFile] = Field(default_factory=list, description="a picture")
    images: list[UploadFile] = Field(default_factory=list, alias="image[]", description="the same, as a list")
    mask: UploadFile | None = Field(None, description="white, or transparent, where it is filled")
    image_prompt: UploadFile | None = Field(None, description="a picture that says what to show")


class ControlBody(BaseModel):
    """One of several pictures that control."""

    model_config = ConfigDict(extra="forbid")

    control: str = Field(description="by what it controls: canny, inpainting, …")
    image: str = Field(description="the picture, as base64")
    mask: str | None = Field(None, description="of inpainting, as base64")
    weight: float | None = None
    ready: bool = Field(False, description="the picture shows what is seen, such as edges")


class JobBody(Generation, Editing):
    """Pictures from text, or also from a picture, as base64."""

    image: str | None = Field(None, description="a picture, as base64; no URL is fetched")
    mask: str | None = Field(None, description="its mask, as base64")
    image_prompt: str | None = Field(None, description="a picture that says what to show, as base64")
    controls: list[ControlBody] = Field(
        default_factory=list, max_length=MOST_CONTROLS, description="pictures that control together"
    )
