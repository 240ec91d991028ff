"""Training of the recogniser of scenes: their attributes from pictures, also blurred and noisy ones."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from core.config.schema import RecogniserTrainConfig
from core.data.loader import Batch
from core.scenes.labelled import CLASSES, LabelledScenes, blur
from core.scenes.scene import ATTRIBUTES
from core.training.run import Run, train
from core.training.trainer import Recipe, StepLoss
from core.weights.checkpoint import config_metadata, save_tensors
from modules.recogniser import Recogniser, accuracies, attribute_losses

log = logging.getLogger(__name__)

EXPORT = "recogniser.safetensors"
CHECKED = 256  # held-out pictures
BLUR = 1.5  # pixels, of the second check
NO_LOGSNR = 0.0  # a picture has no noise level


def make_loss(run: Run) -> Callable[..., StepLoss]:
    """Cross entropy of all attributes."""

    def loss(module: nn.Module, batch: Batch, _keys: list[tuple[int, ...]]) -> StepLoss:
        labels = run.data.labels(batch.names).to(run.device)
        each = attribute_losses(module(batch.images.to(run.device)), labels)
        return StepLoss(each, torch.full_like(each, NO_LOGSNR))

    return loss


def make_check(run: Run, recogniser: Recogniser) -> Callable[[int], None]:
    """Tells the accuracy on held-out pictures, plain and blurred."""
    data = LabelledScenes(replace(run.config.scenes, split="held_out", scales=(1,)), run.data.sizes)
    pixels = [data.read(number, data.sizes[0], (0,)).pixels for number in range(CHECKED)]
    images = (torch.stack(pixels).float() / 255).to(run.device)
    labels = data.labels([str(number) for number in range(CHECKED)]).to(run.device)

    def check(step: int) -> None:
        recogniser.eval()
        for name, shown in (("plain", images), (f"blurred by {BLUR} pixels", blur(images, BLUR))):
            shares = accuracies(recogniser(shown), labels)
            listed = ", ".join(f"{a} {s:.3f}" for a, s in zip(ATTRIBUTES, shares, strict=True))
            mean = sum(shares) / len(shares)
            log.info("update %d, held-out pictures, %s: mean %.4f; %s", step, name, mean, listed)
        recogniser.train()

    return check


def build(run: Run) -> Recipe:
    """The recogniser's recipe."""
    config, path = run.config, run.export_path(EXPORT)
    if config.scenes is None:
        raise ValueError("the recogniser learns from 'scenes', not from webdataset_path")
    run = replace(run, data=LabelledScenes(config.scenes, run.data.sizes, degraded=config.degraded_share))
    sizes = {"classes": CLASSES, **asdict(config.recogniser)}
    torch.manual_seed(config.seed)
    recogniser = Recogniser(**sizes).to(run.device, memory_format=torch.channels_last)

    def export(tensors: Mapping[str, Tensor], _step: int) -> None:
        save_tensors(path, tensors, config_metadata(sizes))

    command = "inference/evaluate.py --preset tiny --recogniser"
    if config.recogniser.c_embedding:
        command = "train/train_tiny_on_gpu.py --image_encoder"
    use = f"python {command} {shlex.quote(str(path))}"
    return Recipe(recogniser, run.batches, make_loss(run), make_check(run, recogniser), export, use)


def train_recogniser(config: RecogniserTrainConfig) -> int:
    """Run this training, or go on with it; return the exit code."""
    return train(config, [], build)
