"""How the pictures of an update are shared out over processes and micro-batches."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TypeVar

from core import launch
from core.config.schema import RunConfig

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=RunConfig)


def fit_batch(config: Config, processes: int) -> tuple[Config, list[str]]:
    """The configuration with numbers that fit so many processes, and sentences on what was changed for that.

    Afterwards `batch_size` is processes x `pictures_at_once` x `grad_accum_steps`. A `grad_accum_steps` that
    is given decides, where it fits; else `pictures_at_once` does (None: all of a process's pictures).
    """
    size, steps, changes = config.batch_size, config.grad_accum_steps, []
    if steps is not None and size % (processes * steps) == 0:
        at_once = size // (processes * steps)
    else:
        if steps is not None:
            changes.append(
                f"grad_accum_steps {steps} is ignored: batch_size {size} does not divide by {processes} "
                f"{_noun(processes)} x {steps}"
            )
        at_once = config.pictures_at_once or _divided_up(size, processes)
        size = _divided_up(size, processes * at_once) * processes * at_once
        if size != config.batch_size:
            changes.append(
                f"batch_size is {size}, not {config.batch_size}, which does not divide by {processes} "
                f"{_noun(processes)} x pictures_at_once {at_once}"
            )
    steps = size // (processes * at_once)
    return replace(config, batch_size=size, pictures_at_once=at_once, grad_accum_steps=steps), changes


def fitted_batch(config: Config) -> Config:
    """The configuration as `fit_batch` fits it to all processes; what it changed is a warning, shown once."""
    config, changes = fit_batch(config, launch.processes())
    if launch.is_main():
        for sentence in changes:
            log.warning("%s", sentence)
    return config


def describe_batch(config: RunConfig, processes: int) -> str:
    """The numbers that `fit_batch` found, as text."""
    per_process = config.batch_size // processes
    return (
        f"pictures per update: {config.batch_size}, per process: {per_process}, "
        f"at once: {config.pictures_at_once}"
    )


def _noun(processes: int) -> str:
    return "process" if processes == 1 else "processes"


def _divided_up(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)
