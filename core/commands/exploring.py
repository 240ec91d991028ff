"""Flags to explore at low resolution and to go on from what was found; no torch is loaded here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.config.latents import read_stored
from core.config.yaml import load_stage_c
from core.launch import is_main
from core.pictures.files import format_of_file
from core.pictures.images import read_image_metadata
from core.pipeline.resolution import same_aspect
from core.printable import say

FROM = ("from_image", "from_lr", "from_latents")  # what gives the other flags their defaults
ORIGINS = ("from_lr", "from_latents")  # are written into pictures where they are given
PRESET_MODELS = ("config_c", "config_b", "pretrained_path")
FACTS = ("versions", "weights", "template", "negative_template")  # in pictures, besides values of flags


def add_exploring_flags(parser: argparse.ArgumentParser, path: Callable[[str], str]) -> None:
    """Small pictures first, and large ones from their latents; `path` reads a path of the command line."""
    group = parser.add_argument_group("exploring")
    group.add_argument(
        "--lr_only", action=argparse.BooleanOptionalAction, default=False,
        help="make the low-resolution pass alone: small pictures soon, and a sheet of them with their seeds "
        "(default: off)",
    )  # fmt: skip
    group.add_argument(
        "--save_latents", action="store_true", help="save each picture's latents beside it, to go on from"
    )
    group.add_argument(
        "--from_lr", type=path, metavar="LATENTS",
        help="go on from the low-resolution pass in this file, at any size of the same aspect ratio; the "
        "file gives the other flags' defaults",
    )  # fmt: skip
    group.add_argument(
        "--from_latents", type=path, metavar="LATENTS",
        help="decode the latent in this file anew, as with other --steps_b; the file gives the other flags' "
        "defaults",
    )  # fmt: skip
    group.add_argument(
        "--lr_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="px of the picture whose low-resolution pass it is (default: the picture's own)",
    )  # fmt: skip


def stored_defaults(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """What a picture or a file of latents gives as the flags' defaults; None where none is named.

    ValueError for several of them, and for what another script made.
    """
    given = {name: path for name in FROM if (path := getattr(arguments, name, None)) is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(f'--{name}' for name in given)} do not go together: give one of them"
        )
    ((name, path),) = given.items()
    stored = read_image_metadata(path) if name == "from_image" else dict(read_stored(path).settings)
    if name == "from_image":
        stored = {"format": format_of_file(Path(path)), **stored}
    others = [other for other in stored if stored[other] and not hasattr(arguments, other)]
    if foreign := sorted({*others} - {*FACTS}):
        raise ValueError(
            f"{path} was made with --{foreign[0]}, which this script does not have: use the one that made it"
        )
    values = {other: value for other, value in stored.items() if hasattr(arguments, other)}
    values["templates"] = _templates(stored)
    if name in ORIGINS:
        if arguments.preset is not None:  # its models were asked for, and their latents are others
            values = {other: value for other, value in values.items() if other not in PRESET_MODELS}
        values |= {**dict.fromkeys(ORIGINS), name: path}
    return values


def _templates(stored: Mapping[str, Any]) -> dict[str, str]:
    """The templates that a picture's prompts were made of, by these."""
    pairs = (("prompt", "template"), ("negative_prompt", "negative_template"))
    return {stored[made]: stored[template] for made, template in pairs if stored.get(template)}


def settle(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    stored: Mapping[str, Any],
    found: argparse.Namespace,
) -> None:
    """Choose what follows from going on at another size, where the command line leaves that open."""
    asked = _asked(parser, arguments, ("height", "width", "lr_size", "lr_only"))
    going_on = found.from_lr is not None and found.from_latents is None
    if "lr_only" not in asked and (going_on or asked & {"height", "width"}) and not found.from_latents:
        found.lr_only = False
    size, before = (found.height, found.width), (stored.get("height"), stored.get("width"))
    if None in before or size == before or "lr_size" in asked or found.from_latents is not None:
        return
    of = tuple(stored.get("lr_size") or before)
    if going_on or same_aspect(size, of, load_stage_c(found.config_c).geometry):
        found.lr_size = of
        return
    found.lr_size = None
    if is_main():
        say(
            f"warning: {size[0]} x {size[1]} (height x width) has another aspect ratio than the picture, "
            f"which had {of[0]} x {of[1]}: its low-resolution pass is another one, and so is its composition",
            sys.stderr,
        )


def _asked(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, names: Collection[str]
) -> set[str]:
    """The flags among these that the command line gives."""
    before = {name: parser.get_default(name) for name in names}
    parser.set_defaults(**dict.fromkeys(names))
    given = parser.parse_args(arguments)
    parser.set_defaults(**before)
    return {name for name in names if getattr(given, name) is not None}


def origins(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The flags that say what pictures went on from, where they are given."""
    return tuple(name for name in ORIGINS if getattr(arguments, name, None) is not None)
