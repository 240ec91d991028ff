"""A script as one of several processes, as torchrun starts them: who tells what, and how all of them end."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

import psutil

PATIENCE = 20.0  # seconds that other processes leave to the first one to tell the same error
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of torchrun and accelerate; of MPI
LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate")


def processes() -> int:
    """How many processes the launcher started, on all machines; 1 without a launcher."""
    return next((_number(name, 1) for name in COUNTS if name in os.environ), 1)


def tasks_of_srun() -> int:
    """How many tasks Slurm's srun started, each perhaps a launcher; 1 without it."""
    return _number("SLURM_STEP_NUM_TASKS", 1)


def is_launched() -> bool:
    """Whether a launcher started this process, if only this one."""
    return any(name in os.environ for name in COUNTS)


def rank() -> int:
    """The number of this process among all, from 0."""
    return _number("RANK", 0)


def is_main() -> bool:
    """Whether this process is the first of all, which alone tells what all would tell."""
    return rank() == 0


def place() -> tuple[int, int]:
    """The number of this process on its machine, from 0, and how many there are on it."""
    return _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)


def is_own_setting(name: str) -> bool:
    """Whether the launcher has set this environment variable, and nobody before it."""
    with suppress(psutil.Error):
        return is_launched() and name in os.environ and name not in psutil.Process(os.getppid()).environ()
    return False


def neighbours() -> int:
    """How many other processes torchrun has on this machine by now; without torchrun, how many it had."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(psutil.Error):
            children = psutil.Process(os.getppid()).children()
            return sum(child.status() != psutil.STATUS_ZOMBIE for child in children) - 1
    return place()[1] - 1


def is_first() -> bool:
    """Whether this is the first process on this machine."""
    return place()[0] == 0


def fail(message: str, code: int, patience: float = 0.0) -> NoReturn:
    """End with a message on standard error and an exit code, and the launch with it.

    With `patience` all fail for a reason that all know: the first gives the others so many seconds to end.

    Where all processes of a machine fail, the first one's message alone is shown; where another one fails
    alone, its own, a little later.
    """
    if not is_first():
        if patience:  # the first one waits for this one
            leave(code)
        _leave_it_to_the_first(code)
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    end_launch(patience)
    leave(code)


def part() -> None:
    """Part from the processes of one's group, which is over; gloo's stays until `leave`."""
    import torch.distributed as dist  # here, so that a wrong flag is told before torch is loaded

    if dist.is_initialized() and dist.get_backend() != "gloo":
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    In a group of gloo's it ends at once, without Python's own end. Threads of gloo drop the tensors of the
    last sum late, and need Python's lock for it: one that does so while the group is destroyed waits for it
    forever, and one that does so while Python ends aborts the process.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any longer
            stream.flush()
    os._exit(code)


@contextmanager
def told_once() -> Iterator[None]:
    """Within it, what all processes print alike, as argparse does before it ends a script, is shown once."""
    hidden = io.StringIO()
    try:
        if is_first():
            yield
        else:
            with redirect_stdout(hidden), redirect_stderr(hidden):
                yield
    except SystemExit as end:
        if end.code and is_first():
            end_launch()
        elif end.code:
            _leave_it_to_the_first(end.code)
        raise


def end_launch(patience: float = 0.0) -> None:
    """End the launcher that started this process, and what else it started; nothing without a launcher.

    torchrun answers every exit code but 0 with a traceback and a table of its own, in which one sentence is
    lost, and nothing that a process returns keeps it from that. A signal that it does not handle ends it
    without a word, and with an exit code that is not 0. A launcher that is to start anew is left to do so.
    """
    restarts = _number("TORCHELASTIC_MAX_RESTARTS", 0) - _number("TORCHELASTIC_RESTART_COUNT", 0)
    if "TORCHELASTIC_RUN_ID" not in os.environ or restarts > 0 or not hasattr(signal, "SIGUSR1"):
        return
    with suppress(psutil.Error):
        launcher = psutil.Process(os.getppid())
        if not any(Path(part).name in LAUNCHERS for part in launcher.cmdline()):
            return
        others = [process for process in launcher.children() if process.pid != os.getpid()]
        patient_until = time.monotonic() + patience
        while neighbours() > 0 and time.monotonic() < patient_until:
            time.sleep(0.05)
        launcher.send_signal(signal.SIGUSR1)
        for process in others:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _leave_it_to_the_first(code: int) -> None:
    """Wait for the end that the first process brings; returns if it brings none."""
    launcher, patient_until = os.getppid(), time.monotonic() + PATIENCE
    while time.monotonic() < patient_until:
        if os.getppid() != launcher:
            leave(code)
        time.sleep(0.05)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"the environment variable {name} is {text!r}, not a number: unset it, or use torchrun"
        ) from None
