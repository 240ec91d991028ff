"""Batches from WebDataset tar shards, read as streams: for data too large to index, local or by URL."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from glob import glob
from itertools import chain, count, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import detshuffle
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from core.data.buckets import Buckets
from core.data.folder import (
    IMAGE_SUFFIXES,
    Broken,
    NamedBytes,
    caption_of_json,
    caption_of_text,
    header_size,
)
from core.data.loader import (
    Batch,
    Loaded,
    LoaderSettings,
    Picture,
    Position,
    as_loader,
    finish,
    load,
    read_picture,
)
from core.resolution import Size

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SHUFFLED = 100  # encoded pictures that a stream holds to draw from


@dataclass(frozen=True)
class ShardData:
    """Tar shards, as they were named and one by one, and the buckets their pictures go to."""

    source: str
    urls: tuple[str, ...]
    buckets: Buckets


@dataclass(frozen=True)
class Encoded:
    """A sample of a shard, its picture not decoded."""

    name: str  # shard/key
    caption: str
    content: bytes
    size: Size  # upright, in pixels
    bucket: Size


@dataclass(frozen=True)
class _Pack:
    """What becomes a batch; without samples where a pass over the shards ends."""

    epoch: int
    samples: tuple[Encoded, ...] = ()
    spare: tuple[Encoded, ...] = ()  # the bucket's batch before, for pictures that cannot be decoded
    seen: int = 0
    broken: tuple[Broken, ...] = ()
    thin: dict[Size, int] = field(default_factory=dict)


# --- which shards ---------------------------------------------------------------------------------


def is_shards(path: str) -> bool:
    """Whether a data path names tar shards (by URL, pattern, file, or a folder of them), not pictures."""
    if _is_url(path) or path.endswith(SHARD_SUFFIXES):
        return True
    entries = list(Path(path).glob("*"))
    return any(map(_is_shard, entries)) and not any(map(_may_hold_pictures, entries))


def open_shards(path: str, buckets: Buckets) -> ShardData:
    """The shards that a folder, a URL or a pattern with braces or * names.

    FileNotFoundError where a local one does not exist.
    """
    if Path(path).is_dir():
        urls = sorted(str(entry) for entry in Path(path).iterdir() if _is_shard(entry))
    else:
        urls = [url for part in expand_urls(path) for url in (sorted(glob(part)) if "*" in part else [part])]
    missing = [url for url in urls if not _is_url(url) and not Path(url).is_file()]
    if missing or not urls:
        raise FileNotFoundError(f"{missing[0] if missing else path}: this shard does not exist")
    return ShardData(path, tuple(urls), buckets)


def _is_url(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")


def _is_shard(path: Path) -> bool:
    return path.name.endswith(SHARD_SUFFIXES) and not path.name.startswith(".")


def _may_hold_pictures(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES or path.is_dir()


# --- one stream -----------------------------------------------------------------------------------


def samples(data: ShardData, epoch: int, seed: int, part: int, parts: int) -> Iterator[Encoded | Broken]:
    """One of `parts` disjoint parts of an epoch, in a shuffled order that follows from the arguments.

    Whole shards where there are at least as many as parts, else every parts-th sample of all shards. Only
    the pictures' headers are decoded.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(data.urls))
    urls = [data.urls[i] for i in order]
    whole = len(urls) >= parts
    entries = chain.from_iterable(
        _read_shard(url, data.buckets) for url in (urls[part::parts] if whole else urls)
    )
    own = entries if whole else islice(entries, part, None, parts)
    order_seed = int(np.random.SeedSequence([seed, epoch, part]).generate_state(1)[0])
    return iter(detshuffle(SHUFFLED, SHUFFLED, order_seed).run(own))


def _read_shard(url: str, buckets: Buckets) -> Iterator[Encoded | Broken]:
    shard, failures = url.rsplit("/", 1)[-1], []

    def note(error: Exception) -> bool:
        cause = str(error.args[0]) if error.args else type(error).__name__  # webdataset appends to args
        failures.append(Broken(shard, f"the shard is damaged ({cause})"))
        return True

    files = tar_file_expander(url_opener([{"url": url}], note), note)
    for group in group_by_keys(files, keys=os.path.splitext, handler=note):
        yield _encoded(group, f"{shard}/{group['__key__']}", buckets)
    yield from failures


def _encoded(group: Mapping[str, Any], key: str, buckets: Buckets) -> Encoded | Broken:
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in group), None)
    if suffix is None:
        return Broken(key, f"it has no picture ({', '.join(IMAGE_SUFFIXES)})")
    name = key + suffix
    try:
        if ".json" in group:
            caption = caption_of_json(group[".json"])
        elif ".txt" in group:
            caption = caption_of_text(group[".txt"])
        else:
            raise ValueError("it has no caption: no .json or .txt of the same name")
        size = header_size(NamedBytes(group[suffix], name))
        return Encoded(name, caption, group[suffix], size, buckets.nearest(*size))
    except (OSError, ValueError) as error:
        return Broken(name, str(error).removeprefix(f"{name}: "))


# --- batches --------------------------------------------------------------------------------------


def shard_batches(
    data: ShardData, settings: LoaderSettings, start: Position | None = None
) -> Iterator[tuple[Batch, Position]]:
    """Endless batches from a position on, each with the position after it.

    Every worker of every process passes over its own part of the shards, so that there is no common epoch:
    a position counts a process's batches from the start. Resuming reads through what was consumed, without
    decoding it, and needs the same processes and workers. What is broken is treated as in `loader.batches`.
    """
    dataset = _ShardDataset(data, settings, start or Position())
    return finish(as_loader(dataset, settings), data.source, settings.max_broken, 0, 0)


class _ShardDataset(IterableDataset):
    """A worker's decoded batches, endlessly."""

    def __init__(self, data: ShardData, settings: LoaderSettings, start: Position) -> None:
        self._data, self._settings, self._start = data, settings, start

    def __iter__(self) -> Iterator[Loaded]:
        info = get_worker_info()
        own, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (own + self._start.batch) % workers  # batches come from the workers in turn
        skipped = -(-(self._start.batch - worker) // workers)
        for turn, pack in enumerate(_merged(_packs(self._data, self._settings, worker, workers), skipped)):
            if turn >= skipped:
                loaded = self._load(pack, Position(0, turn * workers + worker + 1))
                broken = pack.broken + loaded.broken
                yield replace(loaded, broken=broken, seen=pack.seen, thin=pack.thin)

    def _load(self, pack: _Pack, after: Position) -> Loaded:
        candidates = pack.samples + pack.spare

        def read(place: int) -> Picture | Broken:
            sample = candidates[place]
            key = (self._settings.seed, pack.epoch, zlib.crc32(sample.name.encode()))
            source = NamedBytes(sample.content, sample.name)
            return read_picture(source, sample.name, sample.caption, sample.bucket, key)

        return load(range(len(pack.samples)), len(candidates), read, after)


def _packs(data: ShardData, settings: LoaderSettings, worker: int, workers: int) -> Iterator[_Pack]:
    """What one worker makes of its part, pass after pass; a pack without samples ends each pass."""
    part, parts = settings.rank * workers + worker, settings.world_size * workers
    for epoch in count():
        yield from _pass(samples(data, epoch, settings.seed, part, parts), epoch, settings.batch_size)


def _pass(entries: Iterable[Encoded | Broken], epoch: int, batch_size: int) -> Iterator[_Pack]:
    buffers: dict[Size, list[Encoded]] = {}
    last: dict[Size, tuple[Encoded, ...]] = {}  # of every bucket that filled a batch
    seen, broken = 0, []
    for entry in entries:
        seen += epoch == 0  # later passes meet the same ones
        if isinstance(entry, Broken):
            broken.append(entry)
            continue
        size = entry.bucket
        buffer = buffers.setdefault(size, [])
        buffer.append(entry)
        if len(buffer) == batch_size:
            full = tuple(buffer)
            yield _Pack(epoch, full, last.get(size, ()), seen, tuple(broken))
            last[size], seen, broken = full, 0, []
            buffer.clear()
    rest = {size: buffer for size, buffer in buffers.items() if buffer}
    for size, buffer in rest.items():
        yield _Pack(epoch, tuple(islice(cycle(buffer), batch_size)), last.get(size, ()))
    thin = {size: len(buffer) for size, buffer in rest.items() if size not in last and epoch == 0}
    yield _Pack(epoch, seen=seen, broken=tuple(broken), thin=thin)


def _merged(packs: Iterable[_Pack], skipped: int) -> Iterator[_Pack]:
    """Packs as turns: what the end of a pass and the turns to be skipped tell goes into a later one.

    The end of a pass is a turn of its own only where the whole pass gave no sample.
    """
    seen, broken, thin, turn, given = 0, (), {}, 0, False
    for pack in packs:
        seen, broken, thin = seen + pack.seen, broken + pack.broken, {**thin, **pack.thin}
        ends_a_pass = given and not pack.samples
        given = bool(pack.samples)
        if ends_a_pass:
            continue
        yield replace(pack, seen=seen, broken=broken, thin=thin)
        turn += 1
        if turn > skipped:
            seen, broken, thin = 0, (), {}
