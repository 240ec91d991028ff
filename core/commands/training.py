"""The command line of the training scripts; it loads no torch, as `core.commands.flags`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar, get_type_hints

from core import launch
from core.commands.flags import Parser, home_path
from core.config.batch_size import describe_batch, fitted_batch
from core.config.schema import RunConfig
from core.config.yaml import as_yaml, load, nearest_key

Config = TypeVar("Config", bound=RunConfig)
DRY_RUN = "dry_run"


def read_command(cls: type[Config], description: str) -> Config:
    """The configuration of a training script's command line; --dry_run prints it, resolved, and ends it."""
    parser = Parser(description)
    group = parser.add_argument_group("configuration")
    group.add_argument("config", type=home_path, help="a YAML file such as configs/training/t2i.yaml")
    group.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="any key of the configuration"
    )
    group.add_argument(f"--{DRY_RUN}", action="store_true", help="print the resolved configuration and stop")
    words = sys.argv[1:]
    with launch.told_once():
        arguments, unknown = parser.parse_known_intermixed_args(words)
        if unknown:
            parser.exit(2, f"error: {_explain_flag(words, unknown[0], [*get_type_hints(cls)])}\n")
    config = load(cls, arguments.config, arguments.overrides)
    if arguments.dry_run:
        fitted = fitted_batch(config)
        if launch.is_main():
            sys.stdout.write(f"{as_yaml(fitted)}# {describe_batch(fitted, launch.processes())}\n")
        parser.exit()
    return config


def _explain_flag(words: Sequence[str], flag: str, keys: Sequence[str]) -> str:
    """What to write instead of a flag that there is not; `words` are the whole command line."""
    name, equals, value = flag.lstrip("-").partition("=")
    near = name if name in keys else nearest_key(name, [*keys, DRY_RUN])
    if near == DRY_RUN:
        return f"there is no flag {flag}: it is called --{DRY_RUN}"
    if not equals:
        after = words[words.index(flag) + 1 :]
        value = after[0] if after and "=" not in after[0] and not after[0].startswith("--") else "VALUE"
    return f"there is no flag {flag}: the keys of the configuration come without dashes, as in {near}={value}"
