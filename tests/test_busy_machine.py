"""Trainings on cores that other processes use too: how many threads compute, and how they wait."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT

from core.training import run as training

# Two threads that meet 200 times on one core, as beside a busy process: what that costs, beside one thread.
ON_ONE_CORE = """
import os, time
import core
import torch

def seconds(threads):
    torch.set_num_threads(threads)
    x.add_(1)
    start = time.process_time()
    for _ in range(200):
        x.add_(1)
    return time.process_time() - start

x = torch.zeros(400_000)
torch.set_num_threads(2)
x.add_(1)
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), {min(os.sched_getaffinity(0))})
one, two = seconds(1), seconds(2)
assert two < 40 * one, (one, two)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_threads_that_share_a_core_let_each_other_work() -> None:
    drop = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_CORE], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr


def imported(script: Path) -> list[str]:
    """The packages that a script imports as it starts, in order."""
    names = []
    for line in ast.parse(script.read_text("utf-8")).body:
        if isinstance(line, ast.Import):
            names += [alias.name for alias in line.names]
        elif isinstance(line, ast.ImportFrom):
            names.append(line.module)
    return [name.partition(".")[0] for name in names]


@pytest.mark.parametrize("script", sorted(ROOT.glob("train/*.py")) + sorted(ROOT.glob("inference/*.py")))
def test_scripts_say_how_threads_wait_before_torch_loads(script: Path) -> None:
    others = [name for name in imported(script) if name not in sys.stdlib_module_names and name != "yaml"]
    assert others[0] == "core"


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (8, 7)])
def test_a_training_leaves_a_core_free(cores: int, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        with mock.patch.dict(os.environ), mock.patch.object(training, "cores", lambda: cores):
            os.environ.pop("OMP_NUM_THREADS", None)
            torch.set_num_threads(cores)
            training.leave_a_core_free()
            training.leave_a_core_free()
            assert torch.get_num_threads() == threads
            torch.set_num_threads(cores)
            os.environ["OMP_NUM_THREADS"] = str(cores)
            training.leave_a_core_free()
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
