"""How well controlled pictures keep the edges that were given: python benchmarks/tiny_control.py

Held-out scenes give edges. From the same seed pictures are made under control and without. There is no
prompt at all, so that the edges alone say what to draw; with --prompts open it says what is in the picture,
but not where and how large, with --prompts full all of that. Sampling is that of
inference/test_controlnet.py, without its suffix.

The measure looks at outlines, as finer detail is not in latents of 12 x 12: pictures are reduced to
128 x 128, smoothed (a Gaussian of 3 px) and searched by Canny with thresholds 25 and 50. F1: of outlines
within 2 px, given ones found and found ones given. Much of it is there by chance, as landscapes resemble each
other. Above chance: (F1 - chance) / (1 - chance), where chance is the F1 of the same pictures with the other
scenes' outlines; 0 is chance, 1 is perfect. Distance: from a pixel on one picture's outlines to the nearest
of the other's, at most 16 px of 128 x 128, the mean over both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from core.commands.flags import (
    Parser,
    add_model_flags,
    add_settings_flags,
    check_weights,
    home_path,
    make_pipeline,
    parse_with_preset,
    run,
    settings_of,
)
from core.config.schema import ControlConfig
from core.config.settings import Job, Settings
from core.config.sizes import Size
from core.family.evaluation import Case, held_out_cases, real_picture
from core.family.outlines import compare, found_by_canny
from core.pictures.images import prepare_folder, save_image, to_image
from core.pipeline.control import CONTROL_WEIGHT, Control, Source, edge_control
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import plan_for
from core.pipeline.stages import GROUP
from core.scenes.captions import AFLOAT, LANDS, SKIES, SUBJECTS, WHERE
from core.scenes.scene import Scene
from core.training.preview import row_of, sheet

SIZES = ((128, 128), (512, 512))
SIDE = 128  # px at which outlines are compared
BLUR, THRESHOLDS = 3.0, (25, 50)
SHOWN = 8  # scenes on a sheet
OWN = ("cfg",)  # defaults that no preset changes, as in inference/test_controlnet.py
TITLE, FONT = 24, 14  # px: height of the titles' strip, and of their letters


def no_prompt(_scene: Scene) -> str:
    """Nothing."""
    return ""


def open_prompt(scene: Scene) -> str:
    """What is in a scene, without where and how large it is."""
    afloat = scene.subject in AFLOAT and (scene.land == "sea" or scene.subject == "balloon")
    where = (AFLOAT[scene.subject] if afloat else WHERE[scene.land])[0]
    what, land = SUBJECTS[scene.subject][0], LANDS[scene.land][0]
    return f"a {scene.colour} {what} {where} {land}, {SKIES[scene.sky, scene.light][0]}"


PROMPTS = {"none": no_prompt, "open": open_prompt, "full": None}  # None: the scene's caption
MADE = {"none": "From the edges alone", "open": "From edges and prompt", "full": "From edges and prompt"}


# --- the measure ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How well the outlines of pictures agree with the given ones, on average."""

    f1: float
    above_chance: float
    distance: float  # px of SIDE x SIDE


def outlines(picture: Tensor) -> np.ndarray:
    """The outlines (SIDE, SIDE), bool, of a picture (3, H, W) in [0, 1]."""
    reduced = F.interpolate(picture[None], size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]
    return found_by_canny(reduced, BLUR, THRESHOLDS)


def agreement(given: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> Agreement:
    """How well the outlines of made pictures agree with those of the given ones, two or more."""
    table = np.array([[compare(lines, others) for lines in given] for others in made])  # (made, given, 2)
    own = np.eye(len(made), dtype=bool)
    (f1, distance), chance = table[own].mean(axis=0), table[~own][:, 0].mean()
    return Agreement(f1, (f1 - chance) / (1 - chance), distance)


@dataclass(frozen=True)
class Row:
    """What was measured at a size: with control and without."""

    size: Size
    count: int
    controlled: Agreement
    free: Agreement


# --- the pictures ---------------------------------------------------------------------------------


def control_of(
    case: Case, size: Size, pipeline: UltraPixelPipeline, weight: float, hr: bool = False
) -> Control:
    """The edges of a case's real picture."""
    source, edge_size = (
        Source(to_image(real_picture(case.scene, size))),
        pipeline.controls.files[0].control_size,
    )
    control = edge_control(source, size, pipeline.config_c.geometry, edge_size)
    return replace(control, weight=weight, hr=hr)


def measure(
    pipeline: UltraPixelPipeline,
    cases: Sequence[Case],
    size: Size,
    settings: Settings,
    weight: float,
    hr: bool = False,
) -> tuple[Row, Image.Image]:
    """Agreement at a size, and a sheet: given picture, its edges, made with control, made without."""
    found: list[list[np.ndarray]] = []
    rows: list[Tensor] = []
    with tqdm(desc=f"{size[0]} x {size[1]}", total=2 * len(cases), unit="picture") as bar:
        for start in range(0, len(cases), GROUP):
            group = cases[start : start + GROUP]
            jobs = [Job(case.prompt, *size, case.seed) for case in group]
            controls = [control_of(case, size, pipeline, weight, hr) for case in group]
            made = [pipeline.run(jobs, settings, None, given) for given in (controls, ())]
            for case, control, *pair in zip(group, controls, *made, strict=True):
                pictures = [real_picture(case.scene, size), *(picture.pixels for picture in pair)]
                found.append([outlines(picture) for picture in pictures])
                rows.append(row_of([pictures[0], control.shown.expand(3, -1, -1), *pictures[1:]]))
            bar.update(2 * len(group))
    given, controlled, free = zip(*found, strict=True)
    row = Row(size, len(cases), agreement(given, controlled), agreement(given, free))
    return row, sheet(rows[:SHOWN])


def titled(image: Image.Image, titles: Sequence[str]) -> Image.Image:
    """A sheet with a title above each of its columns, which are equally wide."""
    sheet = ImageOps.expand(image, (0, TITLE, 0, 0), "white")
    draw, width = ImageDraw.Draw(sheet), image.width / len(titles)
    for column, title in enumerate(titles):
        draw.text(((column + 0.5) * width, TITLE / 2), title, "black", font_size=FONT, anchor="mm")
    return sheet


def report(rows: Sequence[Row]) -> str:
    """A table."""
    lines = [f"{'':<20}{'F1':>8}{'above chance':>15}{'distance':>12}"]
    for row in rows:
        names = (f"{row.size[0]} x {row.size[1]}, control", "without control")
        for name, seen in zip(names, (row.controlled, row.free), strict=True):
            lines.append(f"{name:<20}{seen.f1:>8.2f}{seen.above_chance:>15.2f}{seen.distance:>9.2f} px")
        f1 = row.controlled.f1 / row.free.f1 if row.free.f1 else inf
        above = row.controlled.above_chance / row.free.above_chance if row.free.above_chance > 0 else inf
        distance = row.free.distance / row.controlled.distance if row.controlled.distance else inf
        lines.append(f"{'  times better':<20}{f1:>8.1f}{above:>15.1f}{distance:>12.1f}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are those of inference/test_controlnet.py."""
    parser = Parser(__doc__)
    for side in ("height", "width"):
        parser.add_argument(f"--{side}", dest=f"asked_{side}", type=int, metavar="PX", help="the only one")
    parser.add_argument("--num_image", type=int, default=16, help="held-out scenes, 2 or more (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene")
    parser.add_argument("--prompts", choices=tuple(PROMPTS), default="none", help="what they say")
    parser.add_argument("--control_file", help="weights of the ControlNet")
    parser.add_argument("--control_weight", type=float, default=CONTROL_WEIGHT)
    parser.add_argument(
        "--control_hr", action="store_true", help="let it act in the high-resolution pass too"
    )
    parser.add_argument(
        "--output_dir", type=home_path, default="outputs/tiny_control", help="folder for the sheets"
    )
    add_settings_flags(parser, OWN)
    add_model_flags(parser)
    parser.set_defaults(preset="tiny", cfg=1.0, shift=2.0)
    return parse_with_preset(parser, arguments, OWN)


def main() -> int:
    arguments = parse()
    if arguments.num_image < 2:
        raise ValueError(f"--num_image must be at least 2, not {arguments.num_image}: chance needs others")
    if not isfinite(arguments.control_weight):
        raise ValueError(f"--control_weight must be a number, not {arguments.control_weight}")
    asked = [side for side in (arguments.asked_height, arguments.asked_width) if side is not None]
    sizes = ((asked[0], asked[-1]),) if asked else SIZES
    prepare_folder(arguments.output_dir)
    pipeline, settings = make_pipeline(arguments), settings_of(arguments)
    path = arguments.control_file.replace("{control}", "canny")
    pipeline.set_control(ControlConfig(controlnet_checkpoint_path=path))
    check_weights(pipeline, arguments.preset)
    cases, rows = held_out_cases(arguments.num_image, arguments.seed), []
    if (prompt := PROMPTS[arguments.prompts]) is not None:
        cases = [replace(case, prompt=prompt(case.scene)) for case in cases]
    for size in sizes:
        plan_for(pipeline.config_c, *size)  # raises what is wrong with the size
    for size in sizes:
        weight, hr = arguments.control_weight, arguments.control_hr
        row, pictures = measure(pipeline, cases, size, settings, weight, hr)
        pictures = titled(pictures, ("Drawing", "Edges", MADE[arguments.prompts], "Without them"))
        save_image(pictures, Path(arguments.output_dir, f"{size[0]}x{size[1]}.jpg"), "jpg", {})
        rows.append(row)
    print(report(rows))
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(main)
