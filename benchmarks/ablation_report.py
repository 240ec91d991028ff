"""The table and the plot of benchmarks/ablation.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIGURES = {"accuracy": "attributes right", "frechet": "Fréchet", "patch_frechet": "of patches"}
FORMS = {"accuracy": ".1%", "frechet": ".2f", "patch_frechet": ".2f"}
MISSING = "not measured"
COLOURS = {
    "own_t": "#7b4ea3", "t_05": "#b79ad0", "full": "#c44e1c", "interpolated": "#7a2606",
    "implicit": "#e0a030", "low_frequencies": "#8a6d10", "bilinear": "#2c7a4b", "bilinear_scale": "#85bf9c",
}  # fmt: skip
OTHER = "#4472a8"
MARKS = "os^d"  # of the sides


@dataclass(frozen=True)
class Found:
    """What is known of a variant: one entry for each of its seeds, as far as they are done."""

    name: str
    label: str
    wanted: int  # seeds
    curves: Sequence[Mapping[int, float]]  # the error at the first side, by updates
    errors: Mapping[int, Sequence[float]]  # by side; a share of the error without guidance
    pictures: Mapping[int, Mapping[str, Sequence[float]]]  # by side, for each of FIGURES


def with_deviation(values: Sequence[float], form: str) -> str:
    """The mean and, of several, the standard deviation."""
    if not values:
        return MISSING
    return format(mean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")


def table(variants: Sequence[Found], sides: Sequence[int], with_pictures: bool) -> str:
    """All figures in Markdown; what is missing is named as such."""
    heads = [f"error at {side}" for side in sides]
    if with_pictures:
        heads += [f"{name}, {side}" for side in sides for name in FIGURES.values()]
    lines = [["guidance", "seeds", *heads], ["---", *["---:"] * (1 + len(heads))]]
    for one in variants:
        done = len(one.errors[sides[0]])
        cells = [one.label, str(done) if done == one.wanted else f"{done} of {one.wanted}"]
        cells += [with_deviation(one.errors[side], ".1%") for side in sides]
        if with_pictures:
            cells += [with_deviation(one.pictures[s][key], FORMS[key]) for s in sides for key in FIGURES]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(variants: Sequence[Found], sides: Sequence[int], path: Path, title: str) -> None:
    """The trainings' curves, and a dot for each variant and side with the deviation between seeds."""
    measured = any(one.pictures[side]["patch_frechet"] for one in variants for side in sides)
    figure = Figure(figsize=(15 if measured else 11, 5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, 3 if measured else 2)
    guided = [one for one in variants if any(one.curves)]
    for one in guided:
        for curve in one.curves:
            style = {"color": COLOURS.get(one.name, OTHER), "linewidth": 1.0, "markersize": 4}
            panels[0].plot(curve.keys(), curve.values(), ".-", **style)
    panels[0].set(
        xlabel="updates; colours as on the right", ylabel=f"error at {sides[0]}, of that without guidance"
    )
    _dots(panels[1], guided, sides, "error, of that without guidance", lambda one, side: one.errors[side])
    if measured:
        patches, name = (lambda one, side: one.pictures[side]["patch_frechet"]), "Fréchet of patches"
        _dots(panels[2], variants, sides, name, patches)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _dots(
    axes: Axes,
    variants: Sequence[Found],
    sides: Sequence[int],
    name: str,
    values_of: Callable[[Found, int], Sequence[float]],
) -> None:
    for row, one in enumerate(variants):
        for place, side in enumerate(sides):
            if values := values_of(one, side):
                spread = stdev(values) if len(values) > 1 else None
                colour, mark = COLOURS.get(one.name, OTHER), MARKS[place % len(MARKS)]
                axes.errorbar(
                    mean(values), row + 0.25 * place, xerr=spread, fmt=mark, color=colour, capsize=3
                )
    marks = ", ".join(f"{'●■▲◆'[i % len(MARKS)]} {side}" for i, side in enumerate(sides))
    axes.set(xlabel=f"{name} ({marks})", yticks=range(len(variants)))
    axes.set_yticklabels([one.label for one in variants], fontsize=8)
    axes.set_ylim(len(variants) - 0.3, -0.7)
    axes.margins(x=0.12)
