"""Presets: which configurations and guidance belong together, by name."""

from __future__ import annotations

from dataclasses import dataclass

from core.settings import Settings


@dataclass(frozen=True)
class Preset:
    """Values of the flags of the same names; paths are found as in `core.paths.located`."""

    config_c: str
    config_b: str
    pretrained_path: str  # "none": without guidance
    control_file: str = "models/controlnet/{control}.safetensors"  # {control}: what the ControlNet sees
    height: int = 2048  # pixels
    width: int = 2048
    cfg: float = Settings.cfg
    control_weight: float = 0.7
    lora: tuple[str, ...] = ()  # of test_personalized


_STAGE_C, _GUIDANCE = "configs/training/t2i.yaml", "models/ultrapixel_t2i.safetensors"
_STAGE_B_SMALL, _STAGE_B_BIG = "configs/inference/stage_b_1b.yaml", "configs/inference/stage_b_3b.yaml"

PRESETS = {
    "small-big": Preset(_STAGE_C, _STAGE_B_SMALL, _GUIDANCE),
    "big-big": Preset(_STAGE_C, _STAGE_B_BIG, _GUIDANCE),
    "lite": Preset("configs/inference/stage_c_1b.yaml", _STAGE_B_SMALL, "none"),
    "tiny": Preset(
        "configs/tiny/stage_c.yaml", "configs/tiny/stage_b.yaml", "models/tiny/ultrapixel_t2i.safetensors",
        control_file="models/tiny/controlnet_{control}.safetensors", height=512, width=512, cfg=2.0,
        control_weight=1.3, lora=("models/tiny/lora_striped_balloon.safetensors",),
    ),
}  # fmt: skip
DEFAULT = PRESETS["small-big"]
EMBEDDED = "tiny"  # the preset whose weights lie in the repository
