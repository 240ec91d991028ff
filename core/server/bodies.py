"""What the API takes, in the shape that OpenAI's clients send, with this system's own keys beside theirs."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any, Literal, get_type_hints

from fastapi import UploadFile
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model

from core.config.settings import Settings
from core.server.orders import Order

SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
SETTINGS = tuple(field.name for field in fields(Settings) if field.default is not MISSING)


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

    prompt: str = Field(description="what the picture shows")
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
    return int(found[1]), int(found[2])


Wanted = create_model("Wanted", __base__=_Own, **_settings_keys())


class Generation(Wanted):
    """Pictures from text."""

    loras: dict[str, float] = Field(default_factory=dict, description="weights of LoRAs, by name")


class Editing(Wanted):
    """Pictures from text and a picture, which is sent beside it."""

    prompt: str = Field("", description="what the picture shows; upscaling needs none")
    control: str | None = Field(None, description="by what the picture controls: canny, inpainting, …")
    control_weight: float | None = None
    ready: bool = Field(False, description="the picture shows what is seen, such as edges")
    strength: float | None = Field(None, description="how much of the picture is made anew, 0 to 1")
    upscale: bool = Field(False, description="make the picture itself large, as a whole")
    factor: float | None = Field(None, description="how much larger; or size gives a box that it fits into")


class EditForm(Editing):
    """The same as a form, with the files in it."""

    image: list[UploadFile] = Field(default_factory=list, description="a picture")
    images: list[UploadFile] = Field(default_factory=list, alias="image[]", description="the same, as a list")
    mask: UploadFile | None = Field(None, description="white, or transparent, where it is filled")


class JobBody(Generation, Editing):
    """Pictures from text, or also from a picture, as base64."""

    prompt: str = Field("", description="what the picture shows; upscaling needs none")
    image: str | None = Field(None, description="a picture, as base64; no URL is fetched")
    mask: str | None = Field(None, description="its mask, as base64")
