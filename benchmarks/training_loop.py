"""What the training loop costs beside forward and backward, and how long a checkpoint holds it up.

python benchmarks/training_loop.py: the tiny family's guidance at 384 pixels, with a running mean of the
weights, log and progress bar. The loop's share of a step should be at most 5 %, and a checkpoint should
hold up the training for at most one such step per 100 MB.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from timing import seconds
from tiny_guidance import BATCH, guidance_recipe
from torch import nn

from core.training.log import UpdateBar
from core.training.trainer import Recipe, Trainer, TrainSettings

UPDATES, WARM = 24, 4
WIDTH = 2800  # of a linear layer that holds 100 MB with Adam's two means
SAVES = 5


class Stopwatch:
    """Seconds spent inside functions, since the last reading."""

    def __init__(self) -> None:
        self._spent = 0.0

    def around(self, function: Callable) -> Callable:
        """The same function, watched."""

        def watched(*inputs, **named):
            start = time.perf_counter()
            try:
                return function(*inputs, **named)
            finally:
                self._spent += time.perf_counter() - start

        return watched

    def read(self) -> float:
        """Seconds since the last reading."""
        spent, self._spent = self._spent, 0.0
        return spent


def measure_steps(folder: Path, accelerator: Accelerator) -> tuple[float, float]:
    """Median seconds of a step, and the share of it outside forward and backward."""
    watch, recipe = Stopwatch(), guidance_recipe()
    settings = TrainSettings(lr=1e-4, updates=UPDATES, batch_size=BATCH, save_every=10**9, ema=0.999)
    trainer = Trainer(replace(recipe, loss=watch.around(recipe.loss)), settings, folder, accelerator)
    accelerator.backward = watch.around(accelerator.backward)
    bar = UpdateBar(accelerator, folder / "log.jsonl", 0, UPDATES)
    inside, ends = [], []

    def on_update(figures: dict[str, float]) -> None:
        bar(figures)
        inside.append(watch.read())
        ends.append(time.perf_counter())

    trainer.run(on_update)
    bar.close()
    whole = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    shares = [1 - part / step for part, step in zip(inside[1:], whole, strict=True)]
    return median(whole[WARM:]), median(shares[WARM:])


def measure_saves(folder: Path, accelerator: Accelerator) -> tuple[float, float]:
    """Megabytes of a checkpoint, and the median seconds for which saving one holds up the training."""
    layer = nn.Linear(WIDTH, WIDTH)
    recipe = Recipe(layer, lambda _: iter(()), lambda *_: None)
    trainer = Trainer(recipe, TrainSettings(lr=1e-4, updates=1, batch_size=1), folder, accelerator)
    layer.weight.grad, layer.bias.grad = torch.ones_like(layer.weight), torch.ones_like(layer.bias)
    trainer.optimizer.step()
    held_up = []
    for trainer.step in range(SAVES):
        held_up.append(seconds(trainer.save))
        trainer._written.result()
    return max(path.stat().st_size for path in folder.glob("step_*.pt")) / 1e6, median(held_up[1:])


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as temporary:
        step, share = measure_steps(Path(temporary, "steps"), accelerator)
        megabytes, held_up = measure_saves(Path(temporary, "saves"), accelerator)
    print(f"a step of {BATCH} pictures takes {step:.3f} s, outside forward and backward {share:.2%}")
    per_100 = held_up / step * 100 / megabytes
    print(f"a checkpoint of {megabytes:.0f} MB holds up {held_up:.3f} s: {per_100:.2f} steps per 100 MB")


if __name__ == "__main__":
    main()
