"""A cache of what frozen encoders make of the samples, for trainings that see them many times.

A file per sample, named by everything its content depends on, so that other data, other encoders or other
sizes never meet. A cached sample has one crop and one caption for all epochs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from core.config.sizes import Size
from core.data.files import Broken
from core.data.folder import check_broken
from core.data.loader import (
    Batch,
    IndexedData,
    LoaderSettings,
    Plan,
    Position,
    as_loader,
    plans,
    thin_buckets,
    warn_of_thin,
)

log = logging.getLogger(__name__)

Encode = Callable[[Batch], Mapping[str, Tensor]]  # named tensors (B, …)


@dataclass(frozen=True)
class Cache:
    """Where samples lie: `fingerprint` stands for all that their content depends on beside the sample."""

    folder: Path
    fingerprint: str
    seed: int

    def path(self, data: IndexedData, number: int, bucket: Size) -> Path:
        """The file of a sample."""
        text = json.dumps([self.fingerprint, data.identity(number), bucket, self.seed])
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:34]}.safetensors"


def fill(data: IndexedData, cache: Cache, settings: LoaderSettings, encode: Encode) -> Iterator[int]:
    """Encode this process's part of the samples that are not there yet; yields how many are left each time.

    Samples that cannot be read are logged and left out; ValueError where they are more than the share that
    the settings allow.
    """
    wanted = [
        (number, bucket)
        for bucket, members in data.members.items()
        for number in members.tolist()[settings.rank :: settings.world_size]
        if not cache.path(data, number, bucket).exists()
    ]
    left = len(wanted)
    yield left
    loader = as_loader(_Missing(data, cache.seed), settings, wanted)
    total, broken = sum(map(len, data.members.values())) + data.broken, data.broken
    for bucket, run in groupby(zip(wanted, loader, strict=True), key=lambda entry: entry[0][1]):
        while group := list(islice(run, settings.batch_size)):
            readable = [(number, entry) for (number, _), entry in group if not isinstance(entry, Broken)]
            for entry in (entry for _, entry in group if isinstance(entry, Broken)):
                log.warning("skipped %s: %s", entry.name, entry.reason)
            broken += len(group) - len(readable)
            check_broken(data.source, broken, total, settings.max_broken)
            if readable:
                _write(data, cache, bucket, readable, encode)
            left -= len(group)
            yield left


def cached_batches(
    data: IndexedData, cache: Cache, settings: LoaderSettings, start: Position | None = None
) -> Iterator[tuple[dict[str, Tensor], Position]]:
    """Endless batches of cached tensors from a position on, in the order that `loader.batches` has."""
    present = Present(data, cache)
    warn_of_thin(thin_buckets(present, settings.batch_size * settings.world_size))
    order = plans(present, settings, start or Position())
    for loaded in as_loader(_Cached(data, cache), settings, order):
        if isinstance(loaded, Broken):  # raised here, since workers wrap what they raise in their tracebacks
            raise ValueError(f"{loaded.name}: this cached sample is damaged ({loaded.reason}): delete it")
        yield loaded


class Present:
    """The indexed data without the samples that have no file."""

    def __init__(self, data: IndexedData, cache: Cache) -> None:
        self.source, self.broken = data.source, data.broken
        kept = {
            bucket: np.array([n for n in members.tolist() if cache.path(data, n, bucket).exists()])
            for bucket, members in data.members.items()
        }
        self.members = {bucket: members for bucket, members in kept.items() if len(members)}
        if not self.members:
            raise ValueError(f"{data.source}: no picture in it can be used")


class _Missing(Dataset):
    """Decoded samples by number and bucket."""

    def __init__(self, data: IndexedData, seed: int) -> None:
        self._data, self._seed = data, seed

    def __getitem__(self, place: tuple[int, Size]):
        number, bucket = place
        return self._data.read(number, bucket, (self._seed, 0, number))


class _Cached(Dataset):
    """Batches of cached tensors by their plan, or which of their files is damaged."""

    def __init__(self, data: IndexedData, cache: Cache) -> None:
        self._data, self._cache = data, cache

    def __getitem__(self, plan: Plan) -> tuple[dict[str, Tensor], Position] | Broken:
        rows = []
        for path in (self._cache.path(self._data, number, plan.bucket) for number in plan.members):
            try:
                rows.append(load_file(path))
            except (OSError, SafetensorError) as error:
                return Broken(str(path), str(error))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, plan.after


def _write(
    data: IndexedData, cache: Cache, bucket: Size, samples: Sequence[tuple[int, object]], encode: Encode
) -> None:
    pictures = [picture for _, picture in samples]
    images = torch.stack([picture.pixels for picture in pictures]).float().div_(255)
    names, captions = [picture.name for picture in pictures], [picture.caption for picture in pictures]
    encoded = encode(Batch(images, captions, names))
    for row, (number, _) in enumerate(samples):
        path = cache.path(data, number, bucket)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        save_file({name: value[row].cpu().contiguous().clone() for name, value in encoded.items()}, temporary)
        os.replace(temporary, path)  # never half a sample
