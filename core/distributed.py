"""Several processes: what accelerate does not do, sharding the trained weights (FSDP2) and whole states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from modules.blocks import AttnBlock, ResBlock
from modules.unet import CascadeUNet

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def distribute(module: nn.Module, accelerator: Accelerator, shard: bool) -> nn.Module:
    """The module as all processes train it: wrapped for equal copies (DDP), or sharded in place (FSDP2).

    Blocks are sharded one by one, so that one at a time is whole. Weights are gathered in float32 and cast by
    autocast: FSDP's own mixed precision would round the inputs too, and bfloat16 destroys a timestep.
    """
    if not shard or accelerator.num_processes == 1:
        return accelerator.prepare_model(module)
    module.to(accelerator.device)
    plain_forward = module.forward

    def forward(*inputs: Any) -> Any:
        with accelerator.autocast():
            return plain_forward(*inputs)

    module.forward = forward
    for part in module.modules():
        if isinstance(part, ResBlock | AttnBlock):
            fully_shard(part)
    for part in (part for part in module.modules() if isinstance(part, CascadeUNet)):
        fully_shard(part)
    fully_shard(module)
    for part in module.modules():
        for method in ("keys_values", "prepare", "predict", "predict_with_features"):
            if isinstance(part, FSDPModule) and hasattr(part, method):
                register_fsdp_forward_method(part, method)
    return module


@contextmanager
def accumulating(module: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
    """Within it, gradients are summed over the processes only if this is the last micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(module):
            yield


# --- whole tensors of shards ----------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wholes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, on the CPU, detached; every process must ask for them."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in tensors.items()}


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor that may be sharded."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is a shard."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state, whole; every process must ask for it."""
    if is_sharded(module.parameters()):
        return get_optimizer_state_dict(module, optimizer, options=WHOLE)
    return optimizer.state_dict()


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up a state of `optimizer_state`."""
    if is_sharded(module.parameters()):
        set_optimizer_state_dict(module, optimizer, state, options=WHOLE)
    else:
        optimizer.load_state_dict(state)
