"""train/train_t2i.py as its users run it, on a folder of small pictures and random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from training_lesson import arguments, torchrun

from core.weights.checkpoint import read_config, read_tensors, save_tensors
from modules.effnet import EfficientNetEncoder

SCRIPT = str(ROOT / "train" / "train_t2i.py")


@pytest.fixture(scope="module")
def config_file(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of four updates on six pictures of 64 pixels and more."""
    folder = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    save_tensors(folder / "effnet.safetensors", EfficientNetEncoder().state_dict(), {})
    pictures, rng = folder / "pictures" / "a", np.random.default_rng(0)
    pictures.mkdir(parents=True)
    for i in range(6):
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize((100, 90 + i)).save(pictures / f"{i}.jpg")
        (pictures / f"{i}.json").write_text(json.dumps({"caption": f"picture number {i}"}))
    config = yaml.safe_load((family_folder / "stage_c.yaml").read_text())
    config |= {
        "effnet_checkpoint_path": str(folder / "effnet.safetensors"),
        "webdataset_path": str(folder / "pictures"),
        "experiment_id": "t2i", "checkpoint_path": "checkpoints", "output_path": "samples", "image_size": 64,
        "multi_aspect_ratio": ["1/1"], "batch_size": 4, "grad_accum_steps": 2, "updates": 4, "save_every": 2,
        "warmup_updates": 2, "num_workers": 0,
        "geometry": {"compression": 42.67, "stride": 32, "lr_cells": 2, "lr_train_cells": 1},
    }  # fmt: skip
    path = folder / "t2i.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(config: Path, folder: Path, *overrides: str) -> str:
    done = run(config, folder, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(config: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments(config, folder, overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)


def figures(folder: Path, name: str) -> list[float]:
    lines = (folder / "checkpoints" / "t2i" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


def losses(folder: Path) -> list[float]:
    return figures(folder, "loss")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "checkpoints" / "t2i" / "ultrapixel_t2i.safetensors")


@pytest.fixture(scope="module")
def whole(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train(config_file, folder)
    return folder


def test_a_run_leaves_log_checkpoints_weights_and_sheets(whole: Path) -> None:
    assert len(losses(whole)) == 4
    names = {path.name for path in (whole / "checkpoints" / "t2i").iterdir() if path.is_file()}
    expected = {"config.yaml", "log.jsonl", "loss_by_logsnr.png", "ultrapixel_t2i.safetensors", ".lock"}
    assert expected | {"step_00000002.pt", "step_00000004.pt"} == names
    for step in (2, 4):
        sheet = Image.open(whole / "samples" / "t2i" / f"step_{step:08d}.jpg")
        assert sheet.size == (4 * 256, 2 * 256)


def test_run_again_it_continues_as_the_same_training(config_file: Path, whole: Path, tmp_path: Path) -> None:
    train(config_file, tmp_path, "updates=3")
    train(config_file, tmp_path)
    assert losses(tmp_path) == losses(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(tmp_path).items())


def test_two_processes_train_like_one(config_file: Path, whole: Path, tmp_path: Path) -> None:
    done = torchrun(
        SCRIPT, *arguments(config_file, tmp_path, ())
    )  # in micro-batches of 1 instead of 2 pictures
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("update 4 of 4 is done") == 1
    for name in ("loss", "grad_norm"):
        assert figures(tmp_path, name) == pytest.approx(figures(whole, name), rel=1e-3)
    two, one = (
        torch.cat([value.flatten() for value in weights(folder).values()]) for folder in (tmp_path, whole)
    )
    assert (two - one).norm() < 1e-4 * one.norm()


def test_shards_train_too(config_file: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard-0.tar", "w") as shard:
        for path in sorted((config_file.parent / "pictures" / "a").iterdir()):
            shard.add(path, path.name)
    train(config_file, tmp_path, f"webdataset_path={tmp_path / 'shard-0.tar'}", "updates=2")
    assert len(losses(tmp_path)) == 2


def test_bfloat16_trains_and_samples(config_file: Path, tmp_path: Path) -> None:
    train(config_file, tmp_path, "dtype=bfloat16", "updates=1", "ema=0.9")
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())


def test_its_weights_make_a_picture(whole: Path, family_folder: Path, tmp_path: Path) -> None:
    path = whole / "checkpoints" / "t2i" / "ultrapixel_t2i.safetensors"
    config_c, config_b = path.with_name("config.yaml"), family_folder / "stage_b.yaml"
    flags = {"pretrained_path": path, "config_c": config_c, "config_b": config_b, "height": 64, "width": 64,
             "steps": 1, "steps_b": 1, "prompt": "x", "output_dir": tmp_path}  # fmt: skip
    command = [sys.executable, str(ROOT / "inference" / "test_t2i.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("batch_size=0", "'batch_size'"),
        ("webdataset_path=nowhere", "nowhere"),
        ("generator_checkpoint_path=nowhere.safetensors", "nowhere.safetensors"),
        ("effnet_checkpoint_path=", "effnet_checkpoint_path"),
        ("lr=fast", "lr"),
        ("learning_rate=1", "learning_rate"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    config_file: Path, tmp_path: Path, override: str, part: str
) -> None:
    done = run(config_file, tmp_path, override)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert part in done.stderr.strip().splitlines()[-1]


def test_a_dry_run_prints_the_configuration(config_file: Path, tmp_path: Path) -> None:
    printed = train(config_file, tmp_path, "lr=5e-5", "--dry_run")
    assert yaml.safe_load(printed)["lr"] == 5e-5
    assert "pictures per update: 4, per process: 4, at once: 2" in printed
    assert not (tmp_path / "checkpoints").exists()


def test_bilinear_guidance_is_trained_and_its_file_says_so(config_file: Path, tmp_path: Path) -> None:
    changes = ("guidance.upsampling=bilinear", "guidance.scale_sides=[2,4]")
    train(config_file, tmp_path, *changes, "updates=1", "save_every=1")
    exported = tmp_path / "checkpoints" / "t2i" / "ultrapixel_t2i.safetensors"
    told = read_config(exported)
    assert told["upsampling"] == "bilinear" and told["scale_sides"] == [2, 4]
    assert "up.1.convolution.weight" in read_tensors(exported)
