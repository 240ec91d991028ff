"""Four small pictures, small networks for them, and the training scripts run in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT
from PIL import Image
from random_family import Family, write_family
from torch import Tensor, nn
from torch.nn import functional as F

from core.commands.flags import run
from core.config.sizes import EffnetSizes, StageCSizes
from core.scenes.drawing import render
from core.scenes.scene import sample_scene
from core.weights.checkpoint import config_metadata, read_tensors, save_tensors
from modules.effnet import EfficientNetEncoder, imagenet_normalise
from modules.previewer import Previewer

SIDE = 64  # pixels of a picture; its latent has 4 x 4
SEEDS = (0, 2, 3, 5)  # of the scenes
CAPTIONS = ("one", "the second", "number three", "a fourth picture")
STAGE_C = StageCSizes(
    c_cond=64, c_hidden=(64, 64), nhead=(2, 2), blocks=((1, 1), (1, 1)), c_clip_text=64,
    c_clip_text_pooled=64, c_clip_img=16, dropout=(0.0, 0.0),
)  # fmt: skip
EFFNET = EffnetSizes(
    stem=16, stages=(("fused", 1, 2, 24, 1), ("fused", 2, 2, 32, 1), ("mb", 2, 2, 48, 1)), head=64
)  # of stride 16
PREVIEWER_STEPS = 120
PROCESSES = 2


def draw(folder: Path) -> Tensor:
    """Four scenes in `folder`, captioned: (4, 3, SIDE, SIDE) in [0, 1]."""
    folder.mkdir(parents=True)
    pictures = []
    for number, (seed, words) in enumerate(zip(SEEDS, CAPTIONS, strict=True)):
        pixels = render(sample_scene(seed), SIDE, SIDE)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(words)
        pictures.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)
    return torch.stack(pictures)


@torch.no_grad()
def calibrated_encoder(pictures: Tensor, seed: int = 0) -> EfficientNetEncoder:
    """Random weights with the pictures' own statistics in the norms, without which all latents are alike."""
    torch.manual_seed(seed)
    encoder = EfficientNetEncoder(**asdict(EFFNET)).train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    encoder(imagenet_normalise(pictures))
    return encoder.eval()


def save_encoder(path: Path, encoder: EfficientNetEncoder) -> None:
    """An encoder's file."""
    save_tensors(path, encoder.state_dict(), config_metadata(asdict(EFFNET)))


def load_encoder(path: Path) -> EfficientNetEncoder:
    """The encoder of such a file."""
    encoder = EfficientNetEncoder(**asdict(EFFNET))
    encoder.load_state_dict(read_tensors(path))
    return encoder


def pictures_of(folder: Path) -> Tensor:
    """The pictures of `draw`."""
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def save_previewer(path: Path, encoder: EfficientNetEncoder, pictures: Tensor) -> Path:
    """A previewer that knows these pictures, for sheets that can be looked at."""
    torch.manual_seed(0)
    previewer = Previewer(**asdict(Family().previewer)).train()
    optimizer = torch.optim.Adam(previewer.parameters(), lr=1e-2)
    with torch.no_grad():
        latents = encoder(imagenet_normalise(pictures)).repeat(4, 1, 1, 1)
    for _ in range(PREVIEWER_STEPS):
        small = previewer(latents + 0.3 * torch.randn_like(latents))
        wanted = F.interpolate(pictures, size=small.shape[-2:], mode="area").repeat(4, 1, 1, 1)
        optimizer.zero_grad()
        (small - wanted).square().mean().backward()
        optimizer.step()
    save_tensors(path, previewer.state_dict(), config_metadata(asdict(Family().previewer)))
    return path


def write_lesson(folder: Path) -> None:
    """All files of two trainings: c.yaml for Stage C from nothing, t2i.yaml for the guidance."""
    write_family(folder, Family(stage_c=STAGE_C))
    save_encoder(folder / "effnet.safetensors", calibrated_encoder(draw(folder / "pictures")))
    config = yaml.safe_load((folder / "stage_c.yaml").read_text())
    config |= {
        "effnet_checkpoint_path": str(folder / "effnet.safetensors"),
        "effnet": json.loads(json.dumps(asdict(EFFNET))), "webdataset_path": str(folder / "pictures"),
        "experiment_id": "run", "checkpoint_path": "checkpoints", "output_path": "samples",
        "image_size": SIDE, "multi_aspect_ratio": ["1/1"], "batch_size": 4, "grad_accum_steps": 2,
        "updates": 4, "save_every": 2, "warmup_updates": 2, "num_workers": 0, "tracker": "none",
        "geometry": {"compression": 21.33, "stride": 16, "lr_cells": 4, "lr_train_cells": 2},
    }  # fmt: skip
    (folder / "t2i.yaml").write_text(yaml.safe_dump(config))
    del config["guidance"], config["generator_checkpoint_path"]
    (folder / "c.yaml").write_text(yaml.safe_dump(config | {"target": "v"}))


# --- running --------------------------------------------------------------------------------------


def arguments(config: Path, folder: Path, overrides: tuple[str, ...]) -> list[str]:
    paths = (f"checkpoint_path={folder / 'checkpoints'}", f"output_path={folder / 'samples'}")
    return [str(config), *paths, *overrides]


def exit_code(main: Callable[[], int], config: Path, folder: Path, *overrides: str) -> int:
    """A script's exit code, run in this process on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["script", *arguments(config, folder, overrides)]
    no_gpu = mock.patch.object(torch.accelerator, "device_count", return_value=0)
    with mock.patch.object(sys, "argv", words), no_gpu:
        try:
            run(main)
        except SystemExit as end:
            return int(end.code)
    raise AssertionError("a script ends with an exit code")


def train(main: Callable[[], int], config: Path, folder: Path, *overrides: str) -> Path:
    """Run a script to its end; the folder of the run."""
    assert exit_code(main, config, folder, *overrides) == 0
    return folder / "checkpoints" / "run"


def start_torchrun(*words: str) -> subprocess.Popen[str]:
    """A script in several processes, as a user starts it: nothing is set in the environment.

    Where there are GPUs, they are hidden, as these processes are more than them.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.is_available() else {}
    return subprocess.Popen(
        [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **hidden},
    )  # fmt: skip


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """What such a script printed, and its exit code."""
    with start_torchrun(*words) as process:
        output, errors = process.communicate(timeout=400)
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


# --- what a run leaves ----------------------------------------------------------------------------


def figures(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The losses of a run's updates."""
    return [line["loss"] for line in figures(folder)]


def state(folder: Path, step: int) -> dict[str, Tensor]:
    """Weights and running means of a checkpoint."""
    held = torch.load(folder / f"step_{step:08d}.pt", weights_only=True)
    return {**held["parameters"], **{f"ema.{name}": value for name, value in held["ema"].items()}}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The relative distance of two sets of weights, all together.

    Alone, the bias of an attention's keys would say nothing: its gradient is rounding, which Adam scales up.
    """
    assert a.keys() == b.keys()
    x, y = (torch.cat([tensors[name].flatten() for name in sorted(b)]) for tensors in (a, b))
    return float((x - y).norm() / y.norm())


@contextmanager
def recorded(module: object, name: str, into: list) -> None:
    """Within it, what a module's function is called with and returns is kept."""
    function = getattr(module, name)

    def wrapped(*inputs, **named):
        result = function(*inputs, **named)
        into.append((inputs, result))
        return result

    with mock.patch.object(module, name, wrapped):
        yield
