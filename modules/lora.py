"""LoRA: low-rank updates of weights, merged for inference and exactly undone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraUpdate:
    """One weight's update lora_up @ lora_down·alpha / rank: down (rank, in), up (out, rank).

    For a weight of more than two sides `in` is the second, and all taps get the same, or the product of all
    but the first.
    """

    down: Tensor
    up: Tensor
    alpha: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        """The factor of lora_up @ lora_down."""
        return self.alpha / self.rank

    def delta(self, shape: Sequence[int]) -> Tensor:
        """The update in float32, in the weight's shape (out, in, ...)."""
        product = self.up.float() @ self.down.float() * self.scale
        if product.shape[1] == math.prod(shape[1:]):
            return product.view(shape)
        return product.view(*product.shape, *(1,) * (len(shape) - 2)).expand(shape)

    def check(self, name: str, shape: Sequence[int]) -> None:
        """ValueError unless the matrices belong together and to a weight of this name and shape."""
        (rank, columns), (rows, up_rank) = self.down.shape, self.up.shape
        if rank != up_rank or rank == 0:
            raise ValueError(f"the LoRA of {name} does not fit together: it is of rank {rank} and {up_rank}")
        if rows != shape[0] or columns not in (shape[1], math.prod(shape[1:])):
            raise ValueError(
                f"the LoRA of {name} is for a weight of {(rows, columns)}, but it has {tuple(shape)}: "
                "another model size"
            )


class MergedLora:
    """LoRA updates merged into a module's weights: no cost per step, and `undo` restores them bit for bit."""

    def __init__(self, module: nn.Module, updates: Mapping[str, LoraUpdate], weight: float = 1.0) -> None:
        self._module = module
        self._saved: dict[str, Tensor] = {}
        for name in updates:
            _check(module, name, updates[name])
        with torch.no_grad():
            for name, update in updates.items():
                parameter = module.get_parameter(name)
                self._saved[name] = parameter.detach().to("cpu", copy=True)
                delta = update.delta(parameter.shape).to(parameter.device) * weight
                parameter.copy_(parameter.float() + delta)

    def undo(self) -> None:
        """Put the original weights back."""
        with torch.no_grad():
            for name, original in self._saved.items():
                self._module.get_parameter(name).copy_(original)
        self._saved.clear()


def _check(module: nn.Module, name: str, update: LoraUpdate) -> None:
    try:
        shape = module.get_parameter(name).shape
    except AttributeError:
        raise ValueError(
            f"the LoRA acts on {name!r}, a weight that {type(module).__name__} does not have"
        ) from None
    update.check(name, shape)
