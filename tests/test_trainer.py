"""The training loop on a small recipe: resuming, killing, stopping, splitting over processes, bad losses."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from peers import random_stage_c
from torch import nn
from toy_training import read_weights, train
from training_lesson import torchrun

from core.training.trainer import check_batch_size, checkpoints, compile_blocks
from gdf.loss_weights import constant

UPDATES = 30


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    train(tmp_path / "whole", updates=UPDATES)
    for updates in (7, 8, UPDATES):
        train(tmp_path / "parts", updates=updates)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = read_weights(tmp_path / "whole"), read_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_training_learns_and_running_again_does_nothing(tmp_path: Path) -> None:
    train(tmp_path, updates=60)
    values = losses(tmp_path)
    assert sum(values[-10:]) < 0.5 * sum(values[:10])
    before = read_weights(tmp_path)
    train(tmp_path, updates=60)
    assert len(losses(tmp_path)) == 60
    assert all(torch.equal(before[name], value) for name, value in read_weights(tmp_path).items())


def test_accumulation_gives_the_same_weights(tmp_path: Path) -> None:
    train(tmp_path / "one", updates=5, grad_accum_steps=1)
    train(tmp_path / "four", updates=5, grad_accum_steps=4)
    one, four = read_weights(tmp_path / "one"), read_weights(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-5, atol=1e-6)


def test_a_fixed_weight_multiplies_each_loss(tmp_path: Path) -> None:
    train(tmp_path / "plain", updates=1, warmup_updates=0, loss_weight=constant)
    train(tmp_path / "none", updates=1, warmup_updates=0, loss_weight=lambda logsnr: 0 * logsnr)
    plain, none = losses(tmp_path / "plain"), losses(tmp_path / "none")
    norms = [json.loads((tmp_path / n / "log.jsonl").read_text())["grad_norm"] for n in ("plain", "none")]
    assert plain == none and norms[0] > 0 and norms[1] == 0


def test_old_checkpoints_are_pruned_and_backups_kept(tmp_path: Path) -> None:
    train(tmp_path, updates=20, save_every=2, keep=2, backup_every=8)
    assert [int(p.stem[5:]) for p in sorted(tmp_path.glob("step_*.pt"))] == [8, 16, 18, 20]


def test_a_loss_that_is_not_finite_is_skipped_and_several_end_the_run(tmp_path: Path) -> None:
    train(tmp_path / "some", updates=12, bad_updates=(3, 4, 9))
    assert len(losses(tmp_path / "some")) == 9
    weights = read_weights(tmp_path / "some")
    assert all(torch.isfinite(value).all() for value in weights.values())
    train(tmp_path / "all", updates=4)
    with pytest.raises(ValueError, match="not finite in 5 updates in a row.*smaller lr"):
        train(tmp_path / "all", updates=20, bad_updates=tuple(range(4, 20)))
    assert read_weights(tmp_path / "all")


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_an_error_loses_no_update(tmp_path: Path, grad_accum_steps: int) -> None:
    same = {"grad_accum_steps": grad_accum_steps, "save_every": 100}
    train(tmp_path / "whole", updates=12, **same)
    with pytest.raises(RuntimeError, match="cannot go on"):
        train(tmp_path / "parts", updates=12, dies_at=7, **same)
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["step_00000007.pt"]
    train(tmp_path / "parts", updates=12, **same)
    whole, parts = read_weights(tmp_path / "whole"), read_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_nothing_is_saved_or_pruned_while_updates_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="remove the last checkpoint"):
        train(tmp_path / "all", updates=20, save_every=1, bad_updates=tuple(range(6, 20)))
    assert [path.name for path in checkpoints(tmp_path / "all")] == ["step_00000005.pt", "step_00000006.pt"]
    with pytest.raises(ValueError, match="remove the last checkpoint"):
        train(tmp_path / "rare", updates=20, save_every=4, keep=1, bad_updates=tuple(range(6, 20)))
    assert [path.name for path in checkpoints(tmp_path / "rare")] == ["step_00000004.pt", "step_00000010.pt"]
    train(tmp_path / "end", updates=8, save_every=1, bad_updates=(6, 7))
    assert "the last 2 updates were skipped" in caplog.text


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(tmp_path: Path) -> None:
    train(tmp_path, updates=8, bad_gradients=(2, 5))
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == [1, 2, 4, 5, 7, 8]
    assert all(torch.isfinite(value).all() for value in read_weights(tmp_path).values())
    with pytest.raises(ValueError, match="not finite in 5 updates in a row"):
        train(tmp_path, updates=20, bad_gradients=tuple(range(8, 20)))


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tmp_path, updates=2)
    with pytest.raises(ValueError, match="another training"):
        train(tmp_path, updates=4, width=5)


def test_an_optimiser_can_compute_otherwise_later_but_not_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        train(tmp_path / folder, updates=4)
    (plain,) = train(tmp_path / "one", updates=8).optimizer.param_groups
    (fused,) = train(tmp_path / "two", updates=8, optimizer="adamw_fused").optimizer.param_groups
    assert fused["fused"] and not plain["fused"] and fused["lr"] == plain["lr"]
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name])
    other = types.SimpleNamespace(AdamW8bit=torch.optim.SGD)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=other))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", other)
    with pytest.raises(ValueError, match="step_00000008.pt does not fit optimizer adamw_8bit .*as before"):
        train(tmp_path / "one", updates=9, optimizer="adamw_8bit")


def test_machines_that_see_other_folders_do_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, updates=2)
    monkeypatch.setattr(Accelerator, "gather", lambda _, own: torch.cat([own, torch.tensor([-1])]))
    with pytest.raises(ValueError, match="different checkpoints in .* .updates 2, none.: all machines must"):
        train(tmp_path, updates=4)


def test_a_full_disk_ends_a_training_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left.*step_00000010.pt"):
        train(tmp_path, updates=40, save_every=10, pause=0.01)
    assert 10 <= len(losses(tmp_path)) < 20


@pytest.mark.parametrize(("then", "now"), [(0.5, 0.0), (0.0, 0.5)])
def test_other_running_means_are_told_by_their_key(tmp_path: Path, then: float, now: float) -> None:
    train(tmp_path, updates=2, ema=then)
    with pytest.raises(ValueError, match=f"'ema' was .*step_00000002.pt .*cannot become {now}"):
        train(tmp_path, updates=4, ema=now)
    train(tmp_path, updates=4, ema=then)


@pytest.mark.parametrize(("batch", "processes", "accumulation"), [(6, 4, 1), (8, 3, 2), (2, 2, 2)])
def test_a_batch_that_does_not_divide_is_told(batch: int, processes: int, accumulation: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size {batch} .*multiple of {processes * accumulation}"):
        check_batch_size(batch, processes, accumulation)


# --- killed and stopped ---------------------------------------------------------------------------


def start(
    target: Callable[..., None], folder: Path, **settings: object
) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_training"])
    process = context.Process(target=target, args=(folder,), kwargs=settings)
    process.start()
    return process


def test_kill_9_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    settings = dict(updates=40, save_every=1, pause=0.01)
    train(tmp_path / "whole", **settings)
    expected = read_weights(tmp_path / "whole")
    dice = random.Random(0)
    folder, kills = tmp_path / "killed", 0
    while kills < 20:
        process = start(train, folder, **settings)
        while process.is_alive() and not any(folder.glob("*")):
            time.sleep(0.005)
        time.sleep(dice.uniform(0.0, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    train(folder, **settings)
    assert all(torch.equal(expected[name], value) for name, value in read_weights(folder).items())
    assert not [path for path in folder.iterdir() if path.suffix not in (".pt", ".jsonl")]


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    process = start(train, tmp_path, updates=100_000, save_every=100_000, pause=0.01)
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(0.02)
    process.terminate()
    process.join(30)
    assert process.exitcode == 0
    done = len(losses(tmp_path))
    assert [int(p.stem[5:]) for p in tmp_path.glob("step_*.pt")] == [done]


# --- several processes ----------------------------------------------------------------------------


def test_a_process_that_dies_ends_all_with_its_error(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = torchrun(str(ROOT / "tests" / "toy_training.py"), str(tmp_path), "1000", "5")
    assert done.returncode != 0
    assert "RuntimeError: this process cannot go on" in done.stderr
    assert len(losses(tmp_path)) == 5 and time.monotonic() - begin < 120
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000005.pt"]


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    train(tmp_path / "one", updates=6)
    done = torchrun(str(ROOT / "tests" / "toy_training.py"), str(tmp_path / "two"), "6")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "one")), torch.tensor(losses(tmp_path / "two")))


@pytest.mark.parametrize("compiled", [True, False])
def test_samples_of_a_compiled_training_compile_nothing(tmp_path: Path, compiled: bool) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    block, sampled = torch.compile(lambda x: x + 1, backend=backend), []

    def sample(_: int) -> None:
        sampled.append(block(torch.ones(2)))

    train(tmp_path, updates=2, save_every=1, compile=compiled, sample=sample)
    assert len(sampled) == 2 and len(graphs) == (0 if compiled else 1)


def test_compiled_blocks_are_left_to_the_compiler() -> None:
    network = random_stage_c(64, 2, ((1, 1), (1, 1)))
    compile_blocks(nn.ModuleList([network]))
    assert network.plain
