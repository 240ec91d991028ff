"""Several processes that share the pictures of a run: what they agree on, and how none ends the others.

torchrun ends all processes when one of them fails. Here that would cost pictures. So a process with an error
tells it and waits for the others, and those go on when another one is killed, for as long as torchrun lets
them: 30 seconds, or its --shutdown-timeout.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import TypeVar

import torch
from torch.distributed import Store, rendezvous

from core import launch
from core.config.settings import Settings
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.split import Split
from core.printable import say

AGREEMENT = timedelta(minutes=30)  # that the first process may take, say to read all weights for their hashes
PAUSE = 0.2  # seconds
LOST = re.compile("gloo|nccl|connection|peer", re.IGNORECASE)  # in what a collective says then
STARTED, TERMINATED, ENDED = "started", "terminated", "ended"  # keys of the store

T = TypeVar("T")


def share(items: Sequence[T]) -> list[T]:
    """Those of the items that this process does; ValueError where it cannot be told from the others."""
    _check_rank()
    return list(items[launch.rank() :: launch.processes()])


def _check_rank() -> None:
    if launch.processes() > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"the environment speaks of {launch.processes()} processes, but not of RANK: start them with "
            "torchrun, or unset WORLD_SIZE to use one"
        )


def agreed(name: str, make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; it must be JSON, and is asked for in all, once a name."""
    if launch.processes() == 1:
        return make()
    _check_rank()
    if launch.is_main():
        common_store().set(name, json.dumps(make()))
    common_store().wait([name], AGREEMENT)
    return json.loads(common_store().get(name))


def gathered(name: str, mine: T) -> list[T]:
    """What each process has found, JSON, in the first one; in the others what is theirs alone.

    The first one does not wait for those that are gone. It is asked for in all, once a name.
    """
    if launch.processes() == 1:
        return [mine]
    store, keys = common_store(), [f"{name} {rank}" for rank in range(launch.processes())]
    store.set(keys[launch.rank()], json.dumps(mine))
    if not launch.is_main():
        return [json.loads(json.dumps(mine))]
    elsewhere = launch.processes() > launch.place()[1]
    patient_until = time.monotonic() + AGREEMENT.total_seconds()
    while not store.check(keys) and time.monotonic() < patient_until:
        if not (launch.neighbours() > 0 or elsewhere):
            break
        time.sleep(PAUSE)
    return [json.loads(store.get(key)) for key in keys if store.check([key])]


@contextmanager
def on_its_own(told: Callable[[Exception], tuple[str, int]]) -> Iterator[None]:
    """Within it, an error of this process ends no other one, nor does another one's death end this one.

    `told` gives an error's sentence and exit code. With one process nothing is different.
    """
    if launch.processes() == 1:
        yield
        return
    common_store().add(STARTED, 1)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except Exception as error:
        sentence, code = told(error)
        say(f"{sentence} (process {launch.rank() + 1} of {launch.processes()})", sys.stderr)
        _end(lambda: _count(ENDED) < launch.processes() and launch.neighbours() > 0)
        launch.end_launch()
        launch.leave(code)
    # The first process may hold the store, of which others need what was agreed on.
    _end(lambda: launch.is_main() and _count(STARTED) < launch.processes())


def check_together(settings: Sequence[Settings], batch: int, planned: bool = False) -> None:
    """ValueError for settings with which processes cannot make a picture together.

    The same where there is one process alone, unless the run is only `planned`.
    """
    if launch.processes() < 2 and not planned:
        raise ValueError("--split is for several processes: start them with torchrun --nproc_per_node N")
    if batch > 1:
        raise ValueError(f"--split and --batch {batch} do not go together: use --batch 1")
    if (reuse := max((each.reuse for each in settings), default=1)) > 1:
        told = f"--reuse {reuse}, which --fast sets too,"
        raise ValueError(f"--split and {told} do not go together: use --reuse 1")


@contextmanager
def on_one_picture(
    pipeline: UltraPixelPipeline, settings: Sequence[Settings], batch: int = 1
) -> Iterator[None]:
    """Within it, all processes make each picture of the pipeline together; errors as of `check_together`."""
    check_together(settings, batch)
    pipeline.split = Split(pipeline.device, common_store(), launch.rank(), launch.processes())
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not LOST.search(str(error)):
            raise
        reason = f"another process of --split may be lost ({str(error).splitlines()[0]})"
        raise ValueError(f"{reason}: the same command makes what is missing") from None
    else:
        launch.part()  # after an error the others may still wait in the group, and it would for them
    finally:
        pipeline.split = None


@cache
def common_store() -> Store:
    """What all processes read and write."""
    return next(iter(rendezvous("env://")))[0]


def _count(key: str) -> int:
    return common_store().add(key, 0)


def _end(is_needed: Callable[[], bool]) -> None:
    """Tell the others that the work here is done, and stay as long as that is needed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(RuntimeError):  # those who held the store are gone
        common_store().add(ENDED, 1)
        while is_needed():
            time.sleep(PAUSE)


def _terminated(number: int, _frame: FrameType | None) -> None:
    """Go on if the reason is another process's death, which was not one by this very signal."""
    with suppress(RuntimeError):
        if launch.neighbours() < launch.place()[1] - 1 and not common_store().check([TERMINATED]):
            return
        common_store().set(TERMINATED, "")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
