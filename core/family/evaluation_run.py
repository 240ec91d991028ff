"""The run of inference/evaluate.py: pictures of held-out scenes, what they are worth, tables and sheets."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from core.commands.flags import MODEL_FLAGS, check_weights, make_pipeline
from core.config.settings import Job, Settings
from core.config.sizes import Size
from core.family.evaluation import Case, Evaluation, Judge, Measured, RoundTrip, View, held_out_cases
from core.paths import PROJECT, located
from core.pictures.images import prepare_folder, safe_stem, save_image, to_image
from core.pictures.sheets import contact_sheet
from core.pipeline.made import WeightHashes
from core.pipeline.networks import load_encoder
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import counting
from core.pipeline.resolution import plan_for
from core.scenes.labelled import CLASSES
from core.scenes.scene import ATTRIBUTES
from core.weights.checkpoint import load_module, read_config
from modules.recogniser import Recogniser

TINY = PROJECT / "models" / "tiny"  # the recogniser, and the text encoder that knows the scenes' words
SMALL = 128  # pixels of the shorter side of the pictures that --compare enlarges
SHOWN = 16  # pictures on a sheet
CELL = 384  # pixels, of a picture on a sheet
NAME = 34  # letters of a table's first column
FEW = "* few pictures: the distances are too large, and only comparable at the same number of pictures"
FOREIGN = "the prompts are of the scenes' world, which this family's text encoder was not trained on"


@dataclass(frozen=True)
class Series:
    """Pictures to make: their size (height, width), what they are measured as, and whether guided."""

    size: Size
    views: list[View]
    guided: bool = True


def make_series(sizes: Sequence[Size], compare: bool, guided: bool) -> list[Series]:
    """All pictures to make; each size of pictures that are enlarged is made once."""
    made = [Series(size, [View(by(size), size)]) for size in sizes]
    if not compare:
        return made
    size = sizes[-1]
    if min(size) <= SMALL:
        raise ValueError(f"--compare enlarges pictures of {SMALL} pixels: {by(size)} is too small a size")
    small = tuple(round(side * SMALL / min(size)) for side in size)
    if small not in sizes:
        made.insert(0, Series(small, []))
    of_small = next(series for series in made if series.size == small)
    of_small.views.append(View(f"{by(small)}, enlarged to {by(size)}", size, baseline=True))
    if guided:
        made.append(Series(size, [View(f"{by(size)}, without guidance", size, baseline=True)], guided=False))
    return made


def by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def load_recogniser(path: str, device: torch.device) -> Recogniser:
    """The recogniser of a file; ValueError if it is not there or knows other attributes."""
    if not Path(path).is_file():
        raise ValueError(f"the recogniser {path} does not exist: name its file with --recogniser")
    sizes = read_config(path)
    if sizes is None or sizes.get("classes") != list(CLASSES):
        raise ValueError(f"{path} is no recogniser of these scenes: name its file with --recogniser")
    build = partial(Recogniser, **sizes)
    return load_module(build, path, dtype=torch.float32, device=device, what="recogniser")


def prepare(pipeline: UltraPixelPipeline) -> UltraPixelPipeline:
    """Load all weights, so that the first picture's time is not theirs; return the pipeline unguided."""
    pipeline.encode_text([Job("", SMALL, SMALL, 0)])
    for stage in filter(None, (pipeline.stage_c, pipeline.guidance, pipeline.stage_b, pipeline.stage_a)):
        _ = stage.module
    unguided = copy.copy(pipeline)
    unguided.guidance = None
    return unguided


class Sheets:
    """A contact sheet of each view's first pictures, written as soon as it is full."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, min(count, SHOWN)
        self._cells: dict[str, list[tuple[Image.Image, str]]] = {}

    def __call__(self, view: View, case: Case, pixels: Tensor) -> None:
        cells = self._cells.setdefault(view.name, [])
        if len(cells) < self._count:
            cells.append((ImageOps.contain(to_image(pixels), (CELL, CELL)), case.prompt))
            if len(cells) == self._count:
                path, prompts = self._folder / f"{safe_stem(view.name)}.png", [prompt for _, prompt in cells]
                save_image(contact_sheet(cells), path, "png", {"prompts": prompts})


def against_main(one: Measured, measured: Sequence[Measured]) -> float | None:
    """How many times further a baseline's patches are from real ones than those it is compared with."""
    main = [m.patch_frechet for m in measured if m.view.size == one.view.size and not m.view.baseline]
    return one.patch_frechet / main[0] if one.view.baseline and main and main[0] else None


def report(measured: Sequence[Measured], trips: Sequence[RoundTrip], notes: Sequence[str]) -> str:
    """All figures as text."""
    figures = [("pictures", "accuracy", "worst attribute", "Fréchet", "of patches", "ratio", "s/picture")]
    each = [("attributes right", *ATTRIBUTES)]
    for m in measured:
        ratio, mark, worst = against_main(m, measured), "*" * m.few_pictures, m.accuracy.worst
        figures.append((
            m.view.name, f"{m.accuracy.mean:.3f}", f"{worst} {m.accuracy.each[worst]:.3f}",
            f"{m.frechet:.3f}{mark}", f"{m.patch_frechet:.3f}{mark}", f"{ratio:.2f}" if ratio else "",
            f"{m.seconds:.2f}",
        ))  # fmt: skip
        each.append((m.view.name, *(f"{share:.3f}" for share in m.accuracy.each.values())))
    kept = [("round trip of real pictures", "Stage A, dB", "kept by B", *ATTRIBUTES)]
    for t in trips:
        shares = [f"{share:.3f}" for share in (t.kept.mean, *t.kept.each.values())]
        kept.append((by(t.size), f"{t.psnr:.2f}", *shares))
    return "\n\n".join([*(table(rows) for rows in (figures, each, kept) if len(rows) > 1), *notes])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first to the left."""
    rows = [(row[0].ljust(NAME), *row[1:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def evaluate(arguments: argparse.Namespace, settings: Settings, sizes: Sequence[Size]) -> str:
    """Make and measure pictures at these sizes with what the flags name; write figures, return tables."""
    count, pipeline = arguments.num_image, make_pipeline(arguments)
    config, device, folder = pipeline.config_c, pipeline.device, Path(arguments.output_dir)
    for size in sizes:
        plan_for(config, *size)  # raises what is wrong with the size
    made = make_series(sizes, arguments.compare, pipeline.guidance is not None)
    prepare_folder(folder)
    recogniser = located(arguments.recogniser)
    judge = Judge(load_recogniser(recogniser, device), device)
    check_weights(pipeline, arguments.preset)
    encoder = load_encoder(config, "--round_trip").to(device) if arguments.round_trip else None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # Stage A runs in float32
    unguided, sheets = prepare(pipeline), Sheets(folder, count)
    guided = Evaluation(pipeline, judge, held_out_cases(count, arguments.seed), settings)
    notes = [] if Path(config.clip_text_path).resolve() == TINY.resolve() else [FOREIGN]
    judging = {"recogniser": recogniser, "encoder": config.effnet_checkpoint_path or ""}
    hashes = WeightHashes({**pipeline.files(), **judging}).result()
    about = {name: getattr(arguments, name) for name in ("num_image", "seed", *MODEL_FLAGS)}
    about |= {"settings": asdict(settings), "weights": hashes, "notes": notes}
    measured, trips = [], []

    def write() -> None:
        pictures = [{**asdict(m), "patch_ratio": against_main(m, measured)} for m in measured]
        figures = {"run": about, "pictures": pictures, "round_trips": [asdict(trip) for trip in trips]}
        (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")

    steps = settings.steps_b + 1  # of Stages B and A
    for series in made:
        evaluation = replace(guided, pipeline=pipeline if series.guided else unguided)
        total = count * (settings.steps + settings.steps_low + steps)
        with tqdm(desc=series.views[0].name, total=total, unit="step") as bar:
            measured += evaluation.pictures(series.size, series.views, counting(bar), sheets)
        measured.sort(key=lambda m: m.view.baseline)
        write()
    for size in sizes if encoder else ():
        with tqdm(desc=f"{by(size)}, round trip", total=count * steps, unit="step") as bar:
            trips.append(guided.round_trip(encoder, size, counting(bar)))
        write()
    notes += [FEW] if measured[0].few_pictures else []
    title = f"{count} held-out scenes from seed {arguments.seed}: {folder}"
    return f"{title}\n\n{report(measured, trips, notes)}"
