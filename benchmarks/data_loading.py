"""Images a second that two workers load over those that a step takes: python benchmarks/data_loading.py

The step is that of the tiny family's guidance at 384 pixels, on this machine. Pictures are JPEGs of 1024 to
2048 pixels in a temporary folder, and scenes that are drawn as they are needed. The least ratio to aim at,
on two cores, is 4: then loading beside the training takes at most a fifth of the cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from timing import seconds
from tiny_guidance import BATCH, SIDE, guidance_recipe

from core.config.schema import SceneData
from core.data.buckets import make_buckets
from core.data.folder import index_folder
from core.data.loader import IndexedData, LoaderSettings, batches, into_buckets
from core.scenes.captions import caption
from core.scenes.drawing import render
from core.scenes.drawn import DrawnScenes
from core.scenes.scene import sample_scene
from core.training.trainer import Trainer, TrainSettings

PICTURES = 48
SIDES = (1024, 1536, 2048)
GRAIN = 6  # deviation of the noise that gives the drawn pictures the file size of photographs
ROUNDS = 3  # of each measurement, in turn; the best counts
LOADED = 12  # batches in a round
STEPS = 4


def write_pictures(folder: Path) -> None:
    """Grainy scenes as JPEGs of several sizes and aspects, with captions."""
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        height, width = rng.choice(SIDES, 2)
        scene = sample_scene(number)
        pixels = render(scene, int(height), int(width)) + rng.normal(0, GRAIN, (height, width, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=92)
        (folder / f"{number}.txt").write_text(caption(scene, 0))


def loading(data: IndexedData) -> Iterator[float]:
    """Images a second, once a round, of workers that are at work already."""
    stream = batches(data, LoaderSettings(BATCH, num_workers=2))
    while True:
        for _ in range(5):  # those that the workers finished meanwhile
            next(stream)
        yield LOADED * BATCH / seconds(lambda: list(islice(stream, LOADED)))


def training(folder: Path) -> Iterator[float]:
    """Images a second of a training, once a round."""
    accelerator = Accelerator(cpu=True)
    step = 0
    while True:
        settings = TrainSettings(lr=1e-4, updates=step + STEPS, batch_size=BATCH, save_every=10**9)
        rates: list[float] = []
        trainer = Trainer(guidance_recipe(), settings, folder, accelerator)
        trainer.run(lambda figures, rates=rates: rates.append(figures["images_per_second"]))
        yield max(rates)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.jpg")) / PICTURES
        print(f"{PICTURES} JPEGs of {size / 2**20:.2f} MiB, pictures of {SIDE} x {SIDE}, batches of {BATCH}")
        index = index_folder(str(folder), 0.0)
        sources = {
            "JPEG folder": loading(into_buckets(index, make_buckets(SIDE, ("1/1", "2/3")))),
            "drawn scenes": loading(DrawnScenes(SceneData(), ((SIDE, SIDE),))),
        }
        trained = training(folder)
        taken, given = 0.0, dict.fromkeys(sources, 0.0)
        for _ in range(ROUNDS):
            taken = max(taken, next(trained))
            given = {name: max(given[name], next(source)) for name, source in sources.items()}
    print(f"{'training takes':<16}{taken:>8.1f} images/s")
    for name, rate in given.items():
        print(f"{name:<16}{rate:>8.1f} images/s  ratio {rate / taken:.1f}")


if __name__ == "__main__":
    main()
