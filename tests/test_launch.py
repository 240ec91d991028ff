"""How a training is started: by torchrun or alone, with batches that fit, and errors that are told once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from conftest import ROOT
from training_lesson import torchrun

from core import launch
from core.config.batch_size import describe_batch, fit_batch
from core.config.schema import RunConfig
from core.training import distributed

T2I = str(ROOT / "train" / "train_t2i.py")
TINY_T2I, PUBLISHED_T2I = (
    str(ROOT / "configs" / name) for name in ("tiny/train_t2i.yaml", "training/t2i.yaml")
)
SHIPPED = sorted([*ROOT.glob("configs/training/*.yaml"), *ROOT.glob("configs/tiny/train_*.yaml")])


def config(**values: object) -> RunConfig:
    return RunConfig(experiment_id="x", checkpoint_path="c", webdataset_path="d", **values)


def split(values: dict[str, object], processes: int) -> tuple[int, int, int]:
    """Pictures per update, at once in each process, and how often."""
    fitted, _ = fit_batch(config(**values), processes)
    return fitted.batch_size, fitted.pictures_at_once, fitted.grad_accum_steps


# --- pictures per update --------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 8, 16])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_shipped_file_fits_one_to_sixteen_processes(path: Path, processes: int) -> None:
    values = yaml.safe_load(path.read_text("utf-8"))
    given = config(batch_size=values["batch_size"], pictures_at_once=values["pictures_at_once"])
    fitted, changes = fit_batch(given, processes)
    assert fitted.batch_size == processes * fitted.pictures_at_once * fitted.grad_accum_steps
    assert given.batch_size <= fitted.batch_size < given.batch_size + processes
    assert len(changes) == (fitted.batch_size != given.batch_size)
    assert not (changes and path.parent.name == "training") and "grad_accum_steps" not in values
    assert fit_batch(fitted, processes) == (fitted, [])


@pytest.mark.parametrize(
    ("values", "processes", "expected"),
    [
        ({}, 8, (16, 1, 2)),
        ({"batch_size": 16, "pictures_at_once": 4}, 2, (16, 4, 2)),
        ({"batch_size": 16, "pictures_at_once": 3}, 2, (18, 3, 3)),
        ({"batch_size": 4, "pictures_at_once": 8}, 1, (8, 8, 1)),
        ({"batch_size": 12, "pictures_at_once": None}, 2, (12, 6, 1)),
        ({"batch_size": 8, "pictures_at_once": None}, 16, (16, 1, 1)),
        ({"batch_size": 4, "grad_accum_steps": 2}, 1, (4, 2, 2)),
        ({"batch_size": 4, "grad_accum_steps": 2}, 2, (4, 1, 2)),
        ({"batch_size": 4, "grad_accum_steps": 2}, 8, (8, 1, 1)),
        ({"batch_size": 16, "grad_accum_steps": 3, "pictures_at_once": 2}, 2, (16, 2, 4)),
    ],
)
def test_a_batch_is_shared_out(
    values: dict[str, object], processes: int, expected: tuple[int, int, int]
) -> None:
    assert split(values, processes) == expected


def test_what_does_not_fit_is_told_in_a_sentence_each() -> None:
    fitted, (ignored, rounded) = fit_batch(config(batch_size=4, grad_accum_steps=2), 8)
    assert "grad_accum_steps 2 is ignored" in ignored and "batch_size is 8, not 4" in rounded
    assert describe_batch(fitted, 8) == "pictures per update: 8, per process: 1, at once: 1"
    assert fit_batch(config(batch_size=4, grad_accum_steps=2), 2)[1] == []


@pytest.mark.parametrize("key", ["pictures_at_once", "grad_accum_steps"])
def test_shares_are_above_zero(key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' must be above 0, not 0"):
        config(**{key: 0})


# --- joining --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_cannot_find_each_other_do_not_train_alone(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="speaks of 2 processes.*torchrun"):
        distributed.join()


def test_fewer_joined_processes_than_were_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    with mock.patch.object(distributed, "Accelerator") as accelerator:
        accelerator.return_value.num_processes = 1
        with pytest.raises(ValueError, match="speaks of 3 processes, of which 1 met"):
            distributed.join()


def test_processes_of_srun_alone_do_not_train_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="srun started 4 processes .* put torchrun between"):
        distributed.join()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "x")
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS is 'x'"):
        distributed.join()
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "0"), ("SLURM_STEP_NUM_TASKS", "2")):
        monkeypatch.setenv(name, value)
    with mock.patch.object(distributed, "Accelerator") as accelerator:
        accelerator.return_value.num_processes = 8
        distributed.join()
    (handler,) = accelerator.call_args.kwargs["kwargs_handlers"]
    assert handler.timeout > timedelta(hours=1)  # as one process may cache its data for long


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "0"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    with mock.patch.object(torch.accelerator, "device_count", return_value=4):
        with pytest.raises(ValueError, match="8 processes .* with 4 GPUs"):
            distributed.join()


def test_a_world_size_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many'"):
        launch.processes()


def test_a_dry_run_of_several_processes_needs_no_weights_and_prints_once() -> None:
    done = torchrun(T2I, PUBLISHED_T2I, "lr=5e-5", "grad_accum_steps=3", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures per update: 16, per process: 8, at once: 1\n") == 1
    printed = yaml.safe_load(done.stdout)
    assert (printed["lr"], printed["grad_accum_steps"]) == (5e-5, 8)
    assert done.stderr.count("grad_accum_steps 3 is ignored") == 1


def test_an_error_of_all_processes_is_told_once_without_torchs_own(tmp_path: Path) -> None:
    done = torchrun(T2I, TINY_T2I, f"checkpoint_path={tmp_path}", "webdataset_path=nowhere")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "nowhere" in done.stderr
    assert "Traceback" not in done.stderr and "exitcode" not in done.stderr


# --- who tells an error ---------------------------------------------------------------------------

TORCHRUN = """
import os, subprocess, sys, time
workers = []
for rank in "01":
    started = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    environment = {**os.environ, **started}
    workers.append(subprocess.Popen([sys.executable, *sys.argv[1:]], env=environment))
while all(worker.poll() is None for worker in workers):
    time.sleep(0.05)
for worker in workers:
    worker.terminate()
print("a table of torch's")
sys.exit(1)
"""
WORKER = """
import argparse, sys, time
from core import launch
launch.PATIENCE = float(sys.argv[1])
if sys.argv[2] == "flag":
    with launch.told_once():
        argparse.ArgumentParser("script").error("unknown flag")
if sys.argv[2] == "crash":
    from core.commands.flags import run
    run(lambda: 1 / 0)
if sys.argv[2] == "all" or not launch.is_first():
    launch.fail("error: broken", 2)
time.sleep(60)
"""
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launched(tmp_path: Path) -> Launch:
    """Two processes under a script named torchrun, which answers to their ends as that does."""
    (tmp_path / "worker.py").write_text(WORKER)

    def run(*words: str, name: str = "torchrun") -> subprocess.CompletedProcess[str]:
        (tmp_path / name).write_text(TORCHRUN)
        command = [sys.executable, str(tmp_path / name), str(tmp_path / "worker.py"), *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    return run


def test_the_first_process_tells_an_error_of_all_and_ends_the_launcher(launched: Launch) -> None:
    done = launched("60", "all")
    assert (done.stderr, done.stdout, done.returncode) == ("error: broken\n", "", -signal.SIGUSR1)


def test_an_error_of_another_process_alone_is_told_too(launched: Launch) -> None:
    done = launched("0.2", "one")
    assert (done.stderr, done.stdout, done.returncode) == ("error: broken\n", "", -signal.SIGUSR1)


def test_a_crash_of_all_is_told_once_too(launched: Launch) -> None:
    done = launched("60", "crash")
    assert done.stderr.count("Traceback") == done.stderr.count("ZeroDivisionError: ") == 1
    assert (done.stdout, done.returncode) == ("", -signal.SIGUSR1)


def test_a_launcher_that_is_to_start_anew_is_left_to_do_so(
    launched: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launched("60", "all").stdout == "a table of torch's\n"


def test_what_argparse_tells_is_told_once_too(launched: Launch) -> None:
    done = launched("60", "flag")
    assert done.stderr == "usage: script [-h]\nscript: error: unknown flag\n"
    assert (done.stdout, done.returncode) == ("", -signal.SIGUSR1)


def test_a_parent_that_is_no_launcher_goes_on(launched: Launch) -> None:
    done = launched("60", "all", name="notebook")
    assert (done.stdout, done.returncode) == ("a table of torch's\n", 1)


# --- how a process ends ---------------------------------------------------------------------------

LEAVING = """
import atexit, sys
import torch.distributed as dist
from core import launch
if sys.argv[1] != "alone":
    dist.init_process_group(sys.argv[1], store=dist.HashStore(), rank=0, world_size=1)
atexit.register(print, "Python's own end")
print("done", end="")
launch.part()
launch.leave(3)
"""


@pytest.mark.parametrize(("group", "printed"), [("gloo", "done"), ("alone", "donePython's own end\n")])
def test_a_process_in_a_group_of_gloo_ends_at_once(group: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING, group], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, printed, "")
