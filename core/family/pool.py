"""A growing pool of scenes' latents on one device: processes draw, this one encodes, training draws from it.

Every scene is drawn at its own size and at that of the low-resolution pass, so that the guidance has a pair.
Training can begin with the first few and never waits for the rest. Only the drawing processes need skia.
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
import queue
import random
import signal
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch import Tensor

from core.pipeline.conditioning import Conditions
from core.scenes.captions import caption
from core.scenes.drawing import render
from core.scenes.scene import sample_scene
from core.training.encoders import encode_latent
from core.weights.clip import TextEncoder
from modules.effnet import EfficientNetEncoder
from modules.recogniser import Recogniser

log = logging.getLogger(__name__)

SLOTS = 2  # of shared memory per process: one is drawn into while the other is read
READY = 4  # chunks that wait to be encoded
NICE = 5  # how far drawing stands behind the process that feeds the device
POLL = 0.5  # seconds after which threads and processes look whether they should end


# --- drawing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Pictures of one size: how many pixels a side, which share of the scenes, how many at a time."""

    side: int
    share: float
    chunk: int


@dataclass(frozen=True)
class Chunk:
    """Scenes of a kind, drawn."""

    side: int
    pictures: Tensor  # (n, side, side, 3), uint8
    small: Tensor  # (n, low side, low side, 3), uint8
    ids: Tensor  # (n, L), of the captions
    mask: Tensor  # (n, L)


class Drawers:
    """Processes that draw training scenes without end, and a thread that receives what they drew.

    Make it before CUDA or threads are used: the processes are forks of this one. `first` is the first scene's
    number. A process that fails is named in the log and missed; ValueError from `take` once none is left.
    """

    def __init__(self, kinds: Sequence[Kind], low_side: int, workers: int, first: int) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise ValueError("scenes are drawn by forked processes, which this system does not have")
        self.kinds, self.low_side = kinds, low_side
        self.drawn = 0  # scenes received
        self._slot_bytes = max(k.chunk * 3 * (k.side**2 + low_side**2) for k in kinds)
        self._memory = mmap.mmap(-1, workers * SLOTS * self._slot_bytes)  # shared with the forks
        self._processes: dict[Connection, BaseProcess] = {}
        for number in range(workers):
            self._start(number, workers, first)
        self._ready: queue.Queue[Chunk] = queue.Queue(READY)
        self._stopped = threading.Event()
        self._failure = ""
        self._reader: threading.Thread | None = None

    def _start(self, number: int, workers: int, first: int) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        arguments = (
            number,
            workers,
            first,
            self.kinds,
            self.low_side,
            self._memory,
            self._slot_bytes,
            theirs,
        )
        process = context.Process(target=_draw_chunks, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is seen
        self._processes[ours] = process

    def start(self, text: TextEncoder, pin: bool) -> None:
        """Begin to receive; captions become the text encoder's tokens, `pin` is for a device of CUDA."""
        self._reader = threading.Thread(target=self._read, args=(text, pin), daemon=True)
        self._reader.start()

    def take(self, block: bool = False) -> Chunk | None:
        """A chunk, None where none is ready; ValueError once no process draws any more."""
        try:
            return self._ready.get(block=block, timeout=POLL if block else None)
        except queue.Empty:
            if not (self._reader and self._reader.is_alive()) and not self._stopped.is_set():
                raise ValueError(f"no process draws scenes any more: {self._failure}") from None
            return None

    def close(self) -> None:
        """End the processes and the thread."""
        self._stopped.set()
        for process in self._processes.values():
            process.kill()
            process.join()
        if self._reader is not None:
            self._reader.join()

    def _read(self, text: TextEncoder, pin: bool) -> None:
        alive = list(self._processes)
        while alive and not self._stopped.is_set():
            for connection in wait(alive, POLL):
                try:
                    slot, kind, captions = connection.recv()
                except (EOFError, OSError):
                    slot, kind, captions = -1, None, "it ended"
                if slot < 0:
                    alive.remove(connection)
                    self._failure = captions
                    if not self._stopped.is_set():
                        log.warning("a drawing process is lost (%d left): %s", len(alive), captions)
                    continue
                pictures = self._copied(slot, self.kinds[kind])
                connection.send(slot)
                self.drawn += len(captions)
                parts = (*pictures, *text.tokenize(captions))
                # A copy from pinned memory need not be waited for.
                self._put(Chunk(self.kinds[kind].side, *(p.pin_memory() if pin else p for p in parts)))

    def _copied(self, slot: int, kind: Kind) -> list[Tensor]:
        views = _views(self._memory, slot * self._slot_bytes, kind, self.low_side)
        return [torch.from_numpy(view.copy()) for view in views]

    def _put(self, chunk: Chunk) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(chunk, timeout=POLL)
            except queue.Full:
                continue


def _views(memory: mmap.mmap, start: int, kind: Kind, low_side: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures (chunk, side, side, 3) and the small ones in a slot."""
    shape, small = (kind.chunk, kind.side, kind.side, 3), (kind.chunk, low_side, low_side, 3)
    size = int(np.prod(shape))
    return (
        np.frombuffer(memory, np.uint8, size, start).reshape(shape),
        np.frombuffer(memory, np.uint8, int(np.prod(small)), start + size).reshape(small),
    )


def _draw_chunks(
    number: int,
    workers: int,
    first: int,
    kinds: Sequence[Kind],
    low_side: int,
    memory: mmap.mmap,
    slot_bytes: int,
    connection: Connection,
) -> None:
    """A process: draws chunks of the kinds by turns into its slots, until its parent is gone."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)  # the parent saves first
    os.nice(NICE)
    parent, free = os.getppid(), deque(range(number * SLOTS, (number + 1) * SLOTS))
    longest = max(kind.chunk for kind in kinds)
    turn = number
    try:
        while True:
            while not free or connection.poll():
                if connection.poll(POLL):
                    free.append(connection.recv())
                elif os.getppid() != parent:
                    return
            scenes = first + turn * longest
            kind = kind_of(turn, kinds)
            slot = free.popleft()
            captions = _draw_chunk(scenes, kinds[kind], low_side, memory, slot * slot_bytes)
            connection.send((slot, kind, captions))
            turn += workers
    except Exception:
        connection.send((-1, None, traceback.format_exc(limit=-2)))


def kind_of(turn: int, kinds: Sequence[Kind]) -> int:
    """Which kind's turn it is: by share of the scenes, however many come in a chunk."""
    weights = [kind.share / kind.chunk for kind in kinds]
    return random.Random(f"kind/{turn}").choices(range(len(kinds)), weights)[0]


def _draw_chunk(first: int, kind: Kind, low_side: int, memory: mmap.mmap, start: int) -> list[str]:
    """Draw the scenes from number `first` on, at both sizes; their captions."""
    pictures, small = _views(memory, start, kind, low_side)
    captions = []
    for i in range(kind.chunk):
        scene = sample_scene(first + i)
        small[i] = render(scene, low_side, low_side)
        pictures[i] = small[i] if kind.side == low_side else render(scene, kind.side, kind.side)
        captions.append(caption(scene, first + i))
    return captions


# --- the pool ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoders:
    """The frozen networks that make latents and conditions, on one device."""

    effnet: EfficientNetEncoder
    text: TextEncoder
    image: Recogniser


@dataclass(frozen=True)
class Samples:
    """Scenes from the pool."""

    z: Tensor  # (B, 16, H, W)
    z_lr: Tensor  # (B, 16, h, w)
    conditions: Conditions

    def to(self, dtype: torch.dtype) -> Samples:
        """The same in another dtype; latents in float32."""
        return Samples(self.z.float(), self.z_lr.float(), self.conditions.to(self.z.device, dtype))


class Pool:
    """Latents and conditions of scenes of one size, in float16; where it is full, new ones replace old."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count, self.seen = capacity, 0, 0
        self._columns: list[Tensor] = []

    @torch.no_grad()
    def add(self, samples: Samples) -> None:
        """Take in samples."""
        columns = [samples.z, samples.z_lr, *vars(samples.conditions).values()]
        if not self._columns:
            self._columns = [
                torch.empty(self.capacity, *c.shape[1:], dtype=torch.float16, device=c.device)
                for c in columns
            ]
        start = self.seen % self.capacity
        kept = min(len(samples.z), self.capacity - start)
        for column, new in zip(self._columns, columns, strict=True):
            column[start : start + kept] = new[:kept]
        self.seen += kept
        self.count = min(self.seen, self.capacity)

    def draw(self, count: int, generator: torch.Generator) -> Samples:
        """Samples at random, some twice where there are few."""
        device = self._columns[0].device
        rows = torch.randint(self.count, (count,), generator=generator, device=device)
        z, z_lr, *conditions = (column[rows] for column in self._columns)
        return Samples(z, z_lr, Conditions(*conditions))


@dataclass(frozen=True)
class Pools:
    """The pools of all sizes, by the side of their pictures, and what fills them."""

    drawers: Drawers
    encoders: Encoders
    by_side: dict[int, Pool]
    device: torch.device
    scenes: int | None = None  # after which no more are taken in; the processes wait then

    @property
    def seen(self) -> int:
        """How many scenes were taken in."""
        return sum(pool.seen for pool in self.by_side.values())

    def absorb(self, limit: int, block: bool = False) -> int:
        """Encode chunks that are ready, at most so many; how many there were."""
        for done in range(limit):
            enough = self.scenes is not None and self.seen >= self.scenes
            chunk = None if enough else self.drawers.take(block)
            if chunk is None:
                return done
            self.by_side[chunk.side].add(self._encoded(chunk))
        return limit

    @torch.no_grad()
    def _encoded(self, chunk: Chunk) -> Samples:
        pictures, small, ids, mask = (
            part.to(self.device, non_blocking=True)
            for part in (chunk.pictures, chunk.small, chunk.ids, chunk.mask)
        )
        pictures, small = (x.permute(0, 3, 1, 2).float() / 255 for x in (pictures, small))
        tokens, pooled = self.encoders.text.embed_ids(ids, mask)
        image = self.encoders.image.embed(pictures)[:, None]
        z, z_lr = (encode_latent(self.encoders.effnet, x) for x in (pictures, small))
        return Samples(z, z_lr, Conditions(tokens, pooled, image))

    def counts(self) -> dict[str, int]:
        """Scenes in every pool, for the log."""
        return {str(side): pool.count for side, pool in self.by_side.items()}
