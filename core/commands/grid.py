"""Grids (--grid): the pictures of one prompt over the values of one or two settings, and their sheet."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from core.config.arguments import whole_number
from core.config.settings import Job, Settings

OF_JOBS = ("seed", "height", "width", "negative_prompt")
WORDS = {"none": None, "true": True, "false": False}


@dataclass(frozen=True)
class Axis:
    """A setting and its values, as they were written and as they are."""

    name: str
    texts: tuple[str, ...]
    values: tuple[object, ...]


@dataclass(frozen=True)
class Cell:
    """A place of a sheet: the job of its picture, or why it can have none."""

    row: int
    column: int
    job: Job | None
    error: str = ""


def axes_of(given: Sequence[str] | None) -> list[Axis]:
    """The axes that --grid names, the first across; ValueError for what is no setting, or has no values."""
    axes = [_axis(text) for text in given or ()]
    if len(axes) > 2:
        raise ValueError(f"--grid takes one setting or two, not {len(axes)}: a sheet has two directions")
    if len({axis.name for axis in axes}) < len(axes):
        raise ValueError(f"--grid names {axes[0].name} twice: give all its values at once, as in seed=1,2,3")
    return axes


def _axis(text: str) -> Axis:
    name, equals, listed = text.partition("=")
    texts = tuple(part.strip() for part in listed.split(","))
    known = (*OF_JOBS, *Settings.__dataclass_fields__)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ValueError(f"--grid {text}: there is no setting {name!r} (did you mean {near}?)")
    if not equals or not all(texts):
        raise ValueError(f"--grid {text}: write the values behind it, as in {name}=A,B,C")
    if twice := [value for value in texts if texts.count(value) > 1]:
        raise ValueError(f"--grid {text}: {twice[0]} comes twice")
    return Axis(name, texts, tuple(texts if name == "negative_prompt" else map(value_of, texts)))


def value_of(text: str) -> object:
    """What a value is that was written: a number, two as in 0.1:0.9, none, true, false, or text."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    parts = [_number(part) for part in text.split(":")]
    if None in parts:
        return text
    return parts[0] if len(parts) == 1 else tuple(parts)


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def bases_of(jobs: Sequence[Job], axes: Sequence[Axis]) -> list[Job]:
    """One job for each sheet: those that differ in nothing but what the axes change."""
    alike = {axis.name: axis.values[0] for axis in axes if axis.name in OF_JOBS}
    return list({replace(job, **alike): job for job in jobs}.values())


def cells_of(base: Job, axes: Sequence[Axis], settings: Settings) -> list[Cell]:
    """The cells of a job's sheet, row by row; a value that is wrong costs those that have it."""
    across, down = axes[0], axes[1] if len(axes) > 1 else None
    below = enumerate(down.values) if down else [(0, None)]
    return [
        _cell(base, settings, (row, column), {across.name: x, **({down.name: y} if down else {})})
        for (row, y), (column, x) in product(below, enumerate(across.values))
    ]


def _cell(base: Job, settings: Settings, place: tuple[int, int], values: dict[str, object]) -> Cell:
    own = {name: value for name, value in values.items() if name in OF_JOBS}
    others = {name: value for name, value in values.items() if name not in OF_JOBS}
    try:
        for name in {*own} - {"negative_prompt"}:
            whole_number(name, own[name])
        changed = replace(base.settings or settings, **others) if others else base.settings
        if "negative_prompt" in own:
            own["negative_template"] = ""
        return Cell(*place, replace(base, **own, settings=changed))
    except (TypeError, ValueError) as error:
        return Cell(*place, None, str(error))


def labels_of(axes: Sequence[Axis]) -> tuple[list[str], list[str]]:
    """What stands above the columns and beside the rows of a sheet."""
    columns, *rows = ([f"{axis.name} {text}" for text in axis.texts] for axis in axes)
    return columns, rows[0] if rows else [""]
