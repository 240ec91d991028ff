"""How good pictures are that were made large: python benchmarks/upscaling.py

Held-out scenes are drawn at 128 x 128, made large to 512 x 512, and held against their drawings of that size,
as are the same small drawings enlarged by bicubic and Lanczos filters, and what the encoder and the decoding
stages leave of the large drawings. A second part asks, at a strength of
0.5, for what is not in the picture, and counts what stays.

Attributes: the share that the recogniser finds as they are in the scene. Patches: the Fréchet distance of
crops to those of the real drawings, in which blur and torn outlines count. Edges: the F1 of edges that Canny
finds at full size, with the drawing's, within 2 px. Colours: the largest difference of a channel's mean from
the small drawing's, in levels of 255.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from core.commands.flags import (
    Parser,
    add_model_flags,
    add_settings_flags,
    check_weights,
    make_pipeline,
    parse_with_preset,
    run,
    settings_of,
)
from core.config.settings import Job, Settings
from core.family.evaluation import Case, Judge, Measured, View, held_out_cases, real_picture
from core.family.evaluation_run import TINY, load_recogniser
from core.family.outlines import compare, found_by_canny
from core.pictures.images import save_image, to_image
from core.pipeline.given import Original, original
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import plan_for
from core.pipeline.sources import Source
from core.pipeline.upscaling import Upscaling, without_idle_cfg
from core.training.preview import row_of, sheet

SMALL, LARGE = 128, 512
EDGE_BLUR, EDGE_THRESHOLDS = 1.0, (50, 100)  # px of LARGE
CONTRADICTED = 0.5  # strength
SHOWN = 8  # scenes on a sheet

Enlarge = Callable[[Case], Tensor]


@dataclass(frozen=True)
class Row:
    """What one way to make pictures large gives."""

    measured: Measured
    f1: float
    colours: float  # levels


def given(case: Case) -> Original:
    """A case's small drawing."""
    return original("drawing", to_image(real_picture(case.scene, (SMALL, SMALL))))


def resampled(way: Image.Resampling) -> Enlarge:
    """Enlarging by a filter alone."""

    def enlarge(case: Case) -> Tensor:
        large = to_image(given(case).pixels).resize((LARGE, LARGE), way)
        return original("drawing", large).pixels

    return enlarge


def upscaled(
    pipeline: UltraPixelPipeline, settings: Settings, prompt_of: Callable[[Case], str], strength: float
) -> Enlarge:
    """Enlarging by the pipeline."""
    how = Upscaling((LARGE, LARGE), strength=strength)

    def enlarge(case: Case) -> Tensor:
        jobs = [Job(prompt_of(case), LARGE, LARGE, case.seed)]
        sources = pipeline.upscaling_sources(jobs, [given(case)], how)
        used = without_idle_cfg(settings, jobs)
        return next(pipeline.pictures(jobs, used, sources=sources)).pixels

    return enlarge


def decoded(pipeline: UltraPixelPipeline, settings: Settings) -> Enlarge:
    """What encoder, Stage B and Stage A leave of the large drawing itself: the most that can be expected."""
    sizes = plan_for(pipeline.config_c, LARGE, LARGE)

    def decode(case: Case) -> Tensor:
        with pipeline.encoding() as encode:
            source = Source(latent=encode(real_picture(case.scene, (LARGE, LARGE)), sizes.hr_latent))
        jobs = [Job("", LARGE, LARGE, case.seed)]
        return next(pipeline.pictures(jobs, settings, sources=[source])).pixels

    return decode


def measure(name: str, enlarge: Enlarge, cases: Sequence[Case], judge: Judge) -> tuple[Row, list[Tensor]]:
    """What a way to enlarge is worth, and the first of its pictures."""
    seen, f1, colours, shown = [], [], [], []
    start = time.perf_counter()
    for case in tqdm(cases, desc=name, unit="picture"):
        made = enlarge(case)
        real, small = real_picture(case.scene, (LARGE, LARGE)), given(case).pixels
        seen.append(judge.look(made, case.seed))
        edges = [found_by_canny(picture, EDGE_BLUR, EDGE_THRESHOLDS) for picture in (real, made)]
        f1.append(compare(*edges)[0])
        colours.append(255 * (made.mean((1, 2)) - small.mean((1, 2))).abs().max().item())
        shown += [made] if len(shown) < SHOWN else []
    view = View(name, (LARGE, LARGE))
    measured = judge.measure(view, cases, seen, time.perf_counter() - start)
    return Row(measured, sum(f1) / len(f1), max(colours)), shown


def report(rows: Sequence[Row]) -> str:
    """A table."""
    lines = [f"{'':<28}{'attributes':>12}{'worst':>18}{'patches':>10}{'edges':>8}{'colours':>9}{'s':>8}"]
    for row in rows:
        accuracy, m = row.measured.accuracy, row.measured
        worst = f"{accuracy.worst} {accuracy.each[accuracy.worst]:.1%}"
        lines.append(
            f"{m.view.name:<28}{accuracy.mean:>12.1%}{worst:>18}{m.patch_frechet:>10.2f}{row.f1:>8.3f}"
            f"{row.colours:>9.2f}{m.seconds:>8.1f}"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--num_image", type=int, default=64, help="held-out scenes, half of them contradicted"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first scene")
    parser.add_argument("--prompts", choices=("none", "own"), default="none", help="of the first part")
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0, 0.5], help="of the first part")
    parser.add_argument("--output_dir", default="outputs/upscaling", help="folder for the sheet")
    add_settings_flags(parser)
    add_model_flags(parser)
    parser.set_defaults(preset="tiny")
    return parse_with_preset(parser, arguments)


def main() -> int:
    arguments = parse()
    if arguments.num_image < 2:
        raise ValueError(f"--num_image must be at least 2, not {arguments.num_image}")
    pipeline, settings = make_pipeline(arguments), settings_of(arguments)
    check_weights(pipeline, arguments.preset, pipeline.upscaling_files())
    judge = Judge(load_recogniser(str(TINY / "recogniser.safetensors"), pipeline.device), pipeline.device)
    cases = held_out_cases(arguments.num_image, arguments.seed)
    others = {case.seed: other.prompt for case, other in zip(cases, [*cases[1:], cases[0]], strict=True)}

    def own(case: Case) -> str:
        return case.prompt if arguments.prompts == "own" else ""

    ways = {
        "bicubic": resampled(Image.Resampling.BICUBIC),
        "Lanczos": resampled(Image.Resampling.LANCZOS),
        **{f"made large, strength {s:g}": upscaled(pipeline, settings, own, s) for s in arguments.strength},
        "large drawing decoded": decoded(pipeline, settings),
    }
    rows, shown = zip(*(measure(name, way, cases, judge) for name, way in ways.items()), strict=True)
    contradicted = upscaled(pipeline, settings, lambda case: others[case.seed], CONTRADICTED)
    last, _ = measure("contradicted, strength 0.5", contradicted, cases[: len(cases) // 2], judge)
    real = [real_picture(case.scene, (LARGE, LARGE)) for case in cases[:SHOWN]]
    picture = sheet([row_of(list(row)) for row in zip(*shown, real, strict=True)])
    save_image(picture, Path(arguments.output_dir, "upscaling.jpg"), "jpg", {})
    print(report([*rows, last]))
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(main)
