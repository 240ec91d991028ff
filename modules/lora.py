"""LoRA: low-rank updates of weights, merged for inference and exactly undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraUpdate:
    """One weight's update lora_up @ lora_down·alpha / rank: down (rank, in), up (out, rank)."""

    down: Tensor
    up: Tensor
    alpha: float = 1.0

    def delta(self, shape: torch.Size) -> Tensor:
        """The update in float32, in the weight's shape (out, in, ...)."""
        product = self.up.float() @ self.down.float() * (self.alpha / len(self.down))
        return product.view(*product.shape, *(1,) * (len(shape) - 2)).expand(shape)


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
    wanted = (len(update.up), update.down.shape[1])
    if tuple(shape[:2]) != wanted:
        raise ValueError(
            f"the LoRA of {name} is for a weight of {wanted}, but it has {tuple(shape)}: another model size"
        )
