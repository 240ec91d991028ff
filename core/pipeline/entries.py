"""What ControlNets add to Stage C, and when: entries of several add up, each within its own times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from torch import Tensor

from modules.blocks import resize_like
from modules.stage_c import StageC

SLACK = 1e-6  # of times, which are rounded

Maps = Sequence[Tensor | None]  # an entry for each ResBlock, up to the last that gets one


@dataclass(frozen=True)
class Entries:
    """A control's entries for Stage C, as `modules.controlnet.ControlNet` returns them, times its weight."""

    maps: Maps
    start: float = 1.0  # they are added at times t of a pass from here
    end: float = 0.0  # down to here, where those of the next control may start
    hr: bool = False  # in the high-resolution pass too

    def act_at(self, t: float) -> bool:
        """Whether they are added at time t."""
        return self.end + SLACK < t <= self.start + SLACK

    def alike(self) -> tuple:
        """What those of pictures have in common that can be made at once."""
        shapes = [None if entry is None else entry.shape for entry in self.maps]
        return self.start, self.end, self.hr, shapes

    @classmethod
    def together(cls, pictures: Sequence[Entries]) -> Entries:
        """Those of a control of several pictures, which are alike, as one batch."""
        columns = zip(*(one.maps for one in pictures), strict=True)
        maps = [None if column[0] is None else torch.cat(column) for column in columns]
        return replace(pictures[0], maps=maps)

    def to(self, device: torch.device | str) -> Entries:
        """The same on a device."""
        return replace(self, maps=[None if entry is None else entry.to(device) for entry in self.maps])

    def fitted(self, sizes: Sequence[tuple[int, int]]) -> Entries:
        """The same, each as large as the map that it is added to; those beyond the last map are left out."""
        pairs = zip(self.maps, sizes, strict=False)
        return replace(self, maps=[None if e is None else resize_like(e, size) for e, size in pairs])

    def of_rows(self, rows: slice) -> Entries:
        """Those of some rows of the maps, which have one size all."""
        return replace(self, maps=[None if entry is None else entry[:, :, rows] for entry in self.maps])


@dataclass(frozen=True)
class PassEntries:
    """The entries of all controls in a pass, as large as its maps; `at` adds them up."""

    controls: Sequence[Entries]
    _sums: dict[tuple[bool, ...], Maps] = field(default_factory=dict)  # by which of them act

    @classmethod
    def of(cls, controls: Sequence[Entries], stage_c: StageC, latent: tuple[int, int]) -> PassEntries | None:
        """Those of a pass on latents of a size (H, W); None where there are none."""
        sizes = stage_c.entry_sizes(latent)
        return cls([control.fitted(sizes) for control in controls]) if controls else None

    def at(self, t: float) -> Maps | None:
        """What is added at time t: the same tensors whenever the same controls act; None where none does."""
        acting = tuple(control.act_at(t) for control in self.controls)
        if not any(acting):
            return None
        if acting not in self._sums:
            maps = [control.maps for control, acts in zip(self.controls, acting, strict=True) if acts]
            self._sums[acting] = [_total(entries) for entries in zip_longest(*maps)]
        return self._sums[acting]

    def of_rows(self, rows: slice) -> PassEntries:
        """Those of some rows of the maps, which have one size all."""
        return PassEntries([control.of_rows(rows) for control in self.controls])


def _total(entries: Maps) -> Tensor | None:
    there = [entry for entry in entries if entry is not None]
    return sum(there[1:], there[0]) if there else None
