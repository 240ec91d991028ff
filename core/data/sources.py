"""Where a training's pictures come from: a folder, shards, or scenes drawn as they are needed."""

from __future__ import annotations

from collections.abc import Iterator

from core.config.schema import RunConfig
from core.data.buckets import make_buckets
from core.data.folder import index_folder
from core.data.loader import Batch, IndexedData, LoaderSettings, Position, batches, into_buckets
from core.data.shards import ShardData, is_shards, open_shards, shard_batches

Data = IndexedData | ShardData


def names_shards(config: RunConfig) -> bool:
    """Whether a configuration's data are tar shards."""
    captions = config.tmp_prompt is None and not config.empty_captions
    return config.webdataset_path is not None and is_shards(config.webdataset_path, captions)


def open_data(config: RunConfig) -> Data:
    """The data that a configuration names, indexed; raises what is wrong with it."""
    if config.scenes is not None:
        from core.scenes.drawn import DrawnScenes  # here, as nothing else needs what draws them

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
