"""LoRA: low-rank updates of weights, merged for inference and exactly undone, or trained; token offsets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


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
    """LoRA updates merged into a module's weights: no cost per step, and `undo` restores them bit for bit.

    `others` are further LoRAs' (updates, weight): those of one parameter add up, and are rounded once.
    """

    def __init__(
        self,
        module: nn.Module,
        updates: Mapping[str, LoraUpdate],
        weight: float = 1.0,
        others: Sequence[tuple[Mapping[str, LoraUpdate], float]] = (),
    ) -> None:
        self._module = module
        self._saved: dict[str, Tensor] = {}
        parts: dict[str, list[tuple[LoraUpdate, float]]] = {}
        for each, factor in [(updates, weight), *others]:
            for name, update in each.items():
                check_update(module, name, update)
                parts.setdefault(name, []).append((update, factor))
        try:
            for name, added in parts.items():
                self._merge(name, added)
        except BaseException:  # such as full memory: the weights must not stay half merged
            self.undo()
            raise

    @torch.no_grad()
    def _merge(self, name: str, added: Sequence[tuple[LoraUpdate, float]]) -> None:
        parameter = self._module.get_parameter(name)
        self._saved[name] = parameter.detach().to("cpu", copy=True)
        delta = sum(update.delta(parameter.shape) * factor for update, factor in added)
        parameter.copy_(parameter.float() + delta.to(parameter.device))

    def undo(self) -> None:
        """Put the original weights back."""
        with torch.no_grad():
            for name, original in self._saved.items():
                self._module.get_parameter(name).copy_(original)
        self._saved.clear()


def check_update(module: nn.Module, name: str, update: LoraUpdate) -> None:
    """ValueError unless the module has a weight of this name that the update fits."""
    try:
        shape = module.get_parameter(name).shape
    except AttributeError:
        raise ValueError(
            f"the LoRA acts on {name!r}, a weight that {type(module).__name__} does not have"
        ) from None
    update.check(name, shape)


# --- in training ----------------------------------------------------------------------------------


class TrainedLora(nn.Module):
    """A weight's update to train, as a parametrisation of it: W + up @ down / rank, with alpha 1.

    The sum is rounded to the weight's number format, as `MergedLora` rounds it for inference.
    """

    def __init__(self, shape: Sequence[int], rank: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, shape[1], device=device))
        self.up = nn.Parameter(torch.randn(shape[0], rank).to(device))  # the same ones on every device

    @property
    def update(self) -> LoraUpdate:
        return LoraUpdate(self.down, self.up)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return (weight.float() + self.update.delta(weight.shape)).to(weight.dtype)


def train_lora(module: nn.Module, weights: Sequence[str], rank: int) -> dict[str, TrainedLora]:
    """Put updates to train on weights of a frozen module, which uses them from then on; by their names."""
    updates = {}
    for name in weights:
        owner, _, weight = name.rpartition(".")
        parameter = module.get_parameter(name)
        updates[name] = TrainedLora(parameter.shape, rank, parameter.device)
        parametrize.register_parametrization(module.get_submodule(owner), weight, updates[name])
    return updates


class TrainedTokens(nn.Module):
    """Offsets (n, width) to train for rows of a frozen embedding, which adds them from now on.

    What has none of the rows stays as it was, bit for bit. All offsets are part of every result, so that
    several processes find a gradient for each, whatever their batches hold.
    """

    def __init__(self, embedding: nn.Embedding, rows: Sequence[int]) -> None:
        super().__init__()
        self._rows = tuple(rows)
        width, device = embedding.embedding_dim, embedding.weight.device
        self.offsets = nn.Parameter(torch.zeros(len(rows), width, device=device))
        embedding.register_forward_hook(self._add)

    def _add(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found = inputs[0][..., None] == torch.tensor(self._rows, device=output.device)  # (B, L, n)
        moved = output.float() + found.float() @ self.offsets
        return torch.where(found.any(-1, keepdim=True), moved.to(output.dtype), output)
