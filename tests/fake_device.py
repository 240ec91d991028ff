"""A device that is not there, computed on the CPU: its tensors say that they lie on it.

Within `fake_device("mps")` tensors can be made on it and moved to it. A function that gets tensors of it and
of the CPU raises an error, as PyTorch does, and a call that is CUDA's own fails, as on a machine without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

BETWEEN = ("to", "copy_", "cpu", "__setitem__", "cat")  # functions that move, or check by themselves


class Elsewhere(Tensor):
    """A tensor of a device that is not there, around one of the CPU."""

    held: Tensor

    @staticmethod
    def around(held: Tensor, device: torch.device) -> Elsewhere:
        """The tensor as one of the device."""
        with torch._C.DisableTorchFunction():
            tensor = Tensor._make_wrapper_subclass(Elsewhere, held.shape, dtype=held.dtype, device=device)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Callable, *_: Any) -> Any:
        raise AssertionError(f"{func} is computed without the mode: in another thread?")


class DeviceMode(TorchFunctionMode):
    """Computes on the CPU what is asked of the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.functions: set[str] = set()

    def __torch_function__(
        self, func: Callable, _types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        wrappers = {id(tensor.held): tensor for tensor in given if isinstance(tensor, Elsewhere)}
        if func == Tensor.device.__get__ and wrappers:
            return self._device
        if name == "_has_compatible_shallow_copy_type":
            return len(wrappers) != 1
        if func is torch.device or name == "_parse_to":  # which name devices alone
            return func(*args, **kwargs)
        if wrappers and name not in BETWEEN:
            self._check(name, given)
        target = self._target(name, args, kwargs)
        args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
        args, kwargs = tree_map_only(torch.device, self._real, (args, kwargs))
        args, kwargs = tree_map_only(str, self._real_name, (args, kwargs))
        made = func(*args, **kwargs)
        if name == "copy_" and not isinstance(given[0], Elsewhere):
            return made
        if not (bool(wrappers) if target is None else target.type == self._device.type):
            return made
        self.functions.add(name)
        return tree_map_only(Tensor, lambda tensor: self._wrapped(tensor, wrappers), made)

    def _wrapped(self, tensor: Tensor, known: dict[int, Elsewhere]) -> Elsewhere:
        """The tensor on the device; one that was changed in place is the one that it was."""
        return known[id(tensor)] if id(tensor) in known else Elsewhere.around(tensor, self._device)

    def _target(self, name: str, args: tuple, kwargs: dict[str, Any]) -> torch.device | None:
        """The device that a function is asked to make its result on, if it is."""
        named = [kwargs.get("device"), *(args[1:2] if name == "to" else ())]
        found = next((d for d in named if isinstance(d, str | torch.device)), None)
        if name == "cpu":
            return torch.device("cpu")
        return None if found is None else torch.device(found)

    def _real(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if device.type == self._device.type else device

    def _real_name(self, text: str) -> str:
        return "cpu" if text.partition(":")[0] == self._device.type else text

    def _check(self, name: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Elsewhere) and tensor.dim():
                raise RuntimeError(f"{name}: expected all tensors on {self._device}, but one is on the CPU")


@contextmanager
def fake_device(name: str) -> Iterator[DeviceMode]:
    """Within it, PyTorch has the device, in this thread."""
    with DeviceMode(torch.device(name, 0)) as mode:
        yield mode
