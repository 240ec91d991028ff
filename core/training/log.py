"""What a training tells: a line of figures per update, a progress bar, trackers, the loss by noise level."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from core.training.trainer import LossesSeen
from core.weights.checkpoint import replacing, save_text

log = logging.getLogger(__name__)

CURVE = "loss_by_logsnr.png"
BINS = 40  # of the picture; neighbouring loss buckets are taken together
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class RunLog:
    """Figures of every update as lines of JSON in a file, which goes on after update `done`."""

    def __init__(self, path: Path, done: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if path.exists():  # a killed run may have logged updates that its last checkpoint does not hold
            lines = path.read_text("utf-8", errors="replace").splitlines()
            save_text(path, "".join(line + "\n" for line in lines if _step(line) <= done))

    def __call__(self, figures: Mapping[str, float]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(figures) + "\n")
        except OSError as error:  # such as a full disk, which names no file
            error.filename = error.filename or str(self._path)
            raise


def _step(line: str) -> float:
    """The update of a line, infinity for one that was cut off or is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return float("inf")


def tracker_named(name: str) -> str | None:
    """The tracker for accelerate; 'auto' is TensorBoard where installed. ValueError if it is missing."""
    if name == "none":
        return None
    if name == "auto":
        return "tensorboard" if find_spec("tensorboard") else None
    if find_spec(PACKAGES[name]) is None:
        raise ValueError(f"tracker {name} needs a package: pip install {PACKAGES[name]}")
    return name


def _draws_curves() -> bool:
    return find_spec("matplotlib") is not None


def tell_of_curve() -> None:
    """Say that the loss by noise level will not be drawn, where matplotlib is missing."""
    if not _draws_curves():
        log.warning("%s will not be drawn, as matplotlib is missing: pip install matplotlib", CURVE)


class UpdateBar:
    """A progress bar, the log file and the trackers, for every update."""

    def __init__(self, accelerator: Accelerator, path: Path, done: int, updates: int) -> None:
        self._accelerator, self._log = accelerator, RunLog(path, done)
        self._bar = tqdm(total=updates, initial=done, unit="update", dynamic_ncols=True)

    def __call__(self, figures: dict[str, float]) -> None:
        self._log(figures)
        self._accelerator.log(figures, step=int(figures["step"]))
        shown = {"loss": f"{figures['loss']:.4f}", "lr": f"{figures['lr']:.1e}",
                 "images/s": f"{figures['images_per_second']:.2f}",
                 "memory": f"{figures['memory_gib']:.1f} GiB"}  # fmt: skip
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(int(figures["step"]) - self._bar.n)

    def close(self) -> None:
        """End the bar's line, so that what is written next stands on its own."""
        self._bar.close()


# --- loss by noise level --------------------------------------------------------------------------


def binned_losses(seen: LossesSeen) -> list[tuple[float, float]]:
    """(logSNR, mean loss) of the noise levels that were met, increasing, neighbours taken together."""
    edges = seen.edges.double().cpu().numpy()
    centres = np.concatenate([edges[:1], (edges[:-1] + edges[1:]) / 2, edges[-1:]])
    columns = [seen.sums.double().cpu().numpy(), seen.counts.double().cpu().numpy()]
    columns.append(centres * columns[1])
    parts = [np.array([part.sum() for part in np.array_split(column, BINS)]) for column in columns]
    sums, counts, positions = parts
    met = counts > 0
    return list(zip(positions[met] / counts[met], sums[met] / counts[met], strict=True))


def save_losses(seen: LossesSeen, folder: Path, step: int) -> None:
    """Write the picture of the loss by logSNR into `folder`, where any update was made and matplotlib is.

    One that cannot be written costs a warning.
    """
    points = binned_losses(seen)
    if not points:
        return
    if not _draws_curves():
        return
    from matplotlib.figure import Figure  # here, as nothing else needs it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3)
    axes.set(xlabel="logSNR (right: little noise)", ylabel="mean loss", title=f"up to update {step}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    try:
        with replacing(folder / CURVE) as temporary:
            figure.savefig(temporary, format="png", dpi=100)
    except OSError as error:  # a full disk ends the training where a checkpoint cannot be written
        log.warning("%s was not written (%s)", folder / CURVE, error)
