"""What determines a picture, beside the models: the job with prompt, size and seed, and the settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal

from core.config.arguments import number, text, truth, whole_number
from gdf.cfg import CfgSettings
from gdf.names import SAMPLER_NAMES, TIME_NAMES, check_name

PUBLISHED_STEPS = 20  # at this many steps the last step's r is the one that training uses
FP8_NAMES = ("off", "auto", "on")
TRAINING_R = 0.05  # noise condition of the low-resolution pass in training (paper section 4.1)


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    prompt: str
    height: int
    width: int
    seed: int
    negative_prompt: str = ""
    template: str = ""  # with choices and wildcards, of which the prompt was made
    negative_template: str = ""
    settings: Settings | None = None  # its own; None: those of the run

    def values(self) -> dict[str, Any]:
        """What is its own, by name, without settings."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "settings"}


@dataclass(frozen=True)
class Settings:
    """How the passes sample; the defaults are the published ones for text to image.

    Raises ValueError for a value outside its range and TypeError for one of another kind, naming it.
    """

    steps: int = PUBLISHED_STEPS  # of each of Stage C's two passes
    cfg: float = 4.0
    cfg_end: float | None = None  # at the last step, linear in between; None: as cfg
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # of t, outside it the unconditional half is not computed
    cfg_rescale: float = 0.7
    shift: float = 1.0
    sampler: str = "ddpm"
    guidance_r: float | Literal["last_step"] | None = None  # None: the last step at 20 steps, else 0.05
    guidance_unconditional: float = 1.0  # share of the guidance in the half that cfg moves away from
    steps_b: int = 10
    cfg_b: float = 1.1
    sampler_b: str = "ddpm"
    stage_a_tiled: bool = False  # True: always; False: only where the picture is large
    steps_lr: int | None = None  # of the low-resolution pass; None: as steps
    reuse: int = 1  # steps of the high-resolution pass that share what Stage C's inner levels make
    fp8: Literal["off", "auto", "on"] = "off"  # products in float8: auto where the device has them
    weighted_prompts: bool = False  # (a house:1.3) and [less] weight parts of prompts
    long_prompts: bool = False  # prompts of more tokens than the text encoder takes, in chunks
    times: str = "uniform"  # of Stage C's steps
    cfg_lr: float | None = None  # of the low-resolution pass; None: as cfg
    cfg_hr: float | None = None  # of the high-resolution pass; None: as cfg
    lr_only: bool = False  # the low-resolution pass alone, its latent decoded at its own size
    lr_size: tuple[int, int] | None = None  # px (height, width) of the picture that the pass belongs to

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("steps", "steps_b", "steps_lr", "reuse"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        check_name("value of fp8", self.fp8, FP8_NAMES)
        for name in ("cfg", "cfg_end", "cfg_b", "cfg_lr", "cfg_hr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:  # a NaN is neither
                raise ValueError(f"{name} must be a number from 0 up, not {value}; 1 turns cfg off")
        if not math.isfinite(self.guidance_unconditional):
            raise ValueError(f"guidance_unconditional must be a number, not {self.guidance_unconditional}")
        if self.shift <= 0:
            raise ValueError(f"shift must be above 0, not {self.shift}")
        if isinstance(self.guidance_r, float | int) and not 0 < self.guidance_r < 1:
            raise ValueError(f"guidance_r must lie between 0 and 1 or be 'last_step', not {self.guidance_r}")
        if isinstance(self.guidance_r, str) and self.guidance_r != "last_step":
            raise ValueError(f"guidance_r must be a number or 'last_step', not {self.guidance_r!r}")
        for sampler in (self.sampler, self.sampler_b):
            check_name("sampler", sampler, SAMPLER_NAMES)
        check_name("spacing of times", self.times, TIME_NAMES)
        _ = self.cfg_low

    @property
    def steps_low(self) -> int:
        """Steps of Stage C's low-resolution pass."""
        return self.steps if self.steps_lr is None else self.steps_lr

    @property
    def cfg_low(self) -> CfgSettings:
        """Classifier-free guidance of Stage C's low-resolution pass."""
        return self._cfg(self.cfg_lr)

    @property
    def cfg_high(self) -> CfgSettings:
        """Classifier-free guidance of Stage C's high-resolution pass."""
        return self._cfg(self.cfg_hr)

    def _cfg(self, own: float | None) -> CfgSettings:
        weight = self.cfg if own is None else own
        return CfgSettings(weight, self.cfg_end, self.cfg_rescale, self.cfg_interval)

    @property
    def cfg_stage_b(self) -> CfgSettings:
        """Classifier-free guidance of Stage B."""
        return CfgSettings(self.cfg_b, rho=self.cfg_rescale)

    @property
    def extra_guidance_r(self) -> float | None:
        """The noise condition of an extra evaluation for the guidance; None: taken at the last step."""
        published = self.steps_low == PUBLISHED_STEPS and self.times == "uniform"
        if self.guidance_r == "last_step" or (self.guidance_r is None and published):
            return None
        return TRAINING_R if self.guidance_r is None else float(self.guidance_r)


def settings_from(values: Mapping[str, Any]) -> Settings:
    """The settings among values by name, as JSON has them; what is not there has its default."""
    known = {name: values[name] for name in Settings.__dataclass_fields__ if name in values}
    return Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in known.items()})


# Pictures that take a fraction of the time and are a little worse: docs/performance.md has how much.
FAST: Mapping[str, Any] = MappingProxyType({
    "steps": 12, "steps_lr": 10, "sampler": "dpmpp_2m", "cfg_interval": (0.1, 0.9), "reuse": 2,
    "steps_b": 6, "sampler_b": "dpmpp_2m", "cfg_b": 1.0, "fp8": "auto",
})  # fmt: skip


# Arguments of a call that are no settings, and what callers of other libraries call ours.
OF_CALLS = ("prompt", "height", "width", "seed", "num_images", "negative_prompt", "observer", "progress",
            "wildcards", "init_image", "strength", "region", "image_prompt", "batch")  # fmt: skip
ELSEWHERE = {
    "guidance_scale": "cfg", "cfg_scale": "cfg", "num_inference_steps": "steps", "generator": "seed",
    "num_images_per_prompt": "num_images", "callback": "observer", "scheduler": "sampler",
    "callback_on_step_end": "observer", "control_weight": "set_control(..., weight=)",
    "control_image": "set_control", "lora": "set_loras", "loras": "set_loras", "image": "set_control",
}  # fmt: skip


def changed(settings: Settings | None, default: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings, or else the default ones, with changes by name; TypeError for an unknown name."""
    if settings is not None and not isinstance(settings, Settings):
        raise TypeError(f"settings must be core.config.settings.Settings(...), not {settings!r}")
    known = Settings.__dataclass_fields__
    for name in changes:
        if name not in known:
            near = ELSEWHERE.get(name) or next(iter(get_close_matches(name, [*OF_CALLS, *known], n=1)), None)
            way = f"did you mean {near}?" if near else f"it takes {', '.join((*OF_CALLS, *known))}"
            raise TypeError(f"a call has no argument {name!r}: {way}")
    return replace(settings or default, **changes)


def _check_types(settings: Settings) -> None:
    """TypeError for the first value of another kind than its field's."""
    for name in ("steps", "steps_b", "reuse", *(["steps_lr"] if settings.steps_lr is not None else [])):
        whole_number(name, getattr(settings, name))
    for name in ("cfg", "cfg_rescale", "shift", "cfg_b", "guidance_unconditional"):
        number(name, getattr(settings, name))
    for name in ("sampler", "sampler_b", "fp8", "times"):
        text(name, getattr(settings, name))
    for name in ("stage_a_tiled", "weighted_prompts", "long_prompts", "lr_only"):
        truth(name, getattr(settings, name))
    for name in ("cfg_end", "cfg_lr", "cfg_hr"):
        if getattr(settings, name) is not None:
            number(name, getattr(settings, name))
    if not isinstance(settings.guidance_r, str | None):
        number("guidance_r", settings.guidance_r)
    pair = settings.cfg_interval
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"cfg_interval must be two numbers, as in (0.0, 1.0), not {pair!r}")
    for value in pair:
        number("cfg_interval", value)
    size = settings.lr_size
    if size is not None and (not isinstance(size, tuple | list) or len(size) != 2):
        raise TypeError(f"lr_size must be two numbers (height, width), as in (2048, 2048), not {size!r}")
    for side in size or ():
        whole_number("lr_size", side)
