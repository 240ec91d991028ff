"""What a script that makes pictures was asked for: pictures, grids of them, or those of prompts in a loop."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from core import launch
from core.commands.flags import MODEL_FLAGS, is_mistake
from core.commands.grid import Cell, axes_of, bases_of, cells_of, labels_of
from core.commands.pictures import (
    ControlOf,
    Outcome,
    check_jobs,
    make_and_save,
    make_pictures,
    prepare,
    sentence_of,
    tell_plan,
    tell_uses,
)
from core.commands.prompts import Line, jobs_of, json_line
from core.config.settings import Job, Settings
from core.pictures.images import load_image, picture_stem, save_new_image
from core.pictures.sheets import grid_sheet
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import plan_for
from core.pipeline.steering import with_suffix
from core.printable import say

LOST = "it was not made"  # as its process ended before


def make_asked(
    arguments: argparse.Namespace,
    pipeline: UltraPixelPipeline,
    jobs: Sequence[Job],
    settings: Settings,
    model_flags: Sequence[str] = MODEL_FLAGS,
    control: ControlOf | None = None,
) -> int:
    """Make and save the jobs' pictures as `make_pictures` does, their grids (--grid), or those of --loop."""
    if arguments.loop:
        return make_loop(arguments, pipeline, settings, model_flags, control)
    make = make_grids if arguments.grid else make_pictures
    return make(arguments, pipeline, jobs, settings, model_flags, control)


# --- grids ----------------------------------------------------------------------------------------


def make_grids(
    arguments: argparse.Namespace,
    pipeline: UltraPixelPipeline,
    jobs: Sequence[Job],
    settings: Settings,
    model_flags: Sequence[str] = MODEL_FLAGS,
    control: ControlOf | None = None,
) -> int:
    """Make each job's pictures over the axes of --grid, and their sheets; 1 where a picture lacks, else 0.

    An error costs the pictures that it concerns, and stands in their place. ValueError where that is all.
    """
    axes = axes_of(arguments.grid)
    sheets = [(base, cells_of(base, axes, settings)) for base in bases_of(jobs, axes)]
    cells = [_possible(cell, pipeline) for _, own in sheets for cell in own]
    numbers = [number for number, cell in enumerate(cells) if cell.job is not None]
    wrong = list(dict.fromkeys(cell.error for cell in cells if cell.error))
    if not numbers:
        raise ValueError(wrong[0])
    made = [cells[number].job for number in numbers]
    for sentence in wrong if launch.is_main() else ():
        say(f"warning: {sentence}; the grid's other pictures are made", sys.stderr)
    check_jobs(pipeline, made, settings, control)
    if arguments.dry_run:
        tell_plan(pipeline, made, settings)
        return 0
    prepare(arguments, pipeline, made, settings)
    outcome = make_and_save(arguments, pipeline, made, settings, model_flags, control, forgiving=True)
    tell_uses(pipeline)
    if not launch.is_main():
        return 0
    for sentence in dict.fromkeys(outcome.errors.values()):
        say(f"error: {sentence}", sys.stderr)
    shown = [_shown(cell, outcome, numbers.index(i) if cell.job else None) for i, cell in enumerate(cells)]
    record = pipeline.record(settings, {name: getattr(arguments, name) for name in model_flags})
    columns, names = labels_of(axes)
    for number, (base, own) in enumerate(sheets):
        found = shown[number * len(own) : (number + 1) * len(own)]
        rows = [found[start : start + len(columns)] for start in range(0, len(found), len(columns))]
        sheet = grid_sheet([[_opened(each) for each in row] for row in rows], columns, names, base.prompt)
        first = next((cell.job for cell in own if cell.job is not None), base)
        stem = f"{picture_stem(first.prompt, first.height, first.width, first.seed)}_grid"
        metadata = {**record.metadata(first), "grid": list(arguments.grid)}
        text, provenance = record.text(first), getattr(arguments, "provenance", False)
        path = save_new_image(sheet, arguments.output_dir, stem, "png", metadata, text, provenance)
        say(f"grid: {path}", sys.stdout)
    if len(outcome.paths) == len(cells):
        return 0
    launch.end_launch(launch.PATIENCE)  # which would answer the exit code with a traceback
    return 1


def _possible(cell: Cell, pipeline: UltraPixelPipeline) -> Cell:
    """The cell, without its job where no picture can have that size."""
    try:
        if cell.job is not None:
            plan_for(pipeline.config_c, cell.job.height, cell.job.width)
        return cell
    except ValueError as error:
        return replace(cell, job=None, error=str(error))


def _shown(cell: Cell, outcome: Outcome, number: int | None) -> Path | str:
    """The file of a cell's picture, or why there is none."""
    if number is None:
        return cell.error
    return outcome.paths.get(number) or outcome.errors.get(number, LOST)


def _opened(shown: Path | str) -> object:
    try:
        return shown if isinstance(shown, str) else load_image(shown)
    except (OSError, ValueError) as error:  # somebody moved it
        return str(error)


# --- prompts in a loop ----------------------------------------------------------------------------


def make_loop(
    arguments: argparse.Namespace,
    pipeline: UltraPixelPipeline,
    settings: Settings,
    model_flags: Sequence[str] = MODEL_FLAGS,
    control: ControlOf | None = None,
) -> int:
    """Make the pictures of prompts from standard input, line by line, until it ends.

    A line is a prompt, or an object of JSON as in a prompt file. One that is wrong costs a sentence.
    """
    if launch.processes() > 1:
        raise ValueError("--loop is for one process, as one reads what is typed: start it without torchrun")
    if not arguments.dry_run:
        prepare(arguments, pipeline, [], settings)
    if sys.stdin.isatty():
        say("type a prompt and press Enter; Ctrl-D ends", sys.stderr)
    number = 0  # of the next picture
    for place, content in _stdin_lines():
        try:
            jobs = jobs_of([_typed(content, f"line {place}")], arguments, settings, number)
            number += len(jobs)
            if control is not None:
                jobs = [with_suffix(job) for job in jobs]
            _make_line(arguments, pipeline, jobs, settings, model_flags, control)
        except Exception as error:
            if not is_mistake(error):
                raise
            say(f"error: {sentence_of(error)}", sys.stderr)
    if not arguments.dry_run:
        tell_uses(pipeline)
    return 0


def _stdin_lines() -> Iterator[tuple[int, bytes]]:
    """Lines of standard input that are not empty, with their numbers, as soon as each is there."""
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        if line.strip():
            yield number, line.strip()


def _typed(content: bytes, place: str) -> Line:
    try:
        line = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{place}: it is not UTF-8 text") from None
    return json_line(line, place) if line.startswith('{"') else Line(line, place=place)


def _make_line(
    arguments: argparse.Namespace,
    pipeline: UltraPixelPipeline,
    jobs: Sequence[Job],
    settings: Settings,
    model_flags: Sequence[str],
    control: ControlOf | None,
) -> None:
    if arguments.grid:
        make_grids(arguments, pipeline, jobs, settings, model_flags, control)
        return
    check_jobs(pipeline, jobs, settings, control)
    if arguments.dry_run:
        tell_plan(pipeline, jobs, settings)
    else:
        make_and_save(arguments, pipeline, jobs, settings, model_flags, control)
