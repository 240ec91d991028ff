"""Weights from files to a GPU through a few pinned pieces of memory, so that reading and copying overlap."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from core.memory import host_memory

PIECES, PIECE_BYTES = 3, 1 << 25
READERS = 4  # threads that fill a piece
LEAST_SHARE = 1 << 19  # bytes that are worth a thread


class Ring:
    """Copies tensors to a device: a piece is read by some threads while others are on their way.

    The copies have a CUDA stream of their own; all have arrived at the end of `in_use`. On the CPU the same
    is done without streams.
    """

    def __init__(self, device: torch.device, pieces: int = PIECES, size: int = PIECE_BYTES) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._pieces = [host_memory((size,), torch.uint8, pinned=on_gpu) for _ in range(pieces)]
        self._sent: list[torch.cuda.Event | None] = [None] * pieces
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._readers: ThreadPoolExecutor | None = None  # while in use
        self._turn = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, what `copy` returns is on its way; afterwards it is there."""
        with ThreadPoolExecutor(READERS) as self._readers, torch.cuda.stream(self._stream):
            yield
        if self._stream is not None:
            self._stream.synchronize()

    def copy(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous copy of a tensor on the CPU, in a number format, on the device."""
        goal = torch.empty(source.shape, dtype=dtype, device=self._device)
        given, taken = source.reshape(-1), goal.view(-1)
        step = len(self._pieces[0]) // dtype.itemsize
        for start in range(0, len(given), step):
            part = given[start : start + step]
            piece = self._free_piece().view(dtype)[: len(part)]
            self._read(part, piece)
            taken[start : start + step].copy_(piece, non_blocking=True)
            self._sent[self._turn] = None if self._stream is None else self._stream.record_event()
        return goal

    def _read(self, part: Tensor, piece: Tensor) -> None:
        if part.dtype != piece.dtype:
            piece.copy_(part)
            return
        # Not by torch's own threads, each of whose operations waits for the slowest: several files are read
        # at once, and Python runs meanwhile.
        source, goal = (t.view(torch.uint8).numpy() for t in (part, piece))
        share = max(LEAST_SHARE, -(-len(goal) // READERS))
        shares = [slice(start, start + share) for start in range(0, len(goal), share)]
        for _ in self._readers.map(lambda s: np.copyto(goal[s], source[s]), shares):
            pass

    def _free_piece(self) -> Tensor:
        """The piece whose copy began the longest ago, once that has ended."""
        self._turn = (self._turn + 1) % len(self._pieces)
        if (sent := self._sent[self._turn]) is not None:
            sent.synchronize()
        return self._pieces[self._turn]
