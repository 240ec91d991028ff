"""The training of the tiny family against the clock: drawing, the loop, its files, pictures in batches."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from core.config.settings import Job, Settings
from core.family import on_gpu as tiny_on_gpu
from core.family import pool as scene_pool
from core.family.batched import make_pictures
from core.family.pool import Drawers, Kind, kind_of
from core.family.timed import Budget, Part, Weights
from core.pipeline.pipeline import UltraPixelPipeline
from core.scenes.drawing import render
from core.scenes.scene import ATTRIBUTES, labels, sample_scene
from core.weights.checkpoint import load_module, read_config, read_tensors
from core.weights.clip import TextEncoder
from modules.recogniser import Recogniser

sys.path.insert(0, str(ROOT / "train"))
from train_tiny_on_gpu import main  # noqa: E402

TINY = ROOT / "models" / "tiny"
KINDS = [Kind(96, 0.5, 2), Kind(128, 0.5, 1)]


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "--output", str(folder), "--config_c", str(ROOT / "configs/tiny/stage_c.yaml"), "--device", "cpu",
        "--workers", "1", "--num_image", "2", "--num_large", "2", "--shown", "2", *more,
    ]  # fmt: skip


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small sizes of pictures, and few steps for the sheets."""
    monkeypatch.chdir(ROOT)
    often = {"stage_c": 0.5, "guidance": 0.5, "together": 0.5}
    made = {
        "ROWS": tuple(tiny_on_gpu.Row(kind, 8, 2, often) for kind in KINDS), "FIRST_SCENES": 4,
        "PRESET": replace(tiny_on_gpu.PRESET, height=128, width=128), "LARGE": 128, "LARGE_SHOWN": 1,
        "Settings": partial(Settings, steps=1, steps_b=1),
    }  # fmt: skip
    for name, value in made.items():
        monkeypatch.setattr(tiny_on_gpu, name, value)


# --- the script -------------------------------------------------------------------------------------


def test_all_parts_run_and_leave_a_family(tmp_path: Path) -> None:
    assert main(arguments(tmp_path, "--max_updates", "10")) == 0
    log = events(tmp_path)
    assert log[-1]["event"] == "finished"
    assert {line["part"]: line["step"] for line in log if "part" in line} == {
        "stage_c": 10,
        "guidance": 10,
        "together": 10,
    }
    assert {path.name for path in tmp_path.glob("sheet_*.jpg")} == {"sheet_128.jpg"}
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert [figure["count"] for figure in figures] == [2, 2, 2]
    for name in (tiny_on_gpu.STAGE_C, tiny_on_gpu.GUIDANCE):
        made, shipped = read_tensors(tmp_path / name), read_tensors(TINY / name)
        assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in shipped.items()}
        assert all(t.dtype == torch.float16 for t in made.values() if t.dim() > 1)


def test_no_more_scenes_are_taken_in_than_were_asked_for(tmp_path: Path) -> None:
    given = ("--max_updates", "6", "--parts", "guidance", "--scenes", "3")
    assert main(arguments(tmp_path, *given)) == 0
    counts = [sum(line["scenes"].values()) for line in events(tmp_path) if "scenes" in line]
    assert counts and set(counts) <= {3, 4}  # in whole chunks, of two at most


def test_small_batches_have_smaller_rates(tmp_path: Path) -> None:
    for batch, share in (("0.25", 0.5), ("1", 1.0), ("4", 1.0)):
        folder = tmp_path / batch
        given = ("--max_updates", "1", "--parts", "stage_c", "--batch", batch, "--minutes_c", "600")
        assert main(arguments(folder, *given)) == 0
        (line,) = (line for line in events(folder) if "part" in line)
        usual = tiny_on_gpu.Budget(600, tiny_on_gpu.LR["stage_c"] * share, max_updates=1)
        assert line["lr"] == pytest.approx(usual.rate(1.0))


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    result = tiny_on_gpu.StageCLoss.result

    def terminated(loss, *given):
        if loss.calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        loss.calls += 1
        return result(loss, *given)

    monkeypatch.setattr(tiny_on_gpu.StageCLoss, "calls", 1, raising=False)
    monkeypatch.setattr(tiny_on_gpu.StageCLoss, "result", terminated)
    given = arguments(tmp_path, "--max_updates", "5", "--parts", "stage_c", "guidance")
    assert main(given) == 0
    assert events(tmp_path)[-1]["event"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) == handler
    assert (tmp_path / tiny_on_gpu.STAGE_C).exists()
    assert not (tmp_path / tiny_on_gpu.GUIDANCE).exists()
    monkeypatch.setattr(tiny_on_gpu.StageCLoss, "result", result)
    assert main(given) == 0
    begun = [line for line in events(tmp_path) if line.get("event") == "stage_c begins"]
    assert [(line["step"], line["resumed"]) for line in begun] == [(0, False), (3, True)]
    assert [line["step"] for line in events(tmp_path) if line.get("part") == "stage_c"][-1] == 5
    assert (tmp_path / tiny_on_gpu.GUIDANCE).exists()


def test_files_of_a_part_that_is_over_are_written_again_or_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = arguments(tmp_path, "--max_updates", "2")
    assert main([*given, "--parts", "stage_c"]) == 0
    path = tmp_path / tiny_on_gpu.STAGE_C
    before = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match="stage_c.safetensors is missing, .*: with stage_c"):
        main([*given, "--parts", "guidance"])
    assert events(tmp_path)[-1]["event"] == "failed"
    assert main([*given, "--parts", "stage_c", "guidance"]) == 0 and path.read_bytes() == before


def test_nothing_goes_on_that_another_training_went_on_from(tmp_path: Path) -> None:
    parts = ("--parts", "stage_c", "guidance", "together")
    assert main([*arguments(tmp_path, "--max_updates", "1"), *parts]) == 0
    before = {name: (tmp_path / name).read_bytes() for name in tiny_on_gpu.PART_OF}
    assert main([*arguments(tmp_path, "--max_updates", "2"), *parts[:3]]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in tiny_on_gpu.PART_OF} == before
    told = [line["event"].split(":")[0] for line in events(tmp_path) if "stays" in line.get("event", "")]
    assert told == ["stage_c stays as it is", "guidance stays as it is"]
    (tmp_path / tiny_on_gpu.STAGE_C).unlink()
    with pytest.raises(ValueError, match="stage_c.safetensors is missing, .*: with together among"):
        main([*arguments(tmp_path, "--max_updates", "1"), "--parts", "figures"])
    assert main([*arguments(tmp_path, "--max_updates", "1"), "--parts", "together"]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in tiny_on_gpu.PART_OF} == before


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    given = [*arguments(tmp_path, "--max_updates", "1"), "--parts", "stage_c"]
    assert main(given) == 0
    path = tmp_path / "state" / "stage_c.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="stage_c.safetensors is damaged: delete it, and this"):
        main(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--minutes", "0"], "--minutes must be above 0, not 0.0"),
        (["--shown", "0"], "--shown must be at least 1, not 0"),
        (["--minutes", "nan"], "--minutes must be above 0, not nan"),
        (["--start_from", "nowhere"], "--start_from nowhere is no folder"),
        (["--start_from", "models"], "models/stage_c.safetensors does not exist"),
        (["--config_b", "nowhere.yaml"], "nowhere.yaml: this configuration file does not exist"),
        (["--scenes", "0"], "--scenes must be above 0, not 0"),
        (["--image_encoder", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ],
)
def test_a_wrong_command_line_is_told_before_anything_starts(
    tmp_path: Path, given: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path, *given))


# --- drawing ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return TextEncoder.load(str(TINY), torch.float32)


def test_scenes_are_drawn_at_both_sizes_by_processes(text: TextEncoder) -> None:
    drawers = Drawers(KINDS, 96, workers=2, first=100)
    try:
        drawers.start(text, pin=False)
        chunks = [chunk for chunk in (drawers.take(block=True) for _ in range(100)) if chunk][:4]
    finally:
        drawers.close()
    drawn = {scene.tobytes(): n for n in range(100, 130) for scene in [render(sample_scene(n), 96, 96)]}
    for chunk in chunks:
        numbers = [drawn[picture.numpy().tobytes()] for picture in chunk.small]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        for picture, number in zip(chunk.pictures, numbers, strict=True):
            assert np.array_equal(picture.numpy(), render(sample_scene(number), chunk.side, chunk.side))
    assert not any(process.is_alive() for process in drawers._processes.values())


def test_the_loss_of_all_drawing_processes_is_told(
    text: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(scene_pool, "render", fail)
    drawers = Drawers(KINDS, 96, workers=2, first=0)
    try:
        drawers.start(text, pin=False)
        with pytest.raises(ValueError, match=r"no process draws scenes any more: (?s:.*)no ink"):
            while True:
                drawers.take(block=True)
    finally:
        drawers.close()


def test_kinds_come_by_their_share_of_the_scenes() -> None:
    kinds = [Kind(96, 0.25, 30), Kind(192, 0.75, 10)]
    turns = [kind_of(turn, kinds) for turn in range(2000)]
    scenes = [turns.count(i) * kind.chunk for i, kind in enumerate(kinds)]
    assert scenes[0] / sum(scenes) == pytest.approx(0.25, abs=0.03)


# --- the loop ---------------------------------------------------------------------------------------


def part_of(folder: Path, updates: int) -> tuple[Part, nn.Linear]:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    weights = Weights(module, torch.float32, ema=0.5)
    return Part("line", weights, Budget(1.0, 1e-2, max_updates=updates), folder / "line.safetensors"), module


def run_part(part: Part, module: nn.Module, losses: list[float] | None = None) -> None:
    x = torch.arange(12.0).view(4, 3)
    factors = iter(losses or [])

    def loss() -> tuple[str, torch.Tensor]:
        return "line", module(x).square().mean() * next(factors, 1.0)

    part.run(loss, lambda _: None, lambda: None, lambda: False, lambda: None)


def test_a_resumed_part_equals_one_that_ran_through(tmp_path: Path) -> None:
    whole, module = part_of(tmp_path / "a", 6)
    whole.budget = replace(whole.budget, lr_end=1e-2, warmup=0.0)
    run_part(whole, module)
    for updates in (3, 6):
        part, module = part_of(tmp_path / "b", updates)
        part.budget = replace(part.budget, lr_end=1e-2, warmup=0.0)
        assert part.resume() == (updates == 6)
        run_part(part, module)
    assert all(a.equal(b) for a, b in zip(part.weights.mean, whole.weights.mean, strict=True))
    assert all(a.equal(b) for a, b in zip(part.weights.master, whole.weights.master, strict=True))


def test_an_update_that_is_not_finite_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    part, module = part_of(tmp_path, 4)
    run_part(part, module, [1.0, float("nan"), 1.0, float("inf")])
    assert part.weights.bad == 2
    assert all(p.isfinite().all() for p in (*part.weights.master, *part.weights.mean, *module.parameters()))


def test_a_full_memory_is_answered_with_smaller_batches(tmp_path: Path) -> None:
    part, module = part_of(tmp_path, 2)
    sizes, x = [4], torch.ones(4, 3)

    def loss() -> tuple[str, torch.Tensor]:
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("full")
        return "line", module(x[: sizes[-1]]).mean()

    part.run(loss, lambda _: None, lambda: None, lambda: False, lambda: sizes.append(sizes[-1] // 2))
    assert sizes == [4, 2, 1]
    assert part.weights.step == 2


def test_the_rate_rises_and_falls_with_the_time() -> None:
    budget = Budget(5.0, 1e-3, lr_end=1e-5, warmup=0.02)
    rates = [budget.rate(share) for share in (0.0, 0.01, 0.02, 0.51, 1.0)]
    assert rates[0] < rates[1] < rates[2] == pytest.approx(1e-3, rel=1e-2)
    assert rates[3] == pytest.approx(5e-4, rel=0.02)
    assert rates[4] == pytest.approx(1e-5)


# --- pictures, and the image encoder ----------------------------------------------------------------


@pytest.mark.parametrize("settings", [Settings(steps=2, cfg=2.0, steps_b=1), Settings(steps=20, cfg=1.0)])
def test_pictures_in_a_batch_are_those_made_one_by_one(settings: Settings) -> None:
    settings = replace(settings, steps=min(settings.steps, 3))
    pipeline = UltraPixelPipeline.from_config(
        "configs/tiny/stage_c.yaml", "configs/tiny/stage_b.yaml", TINY / "ultrapixel_t2i.safetensors"
    )
    jobs = [Job(f"a {colour} house in a field", 64, 96, seed) for seed, colour in enumerate(("red", "blue"))]
    together = make_pictures(pipeline, jobs, settings)
    for picture, alone in zip(together, pipeline.run(jobs, settings), strict=True):
        assert torch.allclose(picture, alone.pixels, atol=1e-4)
    with pytest.raises(ValueError, match="different sizes"):
        make_pictures(pipeline, [jobs[0], replace(jobs[1], width=64)], settings)


def test_pictures_near_each_other_share_attributes() -> None:
    path = TINY / "image_encoder.safetensors"
    encoder = load_module(partial(Recogniser, **read_config(path)), path, dtype=torch.float32, what="encoder")
    scenes = [sample_scene(number, "held_out") for number in range(200)]
    truth = torch.tensor([labels(scene) for scene in scenes])
    with torch.no_grad():
        embedded = torch.cat([
            encoder.embed(torch.from_numpy(render(scene, side, side)).permute(2, 0, 1)[None].float() / 255)
            for scene, side in zip(scenes, (96, 128, 160, 256) * 50, strict=True)
        ])  # fmt: skip
    assert embedded.shape == (200, 16)
    assert torch.allclose(embedded.square().mean(dim=1), torch.ones(200), atol=1e-4)
    similar = embedded @ embedded.T
    similar.fill_diagonal_(-torch.inf)
    shared = (truth == truth[similar.argmax(dim=1)]).float().mean(dim=0)
    chance = torch.stack([(truth[:, i, None] == truth[:, i]).float().mean() for i in range(len(ATTRIBUTES))])
    assert ((shared - chance) / (1 - chance) > 0.4).all(), dict(zip(ATTRIBUTES, shared.tolist(), strict=True))
