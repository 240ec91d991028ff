"""Batches from indexed data: one bucket each, in an order that seed and epoch decide, read by workers."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.config.sizes import Size
from core.data.buckets import Buckets
from core.data.files import Broken
from core.data.folder import FolderIndex, check_broken, decode, warn_of_left_out
from core.pictures.images import NamedBytes

log = logging.getLogger(__name__)

ENOUGH_SEEN = 50  # pictures of a stream before the share of broken ones means anything
MAX_EMPTY = 100  # batches in a row without any picture that stop the run


@dataclass(frozen=True)
class Position:
    """How much of the data was consumed: the epoch, and batches within it."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Batch:
    """Pictures of one bucket, with captions and names."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    captions: list[str]
    names: list[str]


@dataclass(frozen=True)
class LoaderSettings:
    """How data is cut into batches and who loads them."""

    batch_size: int  # pictures per process and micro-batch
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    num_workers: int = 2  # 0: in this process
    max_broken: float = 0.1  # share of broken pictures that stops the run

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"batch_size must be at least 1 and num_workers at least 0, "
                f"not {self.batch_size} and {self.num_workers}"
            )
        if not 0 <= self.max_broken < 1:
            raise ValueError(f"max_broken must be a share from 0 to below 1, not {self.max_broken}")
        assert 0 <= self.rank < self.world_size


@dataclass(frozen=True)
class Picture:
    """A decoded sample."""

    pixels: Tensor  # (3, H, W), uint8
    caption: str
    name: str


@dataclass(frozen=True)
class Loaded:
    """What a worker hands over for one batch; no pictures if none of them can be read."""

    images: Tensor | None  # (B, 3, H, W), uint8
    captions: list[str]
    names: list[str]
    after: Position
    broken: tuple[Broken, ...] = ()
    seen: int = 0  # pictures that a stream met for the first time since the last batch
    thin: Mapping[Size, int] = field(default_factory=dict)  # what a stream learns at its first end
    left_out: Mapping[str, int] = field(default_factory=dict)  # and this


# --- buckets and their order ----------------------------------------------------------------------


class IndexedData(Protocol):
    """Numbered samples, of which it is known beforehand in which bucket (height, width) each is."""

    source: str  # as the user named it
    members: Mapping[Size, np.ndarray]  # numbers of the samples
    broken: int  # how many more were found that cannot be used

    def read(self, number: int, bucket: Size, key: Sequence[int]) -> Picture | Broken:
        """A decoded sample, whatever is random in it drawn from `key` alone, or why there is none."""

    def identity(self, number: int) -> str:
        """What tells a sample's content from any other's, as far as that is known without reading it."""


@dataclass(frozen=True)
class FolderData:
    """A folder's index, and which of its samples are in which bucket (height, width)."""

    index: FolderIndex
    members: dict[Size, np.ndarray]  # indices into index.samples

    @property
    def source(self) -> str:
        """The folder."""
        return str(self.index.folder)

    @property
    def broken(self) -> int:
        """Pictures that the index left out."""
        return len(self.index.broken)

    @property
    def left_out(self) -> Mapping[str, int]:
        """Its files that are neither pictures nor captions of pictures, by suffix."""
        return self.index.left_out

    def read(self, number: int, bucket: Size, key: Sequence[int]) -> Picture | Broken:
        """A picture, decoded and cropped, or why it cannot be."""
        sample = self.index.samples[number]
        return read_picture(self.index.folder / sample.name, sample.name, sample.caption, bucket, key)

    def identity(self, number: int) -> str:
        """Name, caption, and the file's size and time."""
        sample = self.index.samples[number]
        status = (self.index.folder / sample.name).stat()
        return f"{sample.name}\n{sample.caption}\n{status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class Plan:
    """One process's part of a batch."""

    epoch: int
    bucket: Size
    members: tuple[int, ...]  # indices of samples
    after: Position


def into_buckets(index: FolderIndex, buckets: Buckets) -> FolderData:
    """Sort the samples of an index into buckets; empty buckets are left out."""
    members: dict[Size, list[int]] = {}
    for number, sample in enumerate(index.samples):
        members.setdefault(buckets.nearest(sample.height, sample.width), []).append(number)
    return FolderData(index, {size: np.array(members[size]) for size in sorted(members)})


def thin_buckets(data: IndexedData, total_batch: int) -> dict[Size, int]:
    """Buckets with fewer pictures than a batch over all processes, which repeats them to be full."""
    counts = {size: len(members) for size, members in data.members.items()}
    return {size: count for size, count in counts.items() if count < total_batch}


def plans(data: IndexedData, settings: LoaderSettings, start: Position) -> Iterator[Plan]:
    """This process's plans from a position on, endlessly; at each step all processes are in one bucket.

    An epoch shows every sample; the last batch of each bucket is completed from the start of its order.
    """
    epoch, first = start.epoch, start.batch
    part = slice(settings.rank * settings.batch_size, (settings.rank + 1) * settings.batch_size)
    while True:
        order = _epoch_order(data, settings, epoch)
        for step in range(first, len(order)):
            bucket, members = order[step]
            after = Position(epoch, step + 1) if step + 1 < len(order) else Position(epoch + 1)
            yield Plan(epoch, bucket, tuple(members[part].tolist()), after)
        epoch, first = epoch + 1, 0


def _epoch_order(data: IndexedData, settings: LoaderSettings, epoch: int) -> list[tuple[Size, np.ndarray]]:
    """All batches of an epoch over all processes: the bucket, and the indices of its samples."""
    rng = np.random.default_rng([settings.seed, epoch])
    total = settings.batch_size * settings.world_size
    batches = []
    for size, members in data.members.items():
        rows = -(-len(members) // total)
        filled = np.resize(rng.permutation(members), (rows, total))  # np.resize starts over at the end
        batches += [(size, row) for row in filled]
    return [batches[i] for i in rng.permutation(len(batches))]


# --- loading --------------------------------------------------------------------------------------


def batches(
    data: IndexedData, settings: LoaderSettings, start: Position | None = None
) -> Iterator[tuple[Batch, Position]]:
    """Endless batches from a position on, each with the position after it.

    What follows a position depends on data, batch size, seed and processes alone, not on the workers. A
    picture that cannot be decoded is logged by name, its place taken by the next of its bucket; ValueError
    where broken pictures are more than the share max_broken.
    """
    warn_of_thin(thin_buckets(data, settings.batch_size * settings.world_size))
    dataset = _IndexedDataset(data, settings.seed)
    loader = as_loader(dataset, settings, plans(data, settings, start or Position()))
    good = sum(map(len, data.members.values()))
    return finish(loader, data.source, settings.max_broken, data.broken, data.broken + good)


def warn_of_thin(buckets: Mapping[Size, int]) -> None:
    """Name the buckets that cannot fill a batch."""
    if buckets:
        listed = ", ".join(f"{height} x {width} ({count})" for (height, width), count in buckets.items())
        log.warning("buckets with fewer pictures than a batch, which repeats them: %s", listed)


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Ctrl-C reaches the workers too: they go on, so that the training can finish its update and save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def as_loader(
    dataset: Dataset, settings: LoaderSettings, sampler: Iterable[Plan] | None = None
) -> DataLoader:
    """Workers around a dataset that makes whole batches; the global random state is left alone."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=settings.num_workers,
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator(),
    )


class _IndexedDataset(Dataset):
    """Decoded batches by their plan."""

    def __init__(self, data: IndexedData, seed: int) -> None:
        self._data, self._seed = data, seed

    def __getitem__(self, plan: Plan) -> Loaded:
        members = self._data.members[plan.bucket]

        def read(place: int) -> Picture | Broken:
            number = int(members[place])
            return self._data.read(number, plan.bucket, (self._seed, plan.epoch, number))

        return load(np.searchsorted(members, plan.members), len(members), read, plan.after)


def read_picture(
    source: str | Path | NamedBytes, name: str, caption: str, bucket: Size, key: Sequence[int]
) -> Picture | Broken:
    """A decoded picture, its crop drawn from `key` alone, or why there is none."""
    try:
        return Picture(decode(source, bucket, np.random.default_rng(key)), caption, name)
    except (OSError, ValueError) as error:
        return Broken(name, str(error).removeprefix(f"{source}: "))


def load(
    places: Iterable[int], count: int, read: Callable[[int], Picture | Broken], after: Position
) -> Loaded:
    """A batch of what `read` gives at these places of `count`, or, where that is broken, at the next."""
    pictures: list[Picture] = []
    broken: dict[int, Broken] = {}
    for place in places:
        for candidate in ((place + step) % count for step in range(count)):
            entry = broken.get(candidate) or read(candidate)
            if isinstance(entry, Picture):
                pictures.append(entry)
                break
            broken[candidate] = entry
    images = torch.stack([picture.pixels for picture in pictures]) if pictures else None
    captions, names = [picture.caption for picture in pictures], [picture.name for picture in pictures]
    return Loaded(images, captions, names, after, tuple(broken.values()))


def finish(
    loaded: Iterable[Loaded], source: str, max_broken: float, broken: int, total: int
) -> Iterator[tuple[Batch, Position]]:
    """Batches as floats; logs what is broken once by name, and stops where it is more than `max_broken`.

    `broken` of `total` pictures are known from an index (0 of 0 for a stream, which counts as it goes).
    """
    indexed, empty, named = total > 0, 0, {}
    for part in loaded:
        total += part.seen
        for entry in part.broken:
            if entry.name not in named:
                log.warning("skipped %s: %s", entry.name, entry.reason)
                named[entry.name] = entry.reason
        if indexed or total >= ENOUGH_SEEN or not part.seen:
            check_broken(source, broken + len(named), total, max_broken, named.values())
        warn_of_thin(part.thin)
        warn_of_left_out(source, part.left_out)
        empty = empty + 1 if part.images is None else 0
        if empty == MAX_EMPTY:
            raise ValueError(f"{source}: no picture in it can be used")
        if part.images is not None:
            yield Batch(part.images.float().div_(255), part.captions, part.names), part.after
