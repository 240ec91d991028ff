"""One stage on the device at a time: weights rest in CPU memory and visit it while their stage works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Offloaded(Generic[M]):
    """A module that is loaded at its first use and lies on the device only within `on_device`.

    Its weights keep their place in CPU memory meanwhile, so leaving the device copies nothing. They must
    not be changed on the device: what is changed there is lost. `resident` leaves them there instead.
    `prepare` is called before each use, with the module where it rests.
    """

    def __init__(
        self,
        load: Callable[[], M],
        device: torch.device,
        resident: bool = False,
        prepare: Callable[[M], None] | None = None,
    ) -> None:
        self._load = load
        self._device = device
        self._resident = resident
        self._prepare = prepare
        self._module: M | None = None

    @property
    def module(self) -> M:
        """The module where it rests, loaded if need be."""
        if self._module is None:
            self._module = self._load()
            if self._resident:
                self._module.to(self._device)
        if self._prepare is not None:
            self._prepare(self._module)
        return self._module

    @contextmanager
    def on_device(self) -> Iterator[M]:
        """The module, on the device."""
        module = self.module
        if self._resident or self._device.type == "cpu":
            yield module
            return
        homes = [(owner, name, tensor) for owner in module.modules() for name, tensor in _own_tensors(owner)]
        try:
            for owner, name, tensor in homes:
                setattr(owner, name, _moved(tensor, self._device))
            yield module
        finally:
            for owner, name, tensor in homes:
                setattr(owner, name, tensor)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
