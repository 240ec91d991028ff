"""Configuration files: YAML to frozen dataclasses, with errors that name file, key and way out."""

import difflib
import json
import logging
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from core import launch
from core.config.arguments import FLOAT16_NAMES, FLOAT16_REFUSED
from core.config.schema import (
    ControlConfig,
    ControlTrainConfig,
    Dtype,
    PersonalizedTrainConfig,
    PreviewerTrainConfig,
    RecogniserTrainConfig,
    RunConfig,
    StageATrainConfig,
    StageBConfig,
    StageBTrainConfig,
    StageCConfig,
    StageCTrainConfig,
    TextTrainConfig,
    TrainConfig,
    controlnet_sizes,
    effnet_sizes,
    guidance_sizes,
    previewer_sizes,
    stage_a_sizes,
    stage_b_sizes,
    stage_c_sizes,
)
from core.paths import located, repository_of

log = logging.getLogger(__name__)

T = TypeVar("T")

# What other trainers call our keys.
OTHER_NAMES = {
    "learning_rate": "lr", "min_lr": "lr_end", "lr_warmup_steps": "warmup_updates",
    "warmup_steps": "warmup_updates", "max_train_steps": "updates", "max_steps": "updates",
    "num_train_steps": "updates", "steps": "updates", "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum_steps", "resolution": "image_size",
    "checkpointing_steps": "save_every", "save_steps": "save_every", "checkpoints_total_limit": "keep",
    "train_data_dir": "webdataset_path", "instance_data_dir": "webdataset_path",
    "instance_prompt": "tmp_prompt", "rank": "lora_rank", "network_dim": "lora_rank",
    "mixed_precision": "dtype", "ema_decay": "ema", "dataloader_num_workers": "num_workers",
    "output_dir": "checkpoint_path",
}  # fmt: skip
# What a key on the command line replaces in the file: what would contradict it, or hide it.
REPLACES = {
    "webdataset_path": "scenes", "scenes": "webdataset_path", "prior_path": "prior_scenes",
    "prior_scenes": "prior_path", "image_size": "image_size_schedule", "pictures_at_once": "grad_accum_steps",
}  # fmt: skip
# Written, so always from the working directory; other keys that end in _path are read.
OUTPUT_PATHS = ("checkpoint_path", "output_path", "cache_path", "export_path", "export_effnet_path")


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the file, the key and what would be right."""


# --- loading --------------------------------------------------------------------------------------


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into the frozen dataclass `cls`.

    `overrides` are `key=value` with YAML values, dotted for nested keys (`geometry.stride=8`). A path is from
    the working directory or, of what is read and is not there, from the repository that the file lies in.
    A ConfigError of one sentence names the file and the key of whatever is unknown, missing or mistyped.
    """
    return _load(cls, path, overrides, {})


def load_stage_c(path: str | Path, overrides: Sequence[str] = ()) -> StageCConfig:
    """Read Stage C's configuration from an inference or a training file; training keys are only checked."""
    return _load(StageCConfig, path, overrides, _training_keys())


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read what all trainings have in common from the file of any; its other keys are only checked."""
    kinds = (TrainConfig, PersonalizedTrainConfig, ControlTrainConfig, StageATrainConfig, StageBTrainConfig,
             PreviewerTrainConfig, StageCTrainConfig, TextTrainConfig, RecogniserTrainConfig)  # fmt: skip
    return _load(RunConfig, path, overrides, _keys_of(*kinds))


def load_control(path: str | Path, overrides: Sequence[str] = ()) -> ControlConfig:
    """Read which ControlNet a configuration of Stage C names; its other keys are only checked."""
    return _load(ControlConfig, path, overrides, _training_keys())


def load_stage_b(path: str | Path, overrides: Sequence[str] = ()) -> StageBConfig:
    """Read Stage B's configuration; training keys, which published files carry, are only checked."""
    return _load(StageBConfig, path, overrides, get_type_hints(TrainConfig))


def as_yaml(config: object) -> str:
    """Plain YAML of a configuration with every default and size written out; `load` reads it back."""
    if isinstance(config, StageCConfig):
        config = replace(
            config,
            stage_c=stage_c_sizes(config),
            guidance=guidance_sizes(config),
            previewer=previewer_sizes(config),
            effnet=effnet_sizes(config),
        )
    if isinstance(config, ControlTrainConfig):
        config = replace(config, controlnet=controlnet_sizes(config))
    if isinstance(config, StageBConfig):
        config = replace(config, stage_b=stage_b_sizes(config), stage_a=stage_a_sizes(config))
    plain = json.loads(json.dumps(asdict(config)))  # tuples to lists
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=True)


def _training_keys() -> dict[str, Any]:
    """The keys, with their types, that files of Stage C's trainings and of control carry."""
    return _keys_of(TrainConfig, PersonalizedTrainConfig, ControlTrainConfig)


def _keys_of(*kinds: type) -> dict[str, Any]:
    return {key: hint for kind in kinds for key, hint in get_type_hints(kind).items()}


def _load(cls: type[T], path: str | Path, overrides: Sequence[str], dropped: Mapping[str, Any]) -> T:
    """Build `cls` from a file that may also hold the keys of `dropped` (name: type), only checked."""
    path = located(str(path))
    values, own = _read(path, overrides), get_type_hints(cls)
    source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    if cls is StageCConfig and "stage_a_checkpoint_path" in values:
        raise ConfigError(f"{path} is a configuration of Stages B and A: name it as config_b")
    _refuse_unknown(values, [*own, *dropped], "", source)
    for key in [key for key in values if key not in own]:
        _convert(values.pop(key), dropped[key], key, source)
    return _with_paths(_build(cls, values, source), repository_of(path), source)


def _with_paths(config: T, root: Path | None, source: str) -> T:
    """The configuration with its paths as they are used; `root` as in `core.paths.located`."""
    paths = {}
    for key, value in vars(config).items():
        if key.endswith("_path") and isinstance(value, str):
            base = None if key in OUTPUT_PATHS else root
            try:
                paths[key] = "::".join(located(part, base) for part in value.split("::"))
            except ValueError as error:
                raise ConfigError(f"{source}: in '{key}', {error}") from None
    return replace(config, **paths)


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
    _drop_replaced(values, {override.partition("=")[0].strip().partition(".")[0] for override in overrides})
    return values


def _drop_replaced(values: dict[str, Any], given: set[str]) -> None:
    """Leave out what keys `given` on the command line replace; two that are both given there stay."""
    for key in given & REPLACES.keys():
        if values[key] is not None and REPLACES[key] not in given:
            values.pop(REPLACES[key], None)


class _Loader(yaml.SafeLoader):
    """Reads plain YAML; a key that is there twice, of which the last counts, is a warning."""

    def __init__(self, source: str, text: str) -> None:
        super().__init__(text)
        self.name = source

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines and launch.is_main():
                log.warning("%s: '%s' is there twice, in lines %d and %d: the last counts",
                            self.name, key.value, lines[key.value], line)  # fmt: skip
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, partial(_Loader, source))
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
            near = nearest_key(str(key), known)
            raise ConfigError(
                f"{source}: '{prefix}{key}' is not a known key; the nearest known one is '{prefix}{near}'"
            )


def nearest_key(name: str, known: Iterable[str]) -> str:
    """The known key that an unknown one means: what other trainers call so, or spelt most alike."""
    known, name = sorted(known), name.lower().replace("-", "_")
    meant = OTHER_NAMES.get(name)
    return meant if meant in known else difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


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
    reason = f" ({FLOAT16_REFUSED})" if hint == Dtype and value in FLOAT16_NAMES else ""
    raise ConfigError(f"{source}: '{key}' must be {describe_type(hint)}, not {_show(value)}{reason}")


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
    raise ConfigError(f"{source}: '{key}' must be {describe_type(hint)}, not {_show(value)}")


def _as_float(value: Any) -> float | None:
    """A finite number, also from text: YAML 1.1 reads 1e-4, without a dot, as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def describe_type(hint: Any) -> str:
    """A type in words, such as "a whole number"."""
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    if hint in names:
        return names[hint]
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, options))
    if get_origin(hint) is tuple:
        if options[-1] is Ellipsis:
            return f"a list whose entries are each {describe_type(options[0])}"
        return f"a list of {len(options)} entries ({'; '.join(map(describe_type, options))})"
    if is_dataclass(hint):
        return f"a mapping with keys such as '{fields(hint)[0].name}'"
    return " or ".join(describe_type(option) for option in options if option is not types.NoneType)


def _show(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.80}"
