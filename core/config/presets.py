"""Presets: which configurations and guidance belong together, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.config.settings import Settings
from core.paths import PROJECT, at_home


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
    upscale_strength: float = 1.0
    lora: tuple[str, ...] = ()  # of test_personalized

    @property
    def settings(self) -> Settings:
        """How its passes sample, where nothing else is asked."""
        return Settings(cfg=self.cfg)


_STAGE_C, _GUIDANCE = "configs/training/t2i.yaml", "models/ultrapixel_t2i.safetensors"
_STAGE_B_SMALL, _STAGE_B_BIG = "configs/inference/stage_b_1b.yaml", "configs/inference/stage_b_3b.yaml"

PRESETS = {
    "small-big": Preset(_STAGE_C, _STAGE_B_SMALL, _GUIDANCE),
    "big-big": Preset(_STAGE_C, _STAGE_B_BIG, _GUIDANCE),
    "lite": Preset("configs/inference/stage_c_1b.yaml", _STAGE_B_SMALL, "none"),
    "tiny": Preset(
        "configs/tiny/stage_c.yaml", "configs/tiny/stage_b.yaml", "models/tiny/ultrapixel_t2i.safetensors",
        control_file="models/tiny/controlnet_{control}.safetensors", height=512, width=512, cfg=2.0,
        control_weight=1.3, upscale_strength=0.5, lora=("models/tiny/lora_striped_balloon.safetensors:1.4",),
    ),
}  # fmt: skip
DEFAULT = PRESETS["small-big"]
EMBEDDED = "tiny"  # the preset whose weights lie in the repository


def preset_named(name: str) -> Preset:
    """The preset of a name; ValueError, with the known ones, if there is none."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def of_project(path: str) -> str:
    """The path below the project's folder, if it leads somewhere there, whatever the working directory."""
    below = PROJECT / path
    return str(below) if below.exists() else path


def models_folder(folder: str | Path | None) -> Path | None:
    """The folder of weights that is named instead of models/ (None: that); ValueError if it is none."""
    if folder is None:
        return None
    path = Path(at_home(str(folder))).absolute()
    if not path.is_dir():
        raise ValueError(f"models: {folder} is not a folder; name the one that holds the weight files")
    return path


def with_models(path: str, folder: Path | None) -> str:
    """The path of a weight file, below `folder` instead of below models/; None: the project's own models/."""
    for models in (Path("models"), PROJECT / "models"):
        if Path(path).is_relative_to(models):
            rest = Path(path).relative_to(models)
            return str(folder / rest) if folder is not None else of_project(str(Path("models") / rest))
    return path
