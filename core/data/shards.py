"""Batches from WebDataset tar shards, read as streams: for data too large to index, local or by URL."""

from __future__ import annotations

import lzma
import os
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import glob
from itertools import chain, count, cycle, groupby, islice
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import detshuffle
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from core.config.sizes import Size
from core.data.buckets import Buckets
from core.data.captions import CAPTION_KEYS, first_caption
from core.data.files import (
    CAPTION_SUFFIXES,
    HIDDEN,
    UNSORTED,
    Broken,
    is_hidden,
    is_picture,
    is_shard,
    sort_out,
    tally,
    walk,
)
from core.data.folder import header_size, warn_of_left_out
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
from core.pictures.images import NamedBytes

SHUFFLED = 100  # encoded pictures that a stream holds to draw from
PREFERRED = (".jpg", ".jpeg", ".png", ".webp")  # where a sample has pictures of several formats
NOWHERE = "no .json, .txt or .caption next to it has its name up to the first dot"
EMPTY_SHARD = "shard without pictures"
SORT = (
    "the files of a sample must follow each other; extract it into a new folder, and pack it anew in there: "
    "find . -type f | LC_ALL=C sort | tar -cf ../sorted.tar -T -"
)
# What reading a shard raises: tarfile, its decompressors, and what opens URLs.
DAMAGED_SHARD = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class ShardData:
    """Tar shards, as they were named and one by one, and the buckets their pictures go to."""

    source: str
    urls: tuple[str, ...]
    buckets: Buckets
    caption: str | None = None  # of all pictures, instead of their own
    empty_captions: bool = False  # pictures without a caption are used
    left_out: Mapping[str, int] = field(default_factory=dict)  # other files of the folder, by suffix

    @cached_property
    def root(self) -> str:
        """The folder that all shards lie in."""
        return os.path.commonprefix(self.urls).rpartition("/")[0]


@dataclass(frozen=True)
class Encoded:
    """A sample of a shard, its picture not decoded."""

    name: str  # shard/key
    caption: str
    content: bytes
    size: Size  # upright, in pixels
    bucket: Size


@dataclass(frozen=True)
class LeftOut:
    """Files of a shard that are neither pictures nor captions of pictures, by suffix."""

    counts: Mapping[str, int]


@dataclass(frozen=True)
class _Pack:
    """What becomes a batch; without samples where a pass over the shards ends."""

    epoch: int
    samples: tuple[Encoded, ...] = ()
    spare: tuple[Encoded, ...] = ()  # one of the bucket's batch before, where none of these can be decoded
    seen: int = 0
    broken: tuple[Broken, ...] = ()
    thin: dict[Size, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)


# --- which shards ---------------------------------------------------------------------------------


def is_shards(path: str, captions: bool = True) -> bool:
    """Whether a data path names tar shards (by URL, pattern, file, or a folder of them), not pictures.

    A folder that holds both is one of shards where these are at least twice as large as its pictures: smaller
    ones may be an archive of them. Where pictures need `captions`, those without one do not count.
    """
    if not Path(path).is_dir():
        return _is_url(path) or is_shard(path)
    shards = _shards_below(path)
    return bool(shards) and _bytes(shards) >= 2 * _bytes(_usable_pictures(path, captions))


def _shards_below(folder: str) -> list[str]:
    return [
        str(Path(folder, prefix + name))
        for prefix, files in walk(Path(folder))
        for name in files
        if _is_visible_shard(name)
    ]


def _usable_pictures(folder: str, captions: bool) -> Iterator[str]:
    listed = False
    for prefix, files in walk(Path(folder)):
        beside = sort_out(files)
        listed = listed or bool(beside.listings)
        for name, own in beside.captions.items():
            if own or listed or not captions:
                yield str(Path(folder, prefix + name))


def _bytes(files: Iterable[str]) -> int:
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


def open_shards(
    path: str, buckets: Buckets, caption: str | None = None, empty_captions: bool = False
) -> ShardData:
    """The shards that a folder, a URL or a pattern with braces or * names; what else a folder has is logged.

    FileNotFoundError where a local one does not exist.
    """
    left_out = Counter()
    if Path(path).is_dir():
        urls = _shards_below(path)
        for _, files in walk(Path(path)):
            left_out += tally(name for name in files if not _is_visible_shard(name))
    else:
        urls = [
            url for part in expand_urls(path)
            for url in (sorted(glob(part, recursive=True)) if "*" in part else [part])
        ]  # fmt: skip
    missing = [url for url in urls if not _is_url(url) and not Path(url).is_file()]
    if missing or not urls:
        raise FileNotFoundError(f"{missing[0] if missing else path}: this shard does not exist")
    warn_of_left_out(path, left_out)
    return ShardData(path, tuple(urls), buckets, caption, empty_captions, left_out)


def _is_url(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")


def _is_visible_shard(name: str) -> bool:
    return is_shard(name) and not is_hidden(name)


# --- one stream -----------------------------------------------------------------------------------


def samples(
    data: ShardData, epoch: int, seed: int, part: int, parts: int
) -> Iterator[Encoded | Broken | LeftOut]:
    """One of `parts` disjoint parts of an epoch, in a shuffled order that follows from the arguments.

    Whole shards where there are at least as many as parts, else every parts-th sample of all shards. Only
    the pictures' headers are decoded.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(data.urls))
    urls = [data.urls[i] for i in order]
    whole = len(urls) >= parts
    entries = chain.from_iterable(_read_shard(url, data) for url in (urls[part::parts] if whole else urls))
    own = entries if whole else islice(entries, part, None, parts)
    order_seed = int(np.random.SeedSequence([seed, epoch, part]).generate_state(1)[0])
    return iter(detshuffle(SHUFFLED, SHUFFLED, order_seed).run(own))


def _read_shard(url: str, data: ShardData) -> Iterator[Encoded | Broken | LeftOut]:
    """A shard's samples; a sample is what shares the name up to its first dot, which is WebDataset's rule."""
    shard = url.removeprefix(data.root).lstrip("/")
    left_out, failures, keys, ordered, pictures = Counter(), [], set(), True, 0
    for key, members in groupby(_members(url, left_out, failures), key=lambda member: member[0]):
        files = {suffix: content for _, suffix, content in members}
        if key in keys:
            if ordered and data.caption is None:
                yield Broken(shard, f"{UNSORTED} ({key} comes twice): {SORT}")
            ordered = False
        elif all(suffix.endswith(CAPTION_SUFFIXES) for suffix in files):
            left_out.update(files.keys())
        else:
            pictures += 1
            yield _encoded(files, f"{shard}/{key}", data, left_out)
        keys.add(key)
    yield from (Broken(shard, f"the shard is damaged ({failure})") for failure in failures)
    if not pictures and ordered and not failures:
        left_out[EMPTY_SHARD] += 1
    if left_out:
        yield LeftOut(left_out)


def _members(url: str, left_out: Counter[str], failures: list[str]) -> Iterator[tuple[str, str, bytes]]:
    """Key, suffix and content of a shard's pictures and captions, in order.

    What else it has is counted in `left_out`; what ends the reading too early goes into `failures`.
    """
    try:
        for member, read in _files(url):
            name = posixpath.normpath(member.name.replace("\\", "/")).lstrip("/")
            key, suffix = _key_and_suffix(name)
            if is_hidden(name):
                left_out[HIDDEN] += 1
            elif member.isreg() and (is_picture(name) or suffix.endswith(CAPTION_SUFFIXES)):
                yield key, suffix, read()
            else:
                left_out[suffix] += 1
    except DAMAGED_SHARD as error:
        failures.append(str(error))


def _files(url: str) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """All that is no folder in a shard, and what reads its content."""
    with nullcontext(gopen(url)) if _is_url(url) else open(url, "rb") as stream:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as archive:
            for member in archive:
                archive.members = []  # which would keep every member
                if not member.isdir():
                    yield member, lambda member=member: archive.extractfile(member).read()


class _Header(tarfile.TarInfo):
    """A member's header; tarfile would take a damaged one for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """The next one; ReadError where it is damaged."""
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


# --- one sample -----------------------------------------------------------------------------------


def _encoded(
    files: Mapping[str, bytes], key: str, data: ShardData, left_out: Counter[str]
) -> Encoded | Broken:
    pictures = [suffix for suffix in files if not suffix.endswith(CAPTION_SUFFIXES)]
    name = key
    try:
        picture = _picture_among(pictures)
        left_out.update(suffix for suffix in pictures if suffix != picture)
        name = key + picture
        caption = _own_caption(files, picture, data.empty_captions) if data.caption is None else data.caption
        size = header_size(NamedBytes(files[picture], name))
        return Encoded(name, caption, files[picture], size, data.buckets.nearest(*size))
    except (OSError, ValueError) as error:
        return Broken(name, str(error).removeprefix(f"{name}: "))


def _picture_among(suffixes: Sequence[str]) -> str:
    """The suffix of a sample's picture: .jpg, not .seg.png beside it; ValueError where it is not clear."""
    fewest = min(suffix.count(".") for suffix in suffixes)
    plainest = [suffix for suffix in suffixes if suffix.count(".") == fewest]
    if len({_parts(suffix)[0] for suffix in plainest}) > 1:
        raise ValueError(f"it has several pictures, and none is the plain one: {', '.join(plainest)}")
    formats = (*PREFERRED, *sorted(_parts(suffix)[1] for suffix in plainest))
    return min(plainest, key=lambda suffix: formats.index(_parts(suffix)[1]))


def _own_caption(files: Mapping[str, bytes], picture: str, empty_captions: bool) -> str:
    """The caption of a sample: .txt, .v1.txt beside .v1.jpg, .caption.txt, or its only one (.prompt.txt)."""
    middles = ["", _parts(picture)[0], *(f".{key}" for key in CAPTION_KEYS)]
    texts = [suffix for suffix in files if suffix.endswith(CAPTION_SUFFIXES)]
    known = [suffix for suffix in texts if _parts(suffix)[0] in middles] or (texts if len(texts) == 1 else [])
    others = ", ".join(suffix for suffix in texts if suffix not in known)

    def rank(suffix: str) -> tuple[int, int]:
        middle, last = _parts(suffix)
        return [*middles, middle].index(middle), CAPTION_SUFFIXES.index(last)

    sources = ((suffix, files[suffix]) for suffix in sorted(known, key=rank))
    return first_caption(sources, empty_captions, NOWHERE, others and f", but there is {others}")


def _parts(suffix: str) -> tuple[str, str]:
    middle, dot, last = suffix.rpartition(".")
    return middle, dot + last


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
                yield replace(loaded, broken=broken, seen=pack.seen, thin=pack.thin, left_out=pack.left_out)

    def _load(self, pack: _Pack, after: Position) -> Loaded:
        candidates = pack.samples + pack.spare

        def read(place: int) -> Picture | Broken:
            sample = candidates[place]
            key = (self._settings.seed, pack.epoch, zlib.crc32(sample.name.encode(errors="backslashreplace")))
            source = NamedBytes(sample.content, sample.name)
            return read_picture(source, sample.name, sample.caption, sample.bucket, key)

        return load(range(len(pack.samples)), len(candidates), read, after)


def _packs(data: ShardData, settings: LoaderSettings, worker: int, workers: int) -> Iterator[_Pack]:
    """What one worker makes of its part, pass after pass; a pack without samples ends each pass."""
    part, parts = settings.rank * workers + worker, settings.world_size * workers
    for epoch in count():
        yield from _pass(samples(data, epoch, settings.seed, part, parts), epoch, settings.batch_size)


def _pass(entries: Iterable[Encoded | Broken | LeftOut], epoch: int, batch_size: int) -> Iterator[_Pack]:
    buffers: dict[Size, list[Encoded]] = {}
    last: dict[Size, tuple[Encoded, ...]] = {}  # one of every bucket that filled a batch
    seen, broken, left_out = 0, [], Counter()
    for entry in entries:
        if isinstance(entry, LeftOut):
            left_out.update(entry.counts if epoch == 0 else {})
            continue
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
            last[size], seen, broken = full[:1], 0, []  # encoded pictures of all buckets take memory
            buffer.clear()
    rest = {size: buffer for size, buffer in buffers.items() if buffer}
    for size, buffer in rest.items():
        yield _Pack(epoch, tuple(islice(cycle(buffer), batch_size)), last.get(size, ()))
    thin = {size: len(buffer) for size, buffer in rest.items() if size not in last and epoch == 0}
    yield _Pack(epoch, seen=seen, broken=tuple(broken), thin=thin, left_out=left_out)


def _merged(packs: Iterable[_Pack], skipped: int) -> Iterator[_Pack]:
    """Packs as turns: what the end of a pass and the turns to be skipped tell goes into a later one.

    The end of a pass is a turn of its own only where the whole pass gave no sample.
    """
    seen, broken, thin, left_out, turn, given = 0, (), {}, {}, 0, False
    for pack in packs:
        seen, broken, thin = seen + pack.seen, broken + pack.broken, {**thin, **pack.thin}
        left_out = {**left_out, **pack.left_out}  # one pack alone has some
        ends_a_pass = given and not pack.samples
        given = bool(pack.samples)
        if ends_a_pass:
            continue
        yield replace(pack, seen=seen, broken=broken, thin=thin, left_out=left_out)
        turn += 1
        if turn > skipped:
            seen, broken, thin, left_out = 0, (), {}, {}
