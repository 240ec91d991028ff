"""Configuration: YAML files to frozen dataclasses, with errors that name file, key and way out."""

import difflib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
Dtype = Literal["bfloat16", "float32"]
Target = Literal["epsilon", "x0", "v", "rectified_flow"]

FLOAT16_REFUSED = "float16 gives black pictures or NaN in Stage B and C"


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the file, the key and what would be right."""


# ---------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class StageCSizes:
    """Constructor values of `modules.stage_c.StageC`; the defaults are the published 3.6B model."""

    c_cond: int = 2048  # width of the condition tokens
    c_hidden: tuple[int, ...] = (2048, 2048)  # width per level
    nhead: tuple[int, ...] = (32, 32)  # attention heads per level
    blocks: tuple[tuple[int, ...], tuple[int, ...]] = ((8, 24), (24, 8))  # down; up, deepest level first
    c_clip_text: int = 1280  # width of the text tokens
    c_clip_text_pooled: int = 1280  # width of the pooled text
    c_clip_img: int = 768  # width of the image embedding
    c_clip_seq: int = 4  # tokens per pooled embedding


@dataclass(frozen=True)
class GuidanceSizes:
    """Sizes of one guidance block; the defaults are the published ones for the 3.6B model (section 3.1)."""

    ind: int = 2048  # width of Stage C's features
    ch: int = 1024  # width of the guidance tokens
    n_head: int = 32
    head_dim: int = 32
    n_groups: int = 64  # weight tokens per layer of the coordinate MLP
    f_dim: int = 1024  # width of the coordinate MLP


@dataclass(frozen=True)
class StageBSizes:
    """Constructor values of `modules.stage_b.StageB`; -1 heads for a level without attention."""

    c_hidden: tuple[int, ...]
    nhead: tuple[int, ...]
    blocks: tuple[tuple[int, ...], tuple[int, ...]]  # down; up, deepest level first
    block_repeat: tuple[tuple[int, ...], tuple[int, ...]]  # in the same order
    c_cond: int = 1280
    c_clip: int = 1280


@dataclass(frozen=True)
class StageASizes:
    """Constructor values of `modules.stage_a.StageA`; the defaults are the published model."""

    c_hidden: int = 384
    bottleneck_blocks: int = 12
    codebook_size: int = 8192


@dataclass(frozen=True)
class PreviewerSizes:
    """Constructor values of `modules.previewer.Previewer`; the default is the published model."""

    c_hidden: int = 512


STAGE_C_VERSIONS: dict[str, StageCSizes] = {
    "3.6B": StageCSizes(),
    "1B": StageCSizes(c_cond=1536, c_hidden=(1536, 1536), nhead=(24, 24), blocks=((4, 12), (12, 4))),
}
STAGE_B_VERSIONS: dict[str, StageBSizes] = {
    "3B": StageBSizes(
        (320, 640, 1280, 1280), (-1, -1, 20, 20), ((2, 6, 28, 6), (6, 28, 6, 2)), ((1, 1, 1, 1), (3, 3, 2, 2))
    ),
    "700M": StageBSizes(
        (320, 576, 1152, 1152), (-1, 9, 18, 18), ((2, 4, 14, 4), (4, 14, 4, 2)), ((1, 1, 1, 1), (2, 2, 2, 2))
    ),
}


# --------------------------------------------------------------------------------------------- configs


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value == () or min(value if isinstance(value, tuple) else (value,)) <= 0:
            raise ValueError(f"'{name}' must be above 0, not {value}")


@dataclass(frozen=True)
class LatentGeometry:
    """How pixels relate to Stage C latents, and how large the low-resolution picture is."""

    compression: float = 42.67  # pixels per side of one Stage C latent pixel
    stride: int = 32  # pixels per side of one cell of the encoder
    lr_cells: int = 32  # the LR picture has about this many cells, squared
    lr_train_cells: int = 24  # the same in training

    def __post_init__(self) -> None:
        _require_positive(self, "compression", "stride", "lr_cells", "lr_train_cells")


@dataclass(frozen=True)
class StageCConfig:
    """Everything needed to run Stage C with its guidance; paths are relative to the working directory.

    `clip_text_path` and `clip_image_path` are local folders or hub ids. A folder holds the text model and its
    tokenizer together, or in `text_encoder/` and `tokenizer/`. Sizes left out follow from `model_version`.
    `guidance_strength`: (from this many latent pixels, strength on the up path), large to small.
    """

    model_version: str
    generator_checkpoint_path: str
    effnet_checkpoint_path: str | None = None
    previewer_checkpoint_path: str | None = None
    clip_text_path: str = "models"
    clip_image_path: str | None = None
    dtype: Dtype = "bfloat16"
    target: Target = "epsilon"
    stage_c: StageCSizes | None = None
    guidance: GuidanceSizes | None = None
    previewer: PreviewerSizes = PreviewerSizes()
    geometry: LatentGeometry = LatentGeometry()
    guidance_strength: tuple[tuple[int, float], ...] = ((9216, 0.7), (5184, 0.5), (0, 0.3))

    def __post_init__(self) -> None:
        stage_c_sizes(self)
        starts = [pixels for pixels, _ in self.guidance_strength]
        if not starts or starts[-1] != 0 or starts != sorted(set(starts), reverse=True):
            raise ValueError(
                "'guidance_strength' must list [latent pixels, strength] from large to small pixel counts, "
                f"the last of them 0, not {self.guidance_strength}"
            )


@dataclass(frozen=True)
class StageBConfig:
    """Everything needed to run Stage B and Stage A; paths are relative to the working directory."""

    model_version: str
    generator_checkpoint_path: str
    stage_a_checkpoint_path: str
    effnet_checkpoint_path: str | None = None
    dtype: Dtype = "bfloat16"
    target: Target = "epsilon"
    stage_b: StageBSizes | None = None
    stage_a: StageASizes = StageASizes()

    def __post_init__(self) -> None:
        stage_b_sizes(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageCConfig):
    """Training of the guidance parameters: Stage C's configuration and the keys of the published trainer."""

    experiment_id: str  # name of the run's folder
    checkpoint_path: str  # folder for checkpoints
    output_path: str  # folder for sample pictures
    webdataset_path: str  # folder (or shards) of training pictures
    lr: float = 1e-4
    batch_size: int = 4  # pictures per update: processes x pictures each x grad_accum_steps
    image_size: int | tuple[int, ...] = (1024, 2048, 2560, 3072, 3584, 3840, 4096, 4608)
    multi_aspect_ratio: tuple[str, ...] = (  # width/height, each also inverted
        "1/1", "1/2", "1/3", "2/3", "3/4", "1/5", "2/5", "3/5", "4/5", "1/6", "5/6", "9/16",
    )  # fmt: skip
    grad_accum_steps: int = 2
    updates: int = 40000
    backup_every: int = 5000  # updates between checkpoints that are kept
    save_every: int = 500  # updates between checkpoints to resume from, and samples
    warmup_updates: int = 500
    use_ddp: bool = True
    adaptive_loss_weight: bool = True
    seed: int = 0
    ema: float = 0.0  # decay of the running mean of the weights that is exported; 0: none
    keep: int = 2  # checkpoints beside those of backup_every
    num_workers: int = 4  # processes that decode pictures
    gradient_checkpointing: bool = True
    pretrained_path: str | None = None  # guidance weights to start from

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "lr", "batch_size", "image_size", "grad_accum_steps", "updates")
        _require_positive(self, "backup_every", "save_every")
        for ratio in self.multi_aspect_ratio:
            if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", ratio):
                raise ValueError(f"'multi_aspect_ratio' takes ratios such as 2/3, not {ratio!r}")


def stage_c_sizes(config: StageCConfig) -> StageCSizes:
    """Stage C's sizes: those given, else those of the model version (ValueError if that is unknown)."""
    return config.stage_c or _published(STAGE_C_VERSIONS, config.model_version, "stage_c")


def guidance_sizes(config: StageCConfig) -> GuidanceSizes:
    """The guidance's sizes: those given, else the published ones at Stage C's width."""
    return config.guidance or GuidanceSizes(ind=stage_c_sizes(config).c_hidden[0])


def stage_b_sizes(config: StageBConfig) -> StageBSizes:
    """Stage B's sizes: those given, else those of the model version (ValueError if that is unknown)."""
    return config.stage_b or _published(STAGE_B_VERSIONS, config.model_version, "stage_b")


def _published(versions: Mapping[str, T], version: str, key: str) -> T:
    if version not in versions:
        raise ValueError(
            f"'model_version' {version!r} is not a published one ({', '.join(versions)}) "
            f"and the sizes are not given as '{key}'"
        )
    return versions[version]


# --------------------------------------------------------------------------------------------- loading


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into the frozen dataclass `cls`.

    `overrides` are `key=value` with YAML values, dotted for nested keys (`geometry.stride=8`).
    A ConfigError of one sentence names the file and the key of whatever is unknown, missing or mistyped.
    """
    return _load(cls, path, overrides, {})


def load_stage_c(path: str | Path, overrides: Sequence[str] = ()) -> StageCConfig:
    """Read Stage C's configuration from an inference or a training file; training keys are only checked."""
    return _load(StageCConfig, path, overrides, get_type_hints(TrainConfig))


def load_stage_b(path: str | Path, overrides: Sequence[str] = ()) -> StageBConfig:
    """Read Stage B's configuration; training keys, which published files carry, are only checked."""
    return _load(StageBConfig, path, overrides, get_type_hints(TrainConfig))


def as_yaml(config: object) -> str:
    """Plain YAML of a configuration with every default and size written out; `load` reads it back."""
    if isinstance(config, StageCConfig):
        config = replace(config, stage_c=stage_c_sizes(config), guidance=guidance_sizes(config))
    if isinstance(config, StageBConfig):
        config = replace(config, stage_b=stage_b_sizes(config))
    plain = json.loads(json.dumps(asdict(config)))  # tuples to lists
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=True)


def _load(cls: type[T], path: str | Path, overrides: Sequence[str], dropped: Mapping[str, Any]) -> T:
    """Build `cls` from a file that may also hold the keys of `dropped` (name: type), only checked."""
    values, own = _read(path, overrides), get_type_hints(cls)
    source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    _refuse_unknown(values, [*own, *dropped], "", source)
    for key in [key for key in values if key not in own]:
        _convert(values.pop(key), dropped[key], key, source)
    return _build(cls, values, source)


def _read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        values = _parse(Path(path).read_text("utf-8-sig"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: this configuration file does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the file cannot be read as text ({error})") from None
    if values is None:
        raise ConfigError(f"{path}: the file is empty; it needs lines such as 'model_version: 3.6B'")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the file must hold 'key: value' lines, not {_show(values)}")
    for override in overrides:
        _apply(values, override)
    return values


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date with a 13th month
        mark = getattr(error, "problem_mark", None)
        cause = f"{error.problem} in line {mark.line + 1}" if mark else " ".join(str(error).split())
        raise ConfigError(f"{source}: this is not YAML: {cause}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, name = key.strip().split(".")
    if not equals or not name:
        raise ConfigError(f"the override {override!r} must be written key=value")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"the override {override!r} cannot be: '{parent}' is a value, not a mapping")
    values[name] = _parse(text, f"the override {override!r}")


def _build(cls: type[T], values: Mapping[str, Any], source: str, prefix: str = "") -> T:
    hints = get_type_hints(cls)
    _refuse_unknown(values, hints, prefix, source)
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    missing = [f"'{prefix}{name}'" for name in required if name not in values]
    if missing:
        noun = "key is" if len(missing) == 1 else "keys are"
        raise ConfigError(f"{source}: the required {noun} missing: {', '.join(missing)}")
    converted = {key: _convert(value, hints[key], prefix + key, source) for key, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise ConfigError(f"{source}: {f'in {prefix[:-1]!r}, ' if prefix else ''}{error}") from None


def _refuse_unknown(values: Mapping[str, Any], known: Iterable[str], prefix: str, source: str) -> None:
    known = sorted(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key).lower(), known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{source}: '{prefix}{key}' is not a known key; the nearest known one is '{prefix}{near}'"
            )


# --------------------------------------------------------------------------------------- value by value


def _convert(value: Any, hint: Any, key: str, source: str) -> Any:
    """`value` as the type that `hint` asks for, or a ConfigError that names the key and both."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, key, source)
    if origin is tuple and isinstance(value, (list, tuple)):
        hints = [options[0]] * len(value) if options[-1] is Ellipsis else options
        if len(hints) == len(value):
            pairs = enumerate(zip(value, hints, strict=True))
            return tuple(_convert(entry, inner, f"{key}[{i}]", source) for i, (entry, inner) in pairs)
    elif is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, source, f"{key}.")
    elif hint is float:
        number = _as_float(value)
        if number is not None:
            return number
    elif type(value) is hint or (origin is Literal and value in options):  # type: isinstance(True, int)
        return value
    reason = f" ({FLOAT16_REFUSED})" if hint == Dtype and value in ("float16", "fp16", "half") else ""
    raise ConfigError(f"{source}: '{key}' must be {_describe(hint)}, not {_show(value)}{reason}")


def _convert_union(value: Any, hint: Any, key: str, source: str) -> Any:
    options = [option for option in get_args(hint) if option is not types.NoneType]
    if value is None and len(options) < len(get_args(hint)):
        return None
    if len(options) == 1:
        return _convert(value, options[0], key, source)
    for option in options:
        try:
            return _convert(value, option, key, source)
        except ConfigError:
            continue
    raise ConfigError(f"{source}: '{key}' must be {_describe(hint)}, not {_show(value)}")


def _as_float(value: Any) -> float | None:
    """A finite number, also from text: YAML 1.1 reads 1e-4, without a dot, as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _describe(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    if hint in names:
        return names[hint]
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, options))
    if get_origin(hint) is tuple:
        if options[-1] is Ellipsis:
            return f"a list whose entries are each {_describe(options[0])}"
        return f"a list of {len(options)} entries ({'; '.join(map(_describe, options))})"
    if is_dataclass(hint):
        return f"a mapping with keys such as '{fields(hint)[0].name}'"
    return " or ".join(_describe(option) for option in options if option is not types.NoneType)


def _show(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.80}"
