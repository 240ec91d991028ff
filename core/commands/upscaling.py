"""The run of inference/upscale.py: which pictures are made large, where they go, and what of broken ones."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir

from tqdm import tqdm

from core import launch
from core.commands.flags import MODEL_FLAGS, check_weights, make_pipeline, usage_table
from core.config.arguments import text
from core.config.settings import Job, Settings
from core.pictures.alike import write_alike
from core.pictures.images import picture_suffixes, prepare_folder, read_image_metadata
from core.pipeline.given import Original, original, size_of
from core.pipeline.made import Picture, Record
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import ProgressBars
from core.pipeline.resolution import plan_for
from core.pipeline.upscaling import Upscaling, without_idle_cfg
from core.printable import say

# What pictures are told to be made with, besides the models.
UPSCALING_FLAGS = (*MODEL_FLAGS, "strength", "no_colour_match", "keep_profile")
SOURCE_KEY = "picture_sha256"  # in what is made: of the file that it was made from


@dataclass(frozen=True)
class Found:
    """A picture file, and its name in the output folder, with sub-folders and without size and suffix."""

    path: Path
    name: str


@dataclass(frozen=True)
class Task:
    """A picture to make large, and the file that it becomes."""

    path: Path
    target: Path
    job: Job
    sha256: str = ""  # of the picture's file, once it is read


class Broken:
    """Tells of pictures that cannot be made large, so that the others can; the only one's error comes out."""

    def __init__(self, alone: bool) -> None:
        self._alone, self.count = alone, 0

    def add(self, path: Path, error: OSError | ValueError) -> None:
        """Tell of a picture."""
        if self._alone:
            raise error
        self.count += 1
        name = "" if str(path) in str(error) else f"{path}: "
        say(f"error: {name}{error}", sys.stderr)


def find_pictures(place: Path, output_dir: Path) -> list[Found]:
    """The picture, or all of a folder and its sub-folders but those in the output folder.

    Where two have one name but for the suffix, that stays in the names of both. FileNotFoundError or
    ValueError where there are none.
    """
    if place.is_file():
        return [Found(place, place.stem)]
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: this picture or folder does not exist")
    if place.resolve() == output_dir.resolve():
        raise ValueError(f"--output_dir {output_dir} holds the given pictures: name another folder")
    paths = [path for path in sorted(place.rglob("*")) if _is_picture(path.relative_to(place), path)]
    paths = [path for path in paths if output_dir.resolve() not in path.resolve().parents]
    if not paths:
        raise ValueError(f"{place}: this folder holds no pictures")
    stems = Counter(str(path.with_suffix("")).casefold() for path in paths)
    alone = {path: stems[str(path.with_suffix("")).casefold()] == 1 for path in paths}
    return [
        Found(path, str((path.with_suffix("") if alone[path] else path).relative_to(place))) for path in paths
    ]


def _is_picture(below: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in below.parts)
    return not hidden and path.suffix.lower() in picture_suffixes() and path.is_file()


def upscale_all(arguments: argparse.Namespace, settings: Settings) -> int:
    """Make and save all that the flags name; return the exit code, 1 if some of them are broken."""
    if launch.processes() > 1:
        raise ValueError("upscale.py is one process: start it for each GPU with --device and a folder")
    box = arguments.height, arguments.width
    how = Upscaling(
        box, arguments.asked_height, arguments.asked_width, arguments.factor, arguments.strength,
        not arguments.no_colour_match,
    )  # fmt: skip
    if "://" in arguments.picture:
        raise ValueError(f"{arguments.picture}: fetch the picture first, and name its file or folder")
    place, folder = Path(arguments.picture), Path(arguments.output_dir)
    found, broken = find_pictures(place, folder), Broken(place.is_file())
    pipeline = make_pipeline(arguments)
    check_weights(pipeline, arguments.preset, pipeline.upscaling_files())
    prepare_folder(folder)
    tasks = list(_tasks(arguments, pipeline, found, how, broken))
    if tasks:
        _make(arguments, pipeline, settings, tasks, how, broken)
        say(usage_table(list(pipeline.uses.values())), sys.stderr)
    return 1 if broken.count else 0


def _tasks(
    arguments: argparse.Namespace,
    pipeline: UltraPixelPipeline,
    found: Sequence[Found],
    how: Upscaling,
    broken: Broken,
) -> Iterator[Task]:
    """What is to do of what was found; the i-th of all has seed + i, whatever else is there already."""
    folder, negative = Path(arguments.output_dir), text("--negative_prompt", arguments.negative_prompt)
    there = 0
    for number, each in enumerate(found):
        try:
            height, width = how.size(size_of(each.path))
            plan_for(pipeline.config_c, height, width)  # raises what is wrong with the size
            job = Job(
                prompt_of(each.path, arguments.prompt), height, width, arguments.seed + number, negative
            )
            target = folder / f"{each.name}_{width}x{height}.png"
            if os.path.lexists(target):
                _check_made_of(target, each.path)
                there += 1
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            broken.add(each.path, error)
            continue
        yield Task(each.path, target, job)
    if there:
        say(f"{there} of {len(found)} pictures are there already: {folder}", sys.stderr)


def _check_made_of(target: Path, path: Path) -> None:
    """ValueError where a file is there already that was not made from this picture."""
    try:
        made_of = read_image_metadata(target).get(SOURCE_KEY)
    except (OSError, ValueError):
        made_of = None
    if made_of != _sha256(path):
        raise ValueError(
            f"{path}: {target} is there already, and not made from it: name another --output_dir"
        )


def _sha256(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def prompt_of(path: Path, prompt: str | None) -> str:
    """The prompt that is given for all, else the text in a .txt file beside a picture, if there is one."""
    beside = path.with_suffix(".txt")
    if prompt is not None or not beside.is_file():
        return text("--prompt", prompt or "")
    try:
        return " ".join(beside.read_text("utf-8-sig").split())
    except UnicodeDecodeError:
        raise ValueError(f"{path}: the prompt in {beside} is not UTF-8 text") from None


def _make(
    arguments: argparse.Namespace,
    pipeline: UltraPixelPipeline,
    settings: Settings,
    tasks: Sequence[Task],
    how: Upscaling,
    broken: Broken,
) -> None:
    """Make and save the pictures, of which a few are held at a time."""
    largest = max((task.job for task in tasks), key=lambda job: job.height * job.width)
    say(pipeline.settle_offload(largest.height, largest.width, settings), sys.stderr)
    record = pipeline.record(settings, {name: getattr(arguments, name) for name in UPSCALING_FLAGS})
    with closing(ProgressBars([task.job for task in tasks], tqdm)) as bars:
        for start in range(0, len(tasks), pipeline.group):
            group = list(_read(tasks[start : start + pipeline.group], broken))
            jobs, given = [task.job for task, _ in group], [one for _, one in group]
            sources = pipeline.upscaling_sources(jobs, given, how)
            how_sampled = without_idle_cfg(settings, jobs)
            made = pipeline.pictures(jobs, how_sampled, bars, (), sources) if group else ()
            for (task, one), picture in zip(group, made, strict=False):  # fewer if it was ended
                path = _save(task, one, picture, record, arguments.keep_profile)
                bars.say(f"{task.path}: {path}")


def _read(tasks: Sequence[Task], broken: Broken) -> Iterator[tuple[Task, Original]]:
    for task in tasks:
        try:
            yield replace(task, sha256=_sha256(task.path)), original("picture", task.path)
        except (OSError, ValueError) as error:
            broken.add(task.path, error)


def _save(task: Task, given: Original, made: Picture, record: Record, keep_profile: bool) -> Path:
    """Save a picture where it belongs, or, if that fails, where files can always lie."""
    pixels = made.pixels.permute(1, 2, 0).numpy()
    write = partial(
        write_alike, colours=pixels[..., :3], given=given.file,
        alpha=None if given.alpha is None else pixels[..., 3], keep_profile=keep_profile,
        metadata={**record.metadata(made.job), "picture": task.path.name, SOURCE_KEY: task.sha256},
        text=record.text(made.job),
    )  # fmt: skip
    try:
        return write(task.target)
    except OSError as error:
        path = write(Path(gettempdir(), task.target.name))
        warnings.warn(f"{path}: the picture lies here, it could not be saved as asked: {error}", stacklevel=2)
        return path
