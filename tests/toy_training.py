"""A small recipe for the trainer's tests: python tests/toy_training.py FOLDER UPDATES [DIES_AT]"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from core.launch import leave
from core.training.guidance import draw_noise
from core.training.log import RunLog
from core.training.trainer import Recipe, StepLoss, Trainer, TrainSettings
from gdf.loss_weights import LossWeight, constant
from gdf.schedules import cosine

BATCH = 8


def train(
    folder: Path,
    updates: int,
    grad_accum_steps: int = 1,
    width: int = 4,
    bad_updates: tuple[int, ...] = (),
    bad_gradients: tuple[int, ...] = (),
    dies_at: int | None = None,
    pause: float = 0.0,
    save_every: int = 10,
    keep: int = 2,
    backup_every: int = 0,
    warmup_updates: int = 4,
    lr_end: float | None = None,
    stop: int | None = None,
    loss_weight: LossWeight | None = None,
    ema: float = 0.9,
    compile: bool = False,
    optimizer: str = "adamw",
    sample: Callable[[int], None] | None = None,
) -> Trainer:
    """Fit a linear map to twice its input; the samples follow from their keys, the data from the position.

    The last process raises at update `dies_at`; after `stop` updates the training is stopped as by Ctrl-C.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    settings = TrainSettings(
        lr=0.05, updates=updates, batch_size=BATCH, grad_accum_steps=grad_accum_steps,
        warmup_updates=warmup_updates, lr_end=lr_end, save_every=save_every, keep=keep,
        backup_every=backup_every, ema=ema, compile=compile, optimizer=optimizer,
        adaptive_loss_weight=loss_weight is None, loss_weight=loss_weight or constant,
    )  # fmt: skip
    per_process = BATCH // accelerator.num_processes // grad_accum_steps

    def batches(position: dict[str, int] | None) -> Iterator[tuple[Tensor, dict[str, int]]]:
        """Global micro-batches of consecutive numbers; each process takes its own part of them."""
        start = 0 if position is None else position["sample"]
        while True:
            first = start + accelerator.process_index * per_process
            start += per_process * accelerator.num_processes
            yield torch.arange(first, first + per_process), {"sample": start}

    def loss(module: nn.Module, batch: Tensor, keys: list[tuple[int, ...]]) -> StepLoss:
        noise = draw_noise(keys, (width, 2, 2), (width, 1, 1))
        time.sleep(pause)
        offset = torch.sin(batch.float())[:, None]
        x = noise.epsilon.flatten(2).mean(-1) + offset
        predicted = module(x)
        per_sample = (predicted - 2 * x).square().mean(1)
        if keys[0][1] == dies_at and accelerator.is_last_process:
            raise RuntimeError("this process cannot go on")
        if keys[0][1] + 1 == stop:
            signal.raise_signal(signal.SIGINT)
        if keys[0][1] in bad_updates:
            per_sample = per_sample * float("nan")
        if keys[0][1] in bad_gradients:
            per_sample = (
                per_sample + (0 * predicted).square().sum(1).sqrt()
            )  # adds 0, whose gradient is not finite
        return StepLoss(per_sample, cosine(noise.t))

    recipe = Recipe(nn.Linear(width, width), batches, loss, sample)
    trainer = Trainer(recipe, settings, folder, accelerator)
    trainer.resume()
    log = RunLog(folder / "log.jsonl", trainer.step) if accelerator.is_main_process else None
    trainer.run(log)
    return trainer


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Weights and EMA of the newest checkpoint."""
    state = torch.load(sorted(folder.glob("step_*.pt"))[-1], weights_only=True)
    return {**state["parameters"], **{f"ema.{name}": value for name, value in state["ema"].items()}}


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), dies_at=int(sys.argv[3]) if len(sys.argv) > 3 else None)
    leave(0)
