"""Writes docs/configuration.md, the page of all configuration keys: python docs/make_keys.py

Key, type and default come from the dataclasses of the configuration, and the meaning from the comment behind
a field or right above it. So the page is never edited by hand: tests/test_docs.py compares it with `page()`.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from core.config.schema import (
    ControlConfig,
    ControlTrainConfig,
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
)
from core.config.yaml import describe_type

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# All configuration keys

<!-- Written by docs/make_keys.py from the dataclasses of the configuration: do not edit it by hand. -->

A configuration is a YAML file with lines `key: value`. Every key can also be set on a training's command line
as `key=value`, and a key inside another one with a dot, such as `geometry.stride=8`. A key that is not listed
here is an error that names the nearest known one. A relative path in a YAML file is looked for from the
working directory first, then from the root of the repository that the file lies in.

A list is shown by an example of what stands in it: `8` for a whole number, `0.5` for any number, `text` and
`true`. The sign `…` means more of the same.

The sections of the trainings list what each adds to the keys of [every training](#every-training) and, where
they say so, to those of a stage.
"""
ADDED = "It also takes the keys of {}."
SECTIONS: tuple[tuple[type, str, str], ...] = (
    (RunConfig, "Every training", "What all scripts in `train/` take."),
    (StageCConfig, "Stage C", "`--config_c` of the scripts in `inference/`, and the trainings with Stage C."),
    (StageBConfig, "Stage B", "`--config_b` of the scripts in `inference/`, and the training of Stage B."),
    (ControlConfig, "Control", "`--config_c` of `inference/test_controlnet.py`, and its training."),
    (TrainConfig, "Training of the guidance", "`train/train_t2i.py`."),
    (PersonalizedTrainConfig, "Training of a LoRA", "`train/train_personalized.py`."),
    (ControlTrainConfig, "Training of a ControlNet", "`train/train_ultrapixel_control.py`."),
    (StageCTrainConfig, "Training of Stage C", "`train/train_stage_c.py`."),
    (StageBTrainConfig, "Training of Stage B", "`train/train_stage_b.py`."),
    (StageATrainConfig, "Training of Stage A", "`train/train_stage_a.py`."),
    (PreviewerTrainConfig, "Training of the previewer", "`train/train_previewer.py`."),
    (TextTrainConfig, "Training of a text encoder", "`train/train_text_encoder.py`."),
    (RecogniserTrainConfig, "Training of a recogniser", "`train/train_recogniser.py`."),
)
TITLES = {cls: title for cls, title, _ in SECTIONS}
INSIDE = "Keys inside others"
EXAMPLES = {int: "8", float: "0.5", str: "text", bool: "true"}


@dataclass(frozen=True)
class Key:
    """A row of the page."""

    name: str
    type: str
    default: str
    meaning: str


# --- from the source ------------------------------------------------------------------------------


def comments(cls: type) -> dict[str, str]:
    """What stands behind each field that a dataclass declares itself, or right above it."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    declared = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: _behind(lines, node) or _above(lines, node) for node in declared}


def _behind(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment in a field's first line, without orders to the formatter."""
    end = node.end_col_offset if node.end_lineno == node.lineno else 0
    _, hash_sign, comment = lines[node.lineno - 1][end:].partition("#")
    return comment.strip() if hash_sign else ""


def _above(lines: list[str], node: ast.AnnAssign) -> str:
    found: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        found.insert(0, line.strip().removeprefix("#").strip())
    return " ".join(found)


# --- keys -----------------------------------------------------------------------------------------


def keys(cls: type) -> list[Key]:
    """The keys that a dataclass declares itself; ValueError for one without a comment."""
    hints, meanings = get_type_hints(cls), comments(cls)
    if silent := [name for name, meaning in meanings.items() if not meaning]:
        raise ValueError(f"{cls.__name__}.{silent[0]} has no comment that says what it means: write one")
    return [
        Key(field.name, _type_of(hints[field.name]), _default_of(field), meanings[field.name])
        for field in fields(cls)
        if field.name in meanings
    ]


def _type_of(hint: Any) -> str:
    if inner := dataclasses_of(hint):
        return f"[keys of its own](#{nested()[inner[0]]})"
    lists = [f"a list: `{_example_of(option)}`" for option in _options(hint) if get_origin(option) is tuple]
    others = [describe_type(option) for option in _options(hint) if get_origin(option) is not tuple]
    return ", or ".join([*others, *lists])


def _options(hint: Any) -> list[Any]:
    """The types that a value may have, but for none."""
    union = get_origin(hint) in (Union, UnionType)
    return [option for option in (get_args(hint) if union else [hint]) if option is not NoneType]


def _example_of(hint: Any) -> str:
    """What one writes for a type, such as `[[8, text], …]`."""
    first = _options(hint)[0]
    if get_origin(first) is not tuple:
        return EXAMPLES[first]
    parts = ["…" if part is Ellipsis else _example_of(part) for part in get_args(first)]
    return f"[{', '.join(parts)}]"


def _default_of(field: Field) -> str:
    if field.default is MISSING:
        return "needed"
    if field.default is None:
        return "none"
    if is_dataclass(field.default):
        return "its defaults"
    return f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    """A value as one writes it in a file."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def dataclasses_of(hint: Any) -> list[type]:
    """The dataclasses in a type, such as that in `Sizes | None`."""
    return [option for option in (hint, *get_args(hint)) if is_dataclass(option)]


def nested() -> dict[type, str]:
    """The dataclasses inside others, with the key that holds them, in the order of the page."""
    found: dict[type, str] = {}
    for cls, _, _ in SECTIONS:
        for name, hint in get_type_hints(cls).items():
            for inner in dataclasses_of(hint):
                found.setdefault(inner, name)
    return found


# --- the page -------------------------------------------------------------------------------------


def table(cls: type) -> Iterator[str]:
    """The rows of a dataclass in Markdown."""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key in keys(cls):
        cells = (f"`{key.name}`", key.type, key.default, key.meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def added(cls: type) -> str:
    """Which sections' keys a class takes beside its own."""
    links = [
        f"[{TITLES[base]}](#{_anchor(TITLES[base])})" for base in reversed(cls.__mro__[1:]) if base in TITLES
    ]
    most, last = ", ".join(links[:-1]), links[-1:]
    return f" {ADDED.format(' and '.join([most, *last] if most else last))}" if links else ""


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for cls, title, where in SECTIONS:
        parts.append("\n".join([f"## {title}\n", f"{where}{added(cls)}\n", *table(cls)]) + "\n")
    parts.append(f"## {INSIDE}\n\nLeft out, the sizes of networks follow from `model_version`.\n")
    for cls, name in nested().items():
        parts.append("\n".join([f"### {name}\n", *table(cls)]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
