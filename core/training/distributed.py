"""Several processes: what accelerate does not do, sharding the trained weights (FSDP2) and whole states."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from core import launch
from modules.blocks import AttnBlock, ResBlock
from modules.unet import CascadeUNet

# That processes wait for each other at most: one may read and cache its data for long while others are done.
PATIENCE = timedelta(hours=3)
WAY_OUT = "start them with torchrun, or unset WORLD_SIZE to train in one"
WAYS = {"fused", "foreach"}  # in which an optimiser computes the same
# Methods that use weights.
BESIDE_FORWARD = ("keys_values", "pass_times", "prepare", "predict", "predict_with_features")


def ignore_accelerate_variables() -> None:
    """Forget what the environment would set in accelerate, such as a number of micro-batches by which it
    divides losses: how a training goes, its configuration says. Call it before an Accelerator is made.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def join(**settings: Any) -> Accelerator:
    """accelerate's handle on all processes that were started together, on their GPUs or the CPU.

    `settings` are further ones of it. ValueError where fewer processes come together than were started, since
    each of them would train on its own, into the same folder.
    """
    started, gpus = launch.processes(), torch.accelerator.device_count()
    if started > 1 and "RANK" not in os.environ:
        raise ValueError(f"the environment speaks of {started} processes, but not of RANK: {WAY_OUT}")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    tasks = launch.tasks_of_srun()
    if tasks > 1 and not launch.is_launched():
        raise ValueError(
            f"srun started {tasks} processes that do not know of each other: put torchrun between srun and "
            "the script (docs/training.md), or start one task"
        )
    if 0 < gpus < here:
        raise ValueError(f"{here} processes were started on a machine with {gpus} GPUs: start {gpus} of them")
    try:
        handlers = [InitProcessGroupKwargs(timeout=PATIENCE)]
        accelerator = Accelerator(cpu=gpus == 0, kwargs_handlers=handlers, **settings)
    except torch.distributed.DistError as error:
        raise ValueError(f"{started} processes could not be joined: {str(error).splitlines()[0]}") from None
    if accelerator.num_processes != started:
        joined = accelerator.num_processes
        raise ValueError(f"the environment speaks of {started} processes, of which {joined} met: {WAY_OUT}")
    return accelerator


def distribute(
    module: nn.Module, accelerator: Accelerator, shard: bool, some_unused: bool = False
) -> nn.Module:
    """The module as all processes train it: wrapped for equal copies (DDP), or sharded in place (FSDP2).

    `some_unused`: parameters are, in some updates, so that DDP must not wait for their gradients. Blocks are
    sharded one by one, so that one at a time is whole. Weights are gathered in float32 and cast by autocast:
    FSDP's own mixed precision would round the inputs too, and bfloat16 destroys a timestep.
    """
    if not shard or accelerator.num_processes == 1:
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=some_unused,
            gradient_as_bucket_view=True,  # instead of a second copy of all gradients
        )
        return accelerator.prepare_model(module)
    module.to(accelerator.device)
    plain_forward = module.forward

    def forward(*inputs: Any) -> Any:
        with accelerator.autocast():
            return plain_forward(*inputs)

    module.forward = forward
    parts = list(module.modules())
    units = [part for part in parts if isinstance(part, ResBlock | AttnBlock)]
    units += [part for part in parts if isinstance(part, CascadeUNet) and part is not module]
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for unit in (*units, module):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        for method in BESIDE_FORWARD:
            if hasattr(unit, method):
                register_fsdp_forward_method(unit, method)
    return module


@contextmanager
def accumulating(module: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
    """Within it, gradients are summed over the processes only if this is the last micro-batch.

    Where they are sharded they are always summed, as they would be whole in every process until then.
    """
    if last or isinstance(module, FSDPModule):
        yield
    else:
        with accelerator.no_sync(module):
            yield


# --- whole tensors of shards ----------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copied(tensor: Tensor, kept: bool) -> Tensor | None:
    """A copy of the whole of a tensor on the CPU, or None where not `kept`; every process must ask for it."""
    value = whole(tensor.detach())
    return value.to("cpu", copy=True) if kept else None


def wholes(tensors: Mapping[str, Tensor], kept: bool = True) -> dict[str, Tensor | None]:
    """The same of each of the tensors, one after the other, so that one at a time is whole on a GPU."""
    return {name: copied(tensor, kept) for name, tensor in tensors.items()}


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor that may be sharded."""
    tensor.copy_(as_shard(value, tensor) if isinstance(tensor, DTensor) else value)


def as_shard(value: Tensor, like: DTensor) -> DTensor:
    """A whole value, sharded as another tensor is."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is a shard."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def optimizer_state(optimizer: torch.optim.Optimizer, kept: bool = True) -> dict[str, Any]:
    """The optimiser's state, with its tensors as of `copied`; every process must ask for it."""
    state = optimizer.state_dict()
    copy = partial(copied, kept=kept)
    return {**state, "state": {number: _each(copy, entry) for number, entry in state["state"].items()}}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up a state of `optimizer_state`, whether it was sharded or not.

    How the optimiser computes stays as it is. ValueError where the state is of another kind of optimiser.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(tensor: Tensor, parameter: Tensor) -> Tensor:
        sharded = isinstance(parameter, DTensor) and tensor.shape == parameter.shape
        return as_shard(tensor, parameter) if sharded else tensor

    entries = {n: _each(partial(part, parameter=parameters[n]), e) for n, e in state["state"].items()}
    plain = isinstance(optimizer, torch.optim.AdamW)
    if any(("exp_avg" in entry) != plain for entry in entries.values()):
        raise ValueError("its state is of another kind of optimiser")
    groups = [
        {**group, **{way: own[way] for way in WAYS & own.keys()}}
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _each(change: Callable[[Tensor], Tensor], entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a state with its tensors changed."""
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
