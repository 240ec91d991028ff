"""What settings cost and what they save, on the embedded family: quality and time of each, in one table.

python benchmarks/quality.py fast: every part of the fast mode by itself, and the whole.
python benchmarks/quality.py curves: numbers of steps by sampler, cfg, and the guidance's noise condition.

All rows have the same prompts and seeds. Run again it goes on with the rows that are missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from core.commands.flags import Parser, home_path, hours, plot_path, run
from core.config.presets import PRESETS
from core.config.settings import FAST, TRAINING_R, Job, Settings
from core.devices import device_named
from core.family.evaluation import Evaluation, Judge, View, held_out_cases
from core.family.evaluation_run import FEW, TINY, Sheets, load_recogniser
from core.pictures.images import prepare_folder
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import counting
from core.pipeline.resolution import plan_for
from core.training.encoders import fingerprint
from core.weights.checkpoint import read_json, save_text

RECOGNISER = TINY / "recogniser.safetensors"
SHOWN = 8  # pictures on a sheet
PAIRS = 3  # of pictures whose times are compared
ROWS_OF_FAST: dict[str, dict[str, Any]] = {
    "exact": {},
    "--fast": {**FAST, "fp8": "off"},
    "DPM-Solver++(2M), fewer steps": {key: FAST[key] for key in ("steps", "sampler")},
    "fewer steps at low resolution": {"steps_lr": FAST["steps_lr"]},
    "cfg in an interval": {"cfg_interval": FAST["cfg_interval"]},
    "inner layers shared by two steps": {"reuse": FAST["reuse"]},
    "Stage B without cfg": {"cfg_b": FAST["cfg_b"]},
    "Stage B with fewer steps": {key: FAST[key] for key in ("steps_b", "sampler_b")},
    "float8 (its rounding alone, on a CPU)": {"fp8": "on"},
    "--fast, with float8's rounding": {**FAST, "fp8": "on"},
}
SAMPLERS, STEPS = ("ddpm", "ddim", "dpmpp_2m"), (6, 10, 20, 40)
CURVES: dict[str, dict[str, dict[str, Any]]] = {  # title: rows by their place on the axis
    **{f"steps, {name}": {str(n): {"steps": n, "sampler": name} for n in STEPS} for name in SAMPLERS},
    "cfg": {str(cfg): {"cfg": cfg} for cfg in (1.0, 1.5, 2.0, 3.0, 4.0)},
    "noise condition of the guidance": {
        str(r): {"guidance_r": r} for r in (0.02, TRAINING_R, 0.1, 0.2, 0.5)
    },
}  # fmt: skip
FIGURES = {"mean": "attributes right", "worst": "worst attribute", "frechet": "Fréchet",
           "patch_frechet": "of patches", "time": "time"}  # fmt: skip
PLOTTED = {"frechet": "Fréchet distance (less is better)", "patch_frechet": "the same of patches"}


def rows_of(what: str) -> dict[str, dict[str, Any]]:
    """The changes of settings that make each row."""
    if what == "fast":
        return ROWS_OF_FAST
    return {f"{title} {place}": row for title, rows in CURVES.items() for place, row in rows.items()}


def time_ratio(pipeline: UltraPixelPipeline, settings: Settings, exact: Settings, side: int) -> float:
    """The median of the ratios of times of pictures that are made in turn.

    On a CPU it is processor time, which other programs change little.
    """
    clock = time.process_time if pipeline.device.type == "cpu" else time.perf_counter
    ratios = []
    for i in range(PAIRS):
        seconds = []
        for one in (settings, exact):
            start = clock()
            pipeline.run([Job("a red house", side, side, i)], one)
            seconds.append(clock() - start)
        ratios.append(seconds[0] / seconds[1])
    return median(ratios)


def measure(name: str, pipeline: UltraPixelPipeline, judge: Judge, settings: Settings, exact: Settings,
            arguments: Any) -> dict[str, Any]:  # fmt: skip
    """A row's figures."""
    cases, size = held_out_cases(arguments.num_image, 0), (arguments.side, arguments.side)
    sheets = Sheets(Path(arguments.folder), min(SHOWN, len(cases)))
    evaluation = Evaluation(pipeline, judge, cases, settings)
    with tqdm(total=len(cases), desc=name, unit="picture") as bar:
        (found,) = evaluation.pictures(size, [View(name, size)], counting(bar, "stage A"), sheets)
    shares = found.accuracy
    if settings.fp8 == "on" and pipeline.device.type == "cpu":
        taken = None  # of float8 that is simulated
    else:
        taken = 1.0 if settings == exact else time_ratio(pipeline, settings, exact, arguments.side)
    return {
        "row": name, "mean": shares.mean, "worst": shares.each[shares.worst], "worst_attribute": shares.worst,
        "frechet": found.frechet, "patch_frechet": found.patch_frechet,
        "time": taken,
    }  # fmt: skip


def result(name: str, changes: dict[str, Any], pipeline: UltraPixelPipeline, judge: Judge, exact: Settings,
           arguments: Any) -> dict[str, Any] | None:  # fmt: skip
    """A row's figures, from its file or made now; None where the time is up."""
    settings = replace(exact, **changes)
    files = [*(path for what, path in pipeline.files().items() if what != "text encoder"), str(RECOGNISER)]
    stamp = fingerprint(pipeline.config_c, files, asdict(settings), arguments.num_image, arguments.side)
    path = Path(arguments.folder) / f"{stamp[:16]}.json"
    if not path.exists():
        if time.monotonic() > arguments.until:
            return None
        found = measure(name, pipeline, judge, settings, exact, arguments)
        save_text(path, json.dumps({**found, "settings": asdict(settings)}, indent=2) + "\n")
    return read_json(path)


def table(results: dict[str, dict[str, Any] | None]) -> str:
    """All rows in Markdown; a row that is not made is named as such."""
    lines = [f"| setting | {' | '.join(FIGURES.values())} |", f"|---|{'---:|' * len(FIGURES)}"]
    for name, row in results.items():
        if row is None:
            lines.append(f"| {name} | not measured |" + " |" * (len(FIGURES) - 1))
            continue
        worst = f"{row['worst_attribute']} {row['worst']:.1%}"
        distances = f"{row['frechet']:.2f} | {row['patch_frechet']:.2f}"
        taken = "" if row["time"] is None else f"{row['time']:.2f} "
        lines.append(f"| {name} | {row['mean']:.1%} | {worst} | {distances} | {taken}|")
    return "\n".join(lines)


def draw(what: str, results: dict[str, dict[str, Any] | None], path: Path) -> None:
    """Both distances: of the fast mode against time, of curves along each axis."""
    rows = {name: row for name, row in results.items() if row is not None}
    if what == "fast":
        figure = Figure(figsize=(9, 5), layout="constrained")
        for axes, key in zip(figure.subplots(1, 2), ("frechet", "patch_frechet"), strict=True):
            for mark, (name, row) in zip(cycle("os^vDP*X<>"), rows.items(), strict=False):
                if row["time"] is not None:
                    axes.plot(row["time"], row[key], mark, markersize=8, label=name)
            axes.set(xlabel="time, of that of the exact picture", ylabel=PLOTTED[key])
            axes.margins(0.1, 0.15)
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    else:
        figure = Figure(figsize=(3.2 * len(CURVES), 5), layout="constrained")
        panels = figure.subplots(2, len(CURVES), sharey="row")
        for column, (title, places) in enumerate(CURVES.items()):
            found = [(float(place), rows.get(f"{title} {place}")) for place in places]
            for axes, key in zip(panels[:, column], ("mean", "patch_frechet"), strict=True):
                axes.plot(*zip(*[(x, row[key]) for x, row in found if row], strict=True), marker="o")
                axes.set(xlabel=title, ylabel=FIGURES[key] if column == 0 else None)
                axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse(given: Sequence[str] | None = None) -> Any:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("fast", "curves"))
    parser.add_argument("--preset", choices=tuple(n for n in PRESETS if n.startswith("tiny")), default="tiny")
    parser.add_argument("--num_image", type=int, default=100, help="held-out scenes, with one picture each")
    parser.add_argument("--side", type=int, default=512, help="pixels of these pictures")
    parser.add_argument("--max_hours", type=hours, default=float("inf"), help="after which no row is begun")
    parser.add_argument("--folder", type=home_path, default="runs/quality", help="for results and sheets")
    parser.add_argument("--figure", type=plot_path, help="where the plot goes (default: into --folder)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    arguments.until = time.monotonic() + 3600 * arguments.max_hours
    if arguments.num_image < 1:
        raise ValueError(f"--num_image must be at least 1, not {arguments.num_image}")
    device = device_named(None)
    pipeline = UltraPixelPipeline.from_preset(arguments.preset, device)
    plan_for(pipeline.config_c, arguments.side, arguments.side)  # raises what is wrong with the size
    prepare_folder(arguments.folder)
    judge = Judge(load_recogniser(str(RECOGNISER), device), device)
    exact = PRESETS[arguments.preset].settings
    results = {
        name: result(name, changes, pipeline, judge, exact, arguments)
        for name, changes in rows_of(arguments.what).items()
    }
    size = f"{arguments.side} x {arguments.side}"
    print(f"{arguments.num_image} pictures of {size}, --preset {arguments.preset}\n")
    print(table(results))
    if any(row and arguments.num_image <= 64 for row in results.values()):
        print(f"\n{FEW}")
    figure = arguments.figure or Path(arguments.folder, f"{arguments.what}.png")
    draw(arguments.what, results, Path(figure))
    return 0


if __name__ == "__main__":
    run(main)
