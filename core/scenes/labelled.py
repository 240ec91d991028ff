"""Scenes with their attributes as labels: captions for the text encoder, pictures for the recogniser."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config.schema import SceneData
from core.config.sizes import Size
from core.data.loader import LoaderSettings, Picture
from core.scenes.captions import caption
from core.scenes.drawing import render
from core.scenes.drawn import DrawnScenes
from core.scenes.scene import ATTRIBUTES, EXTRA_SUBJECTS, Scene, labels, sample_scene
from modules.recogniser import UNLABELLED, resize

# Words that can be left out, since captions with and without them mean the same.
FILLERS = frozenset(
    "a an the of with is there in on at to by under side very out picture landscape".split() + list(",:")
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
EXTRA_EVERY = 12  # one scene in so many shows an extra subject
CLASSES = tuple(  # that a picture's attributes have
    len(values) + (len(EXTRA_SUBJECTS) if name == "subject" else 0) for name, values in ATTRIBUTES.items()
)
COLOUR = tuple(ATTRIBUTES).index("colour")


# --- captions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captions:
    """Captions with the labels (B, attributes) of their scenes."""

    texts: list[str]
    labels: Tensor


def caption_batches(
    scenes: SceneData, settings: LoaderSettings, position: Mapping[str, int] | None, loosened: float = 0.0
) -> Iterator[tuple[Captions, dict[str, int]]]:
    """Endless batches from a position on, each with the position after it; a share of them `loosened`."""
    batch = 0 if position is None else position["batch"]
    while True:
        first = (batch * settings.world_size + settings.rank) * settings.batch_size
        batch += 1
        numbers = range(first, first + settings.batch_size)
        yield read_captions(scenes, numbers, settings.seed, loosened), {"batch": batch}


def read_captions(scenes: SceneData, numbers: range, seed: int, loosened: float = 0.0) -> Captions:
    """One caption each of these scenes; the numbers go on after the last scene with other captions."""
    texts, rows = [], []
    for number in numbers:
        draw = random.Random(f"{seed}/{number}")
        scene = sample_scene(number % scenes.count, scenes.split)
        text = caption(scene, draw.getrandbits(31))
        texts.append(loosen(text, draw) if draw.random() < loosened else text)
        rows.append(labels(scene))
    return Captions(texts, torch.tensor(rows))


def loosen(text: str, draw: random.Random) -> str:
    """A caption nearer to what a user may type: parts in another order, fillers left out, words unknown."""
    parts = re.split("[,:] ", text)
    if draw.random() < 0.5:
        draw.shuffle(parts)
    kept = draw.choice((0.0, 0.5, 1.0))
    words = re.findall(r"\w+|,", ", ".join(parts))
    words = [word for word in words if word not in FILLERS or draw.random() < kept]
    for _ in range(draw.choice((0, 0, 1, 2))):
        unknown = "".join(draw.choices(LETTERS, k=draw.randint(2, 6)))
        words.insert(draw.randint(0, len(words)), unknown)
    return " ".join(words)


# --- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledScenes(DrawnScenes):
    """Whole scenes, some of them drawn larger and reduced, some degraded; their names give their labels."""

    degraded: float = 0.0  # share of the pictures

    def read(self, number: int, bucket: Size, key: Sequence[int]) -> Picture:
        """A scene without a caption, named by its number."""
        rng = np.random.default_rng(key)
        scale = int(rng.choice(self.settings.scales))
        drawn = render(self.scene(number), scale * bucket[0], scale * bucket[1])
        x = torch.from_numpy(drawn).permute(2, 0, 1)[None].float() / 255
        x = resize(x, bucket[0])
        if rng.random() < self.degraded:
            x = degrade(x, rng)
        return Picture((x[0] * 255).round().to(torch.uint8), "", str(number))

    def scene(self, number: int) -> Scene:
        """The scene of a number; one in twelve shows an extra subject."""
        scene = sample_scene(number, self.settings.split)
        return scene if number % EXTRA_EVERY else replace(scene, subject=EXTRA_SUBJECTS[0])

    def labels(self, names: Sequence[str]) -> Tensor:
        """Labels (B, attributes) of the pictures with these names."""
        return torch.tensor([visible_labels(self.scene(int(name))) for name in names])


def visible_labels(scene: Scene) -> tuple[int, ...]:
    """The labels that a picture shows: an extra subject has colours of its own."""
    row = list(labels(scene))
    if scene.subject in EXTRA_SUBJECTS:
        row[COLOUR] = UNLABELLED
    return tuple(row)


def degrade(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures (B, 3, H, W) as a generator may make them: blurred, coarse, pale, dark, noisy."""
    if rng.random() < 0.5:
        x = blur(x, rng.uniform(0.3, 2.2))
    if rng.random() < 0.3:
        coarse = resize(x, int(x.shape[-1] * rng.uniform(0.3, 0.8)))
        x = F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
    if rng.random() < 0.5:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = mean + rng.uniform(0.6, 1.2) * (x - mean) + rng.uniform(-0.1, 0.1)
    if rng.random() < 0.5:
        noise = rng.standard_normal(x.shape, np.float32)
        x = x + rng.uniform(0, 0.08) * torch.from_numpy(noise)
    return x.clamp(0, 1)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Pictures (B, 3, H, W) under a Gaussian of so many pixels."""
    radius = max(1, round(3 * sigma))
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).to(x.device)
    rows = F.pad(x.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")  # (3 B, 1, H, W)
    rows = F.conv2d(F.conv2d(rows, weights[None, None, None]), weights[None, None, :, None])
    return rows.reshape(x.shape)
