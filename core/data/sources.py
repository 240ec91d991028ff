"""Where a training's pictures come from: a folder, shards, or scenes drawn as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from core.config import RunConfig, SceneData
from core.data.buckets import make_buckets
from core.data.files import Broken
from core.data.folder import index_folder
from core.data.loader import Batch, IndexedData, LoaderSettings, Picture, Position, batches, into_buckets
from core.data.scenes import caption, render, sample_scene
from core.data.shards import ShardData, is_shards, open_shards, shard_batches
from core.resolution import Size

Data = IndexedData | ShardData


@dataclass(frozen=True)
class DrawnScenes:
    """Scenes of the procedural world as pictures of these sizes (height, width), numbered by their seeds."""

    settings: SceneData
    sizes: tuple[Size, ...]
    broken: int = 0

    @property
    def source(self) -> str:
        """What it is, for messages."""
        return f"{self.settings.count} drawn scenes"

    @cached_property
    def members(self) -> dict[Size, np.ndarray]:
        """All seeds, in turn in the sizes' buckets."""
        count, step = self.settings.count, len(self.sizes)
        seeds = (np.arange(first, count, step) for first in range(step))
        return {size: mine for size, mine in zip(self.sizes, seeds, strict=True) if len(mine)}

    def read(self, number: int, bucket: Size, key: Sequence[int]) -> Picture | Broken:
        """A scene, drawn at one of the scales and cut out, with one of its captions."""
        rng = np.random.default_rng(key)
        scene = sample_scene(number, self.settings.split, self.settings.subjects)
        scale = int(rng.choice(self.settings.scales))
        height, width = bucket
        top, left = (int(rng.integers((scale - 1) * side + 1)) for side in bucket)
        drawn = render(scene, scale * height, scale * width, (top, left, height, width))
        pixels = np.ascontiguousarray(drawn.transpose(2, 0, 1))
        words = caption(scene, int(rng.integers(2**31)), rng.random() >= self.settings.without_colour)
        return Picture(torch.from_numpy(pixels), words, f"{self.settings.split} scene {number}")

    def identity(self, number: int) -> str:
        """The scene, how it is cut out, and its captions."""
        settings = self.settings
        return f"{settings.split} {number} {settings.subjects} {settings.scales} {settings.without_colour}"


def names_shards(config: RunConfig) -> bool:
    """Whether a configuration's data are tar shards."""
    captions = config.tmp_prompt is None and not config.empty_captions
    return config.webdataset_path is not None and is_shards(config.webdataset_path, captions)


def open_data(config: RunConfig) -> Data:
    """The data that a configuration names, indexed; raises what is wrong with it."""
    if config.scenes is not None:
        sides = (config.image_size,) if isinstance(config.image_size, int) else config.image_size
        return DrawnScenes(config.scenes, tuple((side, side) for side in sides))
    path, caption, empty = config.webdataset_path, config.tmp_prompt, config.empty_captions
    buckets = make_buckets(config.image_size, config.multi_aspect_ratio)
    if names_shards(config):
        return open_shards(path, buckets, caption, empty)
    return into_buckets(index_folder(path, config.max_broken, caption, empty), buckets)


def stream(
    data: Data, settings: LoaderSettings, start: Position | None = None
) -> Iterator[tuple[Batch, Position]]:
    """Endless batches from a position on, each with the position after it."""
    return (shard_batches if isinstance(data, ShardData) else batches)(data, settings, start)
