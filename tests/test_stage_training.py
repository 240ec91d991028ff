"""Stage A, Stage B and the previewer, trained by their scripts for a few updates on drawn scenes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from training_lesson import start_torchrun

from core.training.stage_a import COMMITMENT, RECONSTRUCTION, StageATraining
from core.training.stage_b import draw_noise, encoder_picture
from core.weights.checkpoint import load_module, read_config, read_tensors
from modules.effnet import EfficientNetEncoder
from modules.previewer import Previewer
from modules.stage_a import StageA
from modules.stage_b import StageB

STAGE_A = {"c_hidden": 16, "bottleneck_blocks": 1, "codebook_size": 32}
STAGE_B = {
    "c_hidden": [32, 32], "nhead": [-1, 2], "blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [1, 1]],
    "c_cond": 32, "c_clip": 128, "level_config": ["CT", "CTA"], "dropout": [0.0, 0.0],
}  # fmt: skip
EFFNET = {"stem": 8, "stages": [["fused", 1, 2, 16, 1], ["mb", 2, 2, 16, 1]], "head": 32}
COMMON = {
    "model_version": "tiny", "scenes": {"count": 8, "scales": [1, 2]}, "image_size": 64, "num_workers": 0,
    "batch_size": 4, "grad_accum_steps": 2, "updates": 4, "save_every": 2, "warmup_updates": 1,
    "tracker": "none", "ema": 0.5,
}  # fmt: skip


def train(script: str, folder: Path, name: str, config: dict, *overrides: str) -> Path:
    """Run a training script; the folder of its run."""
    values = {**COMMON, **config, "experiment_id": name}
    values |= {"checkpoint_path": str(folder), "output_path": str(folder / "samples")}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, str(ROOT / "train" / script), str(path), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / name


def load(cls: type[nn.Module], path: Path) -> nn.Module:
    """The network of a file that holds its own sizes."""
    return load_module(lambda: cls(**read_config(path)), path, dtype=torch.float32, what=cls.__name__)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def stage_a(folder: Path) -> Path:
    config = {"stage_a": STAGE_A, "statistics_updates": 2, "adversarial_start": 3, "adversarial_weight": 0.1}
    return train("train_stage_a.py", folder, "a", config)


@pytest.fixture(scope="module")
def stage_b(folder: Path, stage_a: Path) -> dict:
    """The configuration of a training of Stage B and of an encoder, which was run as `b`."""
    config = {
        "dtype": "float32", "target": "v", "stage_a": STAGE_A, "stage_b": STAGE_B, "effnet": EFFNET,
        "stage_a_checkpoint_path": str(stage_a / "stage_a.safetensors"), "clip_text_path": "models/tiny",
        "geometry": {"compression": 10.67, "stride": 8}, "latent_noise": 0.1,
    }  # fmt: skip
    train("train_stage_b.py", folder, "b", config)
    return config


def test_stage_a_trains_and_decodes(stage_a: Path) -> None:
    assert len(losses(stage_a)) == 4
    network = load(StageA, stage_a / "stage_a.safetensors")
    assert network.decode(network.encode(torch.rand(1, 3, 32, 48))).shape == (1, 3, 32, 48)
    assert Image.open(stage_a.parent / "samples" / "a" / "step_00000004.jpg").size == (3 * 256, 2 * 256)


def test_stage_a_can_train_its_decoder_alone(folder: Path, stage_a: Path) -> None:
    before = stage_a / "stage_a.safetensors"
    config = {"stage_a": STAGE_A, "pretrained_path": str(before), "decoder_only": True, "updates": 2}
    config |= {"statistics_updates": 0, "adversarial_weight": 0.0, "export_dtype": "float16"}
    after = read_tensors(train("train_stage_a.py", folder, "a_decoder", config) / "stage_a.safetensors")
    for name, tensor in read_tensors(before).items():
        trained = name.startswith(("up_blocks", "out_block"))
        assert torch.equal(tensor.to(after[name].dtype), after[name]) != trained, name
        assert after[name].dtype == (torch.float16 if tensor.dim() > 1 else tensor.dtype)


def test_stage_b_trains_with_the_encoder_along(folder: Path, stage_b: dict) -> None:
    run = folder / "b"
    assert len(losses(run)) == 4
    encoder = load(EfficientNetEncoder, run / "effnet_encoder.safetensors")
    network = load(StageB, run / "stage_b.safetensors")
    latent = encoder(torch.rand(1, 3, 64, 64))
    assert latent.shape == (1, 16, 8, 8)
    x = torch.randn(1, 4, 16, 16)
    assert network(x, torch.rand(1), latent, torch.randn(1, 1, 128)).shape == x.shape
    assert Image.open(folder / "samples" / "b" / "step_00000004.jpg").size == (3 * 256, 2 * 256)


def test_stage_b_resumes_bit_for_bit(folder: Path, stage_b: dict) -> None:
    train("train_stage_b.py", folder, "b_parts", stage_b, "updates=3")
    run = train("train_stage_b.py", folder, "b_parts", stage_b)
    assert losses(run) == losses(folder / "b")
    for name in ("stage_b", "effnet_encoder"):
        whole, parts = (read_tensors(f / f"{name}.safetensors") for f in (folder / "b", run))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_finished_encoder_stays_as_it_is(folder: Path, stage_b: dict) -> None:
    path = folder / "b" / "effnet_encoder.safetensors"
    before = path.read_bytes()
    run = train(
        "train_stage_b.py", folder, "b_more", stage_b, "updates=1", f"effnet_checkpoint_path={path}",
        f"pretrained_path={folder / 'b' / 'stage_b.safetensors'}",
    )  # fmt: skip
    assert path.read_bytes() == before and not (run / "effnet_encoder.safetensors").exists()
    assert not any(name.startswith("effnet.") for name in _trained(run))


def test_with_a_finished_encoder_latents_can_be_cached(folder: Path, stage_b: dict) -> None:
    cache = folder / "cache"
    values = {**stage_b, "effnet_checkpoint_path": str(folder / "b" / "effnet_encoder.safetensors")}
    run = train("train_stage_b.py", folder, "b_cached", {**values, "cache_path": str(cache)}, "updates=3")
    files = list(cache.rglob("*.safetensors"))
    assert len(losses(run)) == 3 and len(files) == COMMON["scenes"]["count"]
    shapes = {name: tuple(value.shape) for name, value in read_tensors(files[0]).items()}
    assert shapes == {"z": (4, 16, 16), "seen": (16, 6, 6), "pooled": (1, 128)}
    written = [path.stat().st_mtime_ns for path in files]
    train("train_stage_b.py", folder, "b_cached", {**values, "cache_path": str(cache)})
    assert [path.stat().st_mtime_ns for path in files] == written


def _trained(run: Path) -> set[str]:
    (checkpoint,) = run.glob("step_*.pt")
    return set(torch.load(checkpoint, weights_only=True)["parameters"])


def test_the_previewer_trains_alone_or_with_the_encoder(folder: Path, stage_b: dict) -> None:
    config = {"previewer": {"c_hidden": 16}, "effnet": EFFNET, "latent_noise": 0.1, "updates": 2}
    both = train("train_previewer.py", folder, "autoencoder", config)
    encoder = load(EfficientNetEncoder, both / "effnet_encoder.safetensors")
    alone = train(
        "train_previewer.py", folder, "previewer", config,
        f"effnet_checkpoint_path={both / 'effnet_encoder.safetensors'}",
    )  # fmt: skip
    assert not (alone / "effnet_encoder.safetensors").exists()
    previewer = load(Previewer, alone / "previewer.safetensors")
    assert previewer(encoder(torch.rand(1, 3, 64, 64))).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_and_stops(folder: Path, number: signal.Signals) -> None:
    name = f"stopped_{number.name}"
    values = {**COMMON, "stage_a": STAGE_A, "updates": 100_000, "save_every": 100_000, "num_workers": 1}
    values |= {"experiment_id": name, "checkpoint_path": str(folder), "output_path": str(folder / "samples")}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, str(ROOT / "train" / "train_stage_a.py"), str(folder / f"{name}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    log = folder / name / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal's Ctrl-C does, workers included
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-2000:]
    told = [line for line in errors.splitlines() if line.startswith(("stopped", "the weights", "to "))]
    weights, done = folder / name / "stage_a.safetensors", len(losses(folder / name))
    assert told[0] == f"stopped after update {done} of 100000"
    assert told[1] == f"the weights lie in {weights}" and weights.exists()
    assert f"stage_a_checkpoint_path={weights}" in told[2]
    assert told[3] == "to go on: the same command again"
    assert [int(path.stem[5:]) for path in (folder / name).glob("step_*.pt")] == [len(losses(folder / name))]


def test_ctrl_c_stops_several_processes_which_tell_once_where_the_weights_lie(folder: Path) -> None:
    """Of a training whose discriminator waits, and has no gradients before its turn."""
    values = {**COMMON, "stage_a": STAGE_A, "adversarial_start": 3, "updates": 100_000, "save_every": 100_000}
    values |= {"experiment_id": "two", "checkpoint_path": str(folder)}
    (folder / "two.yaml").write_text(yaml.safe_dump(values))
    script, log = str(ROOT / "train" / "train_stage_a.py"), folder / "two" / "log.jsonl"
    with start_torchrun(script, str(folder / "two.yaml")) as process:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 4):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in errors, errors[-2000:]
    assert errors.count(f"stopped after update {len(losses(folder / 'two'))} of") == 1
    assert errors.count(f"the weights lie in {folder / 'two' / 'stage_a.safetensors'}\n") == 1
    load(StageA, folder / "two" / "stage_a.safetensors")


CRASH = """
import train_stage_a
from core.training import stage_a as stage_a_training
def make_loss(run):
    def loss(*_):
        raise RuntimeError("broken")
    return loss
stage_a_training.make_loss = make_loss
train_stage_a.main()
"""


def test_a_crash_ends_the_data_workers_too(folder: Path) -> None:
    values = {**COMMON, "stage_a": STAGE_A, "num_workers": 1, "experiment_id": "crash"}
    values |= {"checkpoint_path": str(folder), "output_path": str(folder / "samples")}
    (folder / "crash.yaml").write_text(yaml.safe_dump(values))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'train'}"}
    command = [sys.executable, "-c", CRASH, str(folder / "crash.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 1 and "RuntimeError: broken" in done.stderr


# --- losses ---------------------------------------------------------------------------------------


def test_stage_a_losses_are_those_of_a_vqgan() -> None:
    torch.manual_seed(0)
    network = StageA(**STAGE_A).eval()
    images, quantised = torch.rand(3, 3, 16, 16), torch.tensor([True, False, True])
    result = StageATraining(network, 0.0)(images, quantised, fit_statistics=False, adversarial=True)
    latent = network.encode_unscaled(images)
    distances = (latent[:, :, None] - network.vquantizer.codebook.weight.T[None, :, :, None, None]).square()
    nearest = distances.sum(1).argmin(1)  # (B, H, W)
    entries = network.vquantizer.codebook.weight[nearest].permute(0, 3, 1, 2)
    expected = (1 + COMMITMENT) * F.mse_loss(entries, latent) / RECONSTRUCTION
    torch.testing.assert_close(result.other, expected)
    decoded = [
        network.decode_unscaled((entries if q else latent)[i : i + 1]) for i, q in enumerate(quantised)
    ]
    errors = torch.stack([(d[0] - image).square().mean() for d, image in zip(decoded, images, strict=True)])
    torch.testing.assert_close(result.squared_error, errors)


def test_the_discriminator_and_stage_a_do_not_move_each_other() -> None:
    torch.manual_seed(0)
    module = StageATraining(StageA(**STAGE_A), 0.5)
    images, decoded = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16, requires_grad=True)
    module._adversarial(images, decoded).backward()
    found = {n: p.grad.clone() for n, p in module.discriminator.named_parameters()}
    pushed = decoded.grad.clone()
    module.zero_grad()

    def hinge(judge: Callable[[Tensor], Tensor]) -> Tensor:
        return (F.relu(1 - judge(images)).mean() + F.relu(1 + judge(decoded.detach())).mean()) / 2

    hinge(module.discriminator).backward()
    for name, parameter in module.discriminator.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    (slope,) = torch.autograd.grad(-0.5 * module.discriminator(decoded).mean(), decoded)
    torch.testing.assert_close(pushed, slope)


def test_a_samples_noise_does_not_depend_on_its_batch() -> None:
    keys = [(1, 5, i) for i in range(4)]
    whole, part = draw_noise(keys, (4, 8, 8), True), draw_noise(keys[2:], (4, 8, 8), True)
    assert torch.equal(whole.epsilon[2:], part.epsilon) and torch.equal(whole.t[2:], part.t)
    assert whole.seeds[2:] == part.seeds
    many = draw_noise([(0, 0, i) for i in range(400)], (4, 2, 2), False)
    assert 0.84 < many.keep_latent.float().mean() < 0.96 and many.drop_text.float().mean() < 0.1


def test_the_encoder_sees_multiples_of_its_stride() -> None:
    images = torch.rand(1, 3, 128, 192)
    sizes = {tuple(encoder_picture(images, (0, step), 8).shape[-2:]) for step in range(60)}
    assert all(height % 8 == width % 8 == 0 for height, width in sizes) and len(sizes) > 5
    assert all(64 <= height <= 128 and 96 <= width <= 192 for height, width in sizes)
