"""Which pictures the flags ask for: prompts, also from files with a line for each, and with wildcards.

It loads no torch.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from core.config.arguments import DRAW_SEED, check_count, first_seed, number, text, whole_number
from core.config.settings import Job, Settings
from core.config.wildcards import Wildcards
from core.launch import is_main, processes
from core.pictures.files import check_format
from core.printable import say

CSV_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
DELIMITERS = ",;\t"
WHOLE = ("width", "height", "seed", "number")  # columns that hold whole numbers
COLUMNS = ("prompt", "negative_prompt", *WHOLE, "cfg")


@dataclass(frozen=True)
class Line:
    """A prompt, and what it has of its own; None: as the flags say."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    number: int | None = None  # of pictures
    cfg: float | None = None
    place: str = ""  # where it stands, for errors


# --- lines to jobs --------------------------------------------------------------------------------


def lines_of(arguments: argparse.Namespace) -> list[Line]:
    """The prompts that the flags name, none with --loop; ValueError if they name none, or no picture."""
    check_count("--num_image", arguments.num_image)
    if getattr(arguments, "loop", False):
        return []
    if arguments.prompt_file is not None:
        return read_lines(arguments.prompt_file)
    if arguments.prompt is None:
        raise ValueError('no prompt was given: add --prompt "what the picture shows", or --prompt_file FILE')
    return [Line(text("--prompt", arguments.prompt))]


def jobs_of(
    lines: Iterable[Line], arguments: argparse.Namespace, settings: Settings, first: int = 0
) -> list[Job]:
    """The jobs of lines, the i-th of a run with --seed + i, `first` being the number of those before.

    A line's own seed counts up over its pictures. ValueError names the line that is wrong.
    """
    folder = getattr(arguments, "wildcards", None)
    wildcards = None if folder is None else Wildcards(folder)
    numbers = count(first)
    return [job for line in lines for job in _jobs_of(line, arguments, settings, numbers, wildcards)]


def _jobs_of(
    line: Line,
    arguments: argparse.Namespace,
    settings: Settings,
    numbers: Iterator[int],
    wildcards: Wildcards | None,
) -> Iterator[Job]:
    pictures = arguments.num_image if line.number is None else line.number
    own_seed = drawn_seed(line.place) if line.seed == DRAW_SEED else line.seed
    asked = arguments.negative_prompt if line.negative_prompt is None else line.negative_prompt
    prompts = line.prompt, text("--negative_prompt", asked)
    templates = [getattr(arguments, "templates", {}).get(prompt, "") for prompt in prompts]
    for i in range(pictures):
        in_run = next(numbers)
        seed = arguments.seed + in_run if own_seed is None else own_seed + i
        size = line.height or arguments.height, line.width or arguments.width
        job = Job(prompts[0], *size, seed, prompts[1], *templates)
        try:
            check_format(arguments.format, *size)
            own = None if line.cfg is None else replace(settings, cfg=line.cfg)
            yield replace(job if wildcards is None else wildcards.fill(job), settings=own)
        except ValueError as error:
            raise ValueError(_placed(line.place, error)) from None


def _placed(place: str, sentence: object) -> str:
    return f"{place}: {sentence}" if place else str(sentence)


def drawn_seed(place: str = "") -> int:
    """A seed, the same in all processes, which is said once; `place` says where it was asked for."""
    if processes() == 1:
        seed = first_seed(DRAW_SEED)
    else:
        from core.commands.sharing import agreed  # loads torch

        seed = agreed(_placed(place, "seed"), lambda: first_seed(DRAW_SEED))
    if is_main():
        say(_placed(place, f"seed {seed} was drawn"), sys.stderr)
    return seed


# --- files of prompts -----------------------------------------------------------------------------


def read_lines(path: str | Path) -> list[Line]:
    """The prompts of a file: CSV or JSON lines, by its suffix, else text with one a paragraph.

    ValueError names the line that is wrong, and says if there is none.
    """
    content = _content(path)
    suffix = Path(path).suffix.lower()
    if suffix in CSV_SUFFIXES:
        lines = list(_csv_lines(content, path))
    elif suffix in JSON_SUFFIXES:
        rows = enumerate(content.split("\n"), 1)  # JSON may hold what else ends a line
        lines = [json_line(row, f"{path}, line {place}") for place, row in rows if row.strip()]
    else:
        lines = [Line(prompt) for prompt in _paragraphs(content)]
    if not lines:
        raise ValueError(f"{path}: the prompt file holds no prompt; write one a paragraph, row or line")
    return lines


def _content(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: the prompt file is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(
            f"--prompt_file {path} cannot be read ({error.strerror}): name a text file"
        ) from None


def _paragraphs(content: str) -> list[str]:
    prompts = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", content)]
    return [prompt for prompt in prompts if prompt]


def _csv_lines(content: str, path: str | Path) -> Iterator[Line]:
    header = next(filter(str.strip, content.split("\n")), "")
    delimiter = max(DELIMITERS, key=header.count)
    rows = csv.reader(io.StringIO(content.lstrip(), newline=""), delimiter=delimiter, strict=True)
    above = content[: len(content) - len(content.lstrip())].count("\n")
    try:
        names = [name.strip() for name in next(rows, [])]
        _check_columns(names, f"{path}, line {above + 1}")
        for row in rows:
            if any(cell.strip() for cell in row):
                yield _csv_line(names, row, f"{path}, line {above + rows.line_num}")
    except csv.Error as error:
        raise ValueError(f"{path}, line {above + rows.line_num}: this is no CSV ({error})") from None


def _csv_line(names: Sequence[str], row: Sequence[str], place: str) -> Line:
    if len(row) > len(names):
        raise ValueError(
            f"{place}: it has {len(row)} values, but {len(names)} columns: a value with a comma needs quotes"
        )
    cells = {name: cell.strip() for name, cell in zip(names, row, strict=False)}
    return line_of({name: cell for name, cell in cells.items() if cell}, place)


def json_line(row: str, place: str) -> Line:
    """The prompt of a line of JSON, an object or a text; ValueError names the place."""
    try:
        values = json.loads(row, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: this is no line of JSON ({error})") from None
    if isinstance(values, str):
        values = {"prompt": values}
    if not isinstance(values, Mapping):
        raise ValueError(f'{place}: write an object a line, as in {{"prompt": "a red house", "seed": 3}}')
    return line_of({name: value for name, value in values.items() if value is not None}, place)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_once([name for name, _ in pairs])
    return dict(pairs)


def line_of(values: Mapping[str, Any], place: str) -> Line:
    """A line of values by the names of columns, also as text; ValueError names the place."""
    _check_columns(values, place, whole=False)
    if not str(values.get("prompt", "")).strip():
        raise ValueError(f"{place}: there is no prompt")
    try:
        return Line(**{name: _value(name, value) for name, value in values.items()}, place=place)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def _check_columns(names: Iterable[str], place: str, whole: bool = True) -> None:
    """ValueError for an unknown column, one that comes twice and, of a `whole` header, no prompt."""
    for name in names:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0)[0]
            raise ValueError(
                f"{place}: there is no column {name!r} (did you mean {near}?); known are {', '.join(COLUMNS)}"
            )
    if whole and "prompt" not in names:
        raise ValueError(f"{place}: the first line names the columns, and prompt must be one of them")
    if whole:
        _check_once(list(names), f"{place}: ")


def _check_once(names: Sequence[str], place: str = "") -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{place}{twice[0]} comes twice")


def _value(name: str, value: Any) -> Any:
    """A column's value, checked."""
    if name not in (*WHOLE, "cfg"):
        return text(name, value)
    if isinstance(value, str):
        value = _number(name, value)
    value = number(name, value) if name == "cfg" else whole_number(name, value)
    if name == "number":
        return check_count(name, value)
    if name in ("width", "height") and value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return value


def _number(name: str, value: str) -> float:
    try:
        return float(value) if name == "cfg" else int(value)
    except ValueError:
        kind = "a number" if name == "cfg" else "a whole number"
        raise ValueError(f"{name} must be {kind}, not {value!r}") from None
