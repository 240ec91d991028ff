"""Where weights rest, and how they visit the device: all stay there, a stage at a time, or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from core.config.offloading import AUTO, BLOCK, NONE
from modules.blocks import AttnBlock, ResBlock

M = TypeVar("M", bound=nn.Module)
Load = Callable[[torch.device, bool], M]  # (where the weights will rest, whether NaN is looked for)
Check = Callable[[Mapping[str, Tensor]], None]  # looks for NaN, where the tensors are

HOST = torch.device("cpu")
STREAMED = (ResBlock, AttnBlock)  # they hold nearly all weights of Stages B and C
ENTRIES = ("keys_values", "forward")  # the methods of these that use weights
ALIGNED = 256  # bytes; each tensor of a block begins at a multiple, as torch's own do


@dataclass
class Placement:
    """Where a pipeline's stages rest; auto counts as stage until it is settled."""

    device: torch.device
    mode: str = AUTO

    @property
    def home(self) -> torch.device:
        """Where weights rest."""
        return self.device if self.mode == NONE else HOST


class Offloaded(Generic[M]):
    """A module that is loaded at its first use and lies on the device only within `on_device`.

    Its weights keep their place in CPU memory meanwhile, so leaving the device copies nothing. They must
    not be changed on the device: what is changed there is lost. The mode none leaves them there instead, with
    no copy in CPU memory; the mode block brings the large blocks of Stages B and C one by one. `prepare` is
    called before each use, with the module where it rests.
    """

    def __init__(
        self,
        load: Load[M],
        placement: Placement,
        prepare: Callable[[M], None] | None = None,
        check: Check | None = None,
    ) -> None:
        self._load = load
        self._placement = placement
        self._prepare = prepare
        self._check = check  # what is not yet done of it: on the CPU it would be a pass over all weights
        self._module: M | None = None
        self._ahead: Future[M] | None = None
        self._packed: list[PackedBlock] = []

    @property
    def module(self) -> M:
        """The module where it rests, loaded if need be."""
        if self._module is None:
            ahead, self._ahead = self._ahead, None
            self._module = self._loaded() if ahead is None else ahead.result()
        self.settle()
        if self._prepare is not None:
            self._prepare(self._module)
        return self._module

    def load_ahead(self) -> None:
        """Begin to load it beside what else is done; an error comes out at its use."""
        if self._module is None and self._ahead is None:
            self._ahead = _in_thread(self._loaded)

    def settle(self) -> None:
        """Move the weights to where they rest now."""
        if self._module is not None and self._placement.device.type == "cuda":
            if self._placement.mode == NONE:
                self._packed = []
            self._module.to(self._placement.home)

    @contextmanager
    def on_device(self) -> Iterator[M]:
        """The module, on the device."""
        module, device = self.module, self._placement.device
        blocks = self._blocks(module) if self._placement.mode == BLOCK else []
        if not blocks and (self._placement.mode == NONE or device.type == "cpu"):
            yield module
            return
        with ExitStack() as stack:
            streamed = {tensor for block in blocks for tensor in block.tensors}
            stack.enter_context(_visiting(module, device, streamed))
            if self._check is not None:
                self._check(_on(device, module.state_dict()))
            if blocks:
                stack.enter_context(BlockStream(blocks, device, self._check).in_use())
            else:
                self._check = None
            yield module
        self._check = None

    def _loaded(self) -> M:
        home = self._placement.home
        if home.type == self._placement.device.type:
            self._check = None  # the weights are looked at as they arrive
        return self._load(home, self._check is None)

    def _blocks(self, module: M) -> list[PackedBlock]:
        if not self._packed:
            pinned = self._placement.device.type == "cuda"
            found = [(name, block) for name, block in module.named_modules() if isinstance(block, STREAMED)]
            self._packed = [PackedBlock(name, block, pinned) for name, block in found]
        return self._packed


def _on(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that are on a device."""
    return {name: tensor for name, tensor in tensors.items() if tensor.device.type == device.type}


# --- a stage at a time ----------------------------------------------------------------------------


@contextmanager
def _visiting(module: nn.Module, device: torch.device, without: set[Tensor]) -> Iterator[None]:
    """Within it, the tensors of a module but for those `without` are on the device."""
    homes = [held for held in _tensors(module) if held[2] not in without]
    try:
        for owner, name, tensor in homes:
            setattr(owner, name, _in_place_of(tensor, tensor.detach().to(device, non_blocking=True)))
        yield
    finally:
        for owner, name, tensor in homes:
            setattr(owner, name, tensor)


def _tensors(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """The parameters and buffers of a module, each with its owner and its name there."""
    return [
        (owner, name, tensor)
        for owner in module.modules()
        for held in (owner.named_parameters(recurse=False), owner.named_buffers(recurse=False))
        for name, tensor in held
    ]


def _in_place_of(tensor: Tensor, other: Tensor) -> Tensor:
    """The other tensor as the kind that `tensor` is."""
    return nn.Parameter(other, requires_grad=False) if isinstance(tensor, nn.Parameter) else other


# --- block by block -------------------------------------------------------------------------------


class PackedBlock:
    """A block whose tensors lie in one piece of CPU memory, so that one copy moves them."""

    def __init__(self, name: str, block: nn.Module, pinned: bool) -> None:
        self.name, self.block = name, block
        self._held = _tensors(block)
        self._spans: list[tuple[int, int]] = []  # bytes of each tensor
        end = 0
        for _, _, tensor in self._held:
            self._spans.append((end, end + tensor.nbytes))
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        packed = self.views(self.memory)
        for (owner, name, tensor), view in zip(self._held, packed, strict=True):
            setattr(owner, name, _in_place_of(tensor, view.copy_(tensor)))
        self._held = _tensors(block)

    @property
    def tensors(self) -> list[Tensor]:
        """Where they rest."""
        return [tensor for _, _, tensor in self._held]

    def views(self, memory: Tensor) -> list[Tensor]:
        """The block's tensors in another piece of memory that holds them."""
        return [
            memory[start:end].view(tensor.dtype).view(tensor.shape)
            for (start, end), (_, _, tensor) in zip(self._spans, self._held, strict=True)
        ]

    @contextmanager
    def using(self, views: Sequence[Tensor]) -> Iterator[None]:
        """Within it, the block computes with other tensors than its own."""
        try:
            for (owner, name, tensor), view in zip(self._held, views, strict=True):
                setattr(owner, name, _in_place_of(tensor, view))
            yield
        finally:
            for owner, name, tensor in self._held:
                setattr(owner, name, tensor)


@dataclass
class Place:
    """Memory on the device that holds one block at a time."""

    memory: Tensor
    block: int | None = None
    views: list[Tensor] = field(default_factory=list)
    ready: torch.cuda.Event | None = None  # once the block is there
    free: torch.cuda.Event | None = None  # once what was computed with it is done


class BlockStream:
    """Brings blocks through two places on the device: while one computes, the next one is copied.

    The copies have a CUDA stream of their own; events keep them from overtaking what is computed, and what is
    computed from overtaking them. On the CPU the same is done with plain copies.
    """

    def __init__(
        self, blocks: Sequence[PackedBlock], device: torch.device, check: Check | None = None
    ) -> None:
        self._blocks, self._device = blocks, device
        self._check, self._unchecked = check, {*range(len(blocks))} if check else set()
        largest = max(len(block.memory) for block in blocks)
        self._places = [Place(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(2)]
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._copying is not None:  # the memory may have been in use until now
            self._copying.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, the blocks compute with what is brought."""
        try:
            for number, packed in enumerate(self._blocks):
                for name in _entries(packed.block):
                    method = getattr(packed.block, name)
                    setattr(packed.block, name, partial(self._call, number, name, method))
            yield
        finally:
            for packed in self._blocks:
                for name in _entries(packed.block):
                    delattr(packed.block, name)  # that of its class comes back

    def _call(self, number: int, name: str, method: Callable[..., Any], *given: Any) -> Any:
        place = next((place for place in self._places if place.block == number), None)
        if place is None:
            place = self._places[0]
            self._bring(number, place)
        other = self._places[place is self._places[0]]
        if place.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(place.ready)
        following = self._following(number, name)
        if other.block != following and following != number:
            self._bring(following, other)
        try:
            self._look_for_nan(number, place)
            with self._blocks[number].using(place.views):
                return method(*given)
        finally:
            if self._copying is not None:
                place.free = torch.cuda.current_stream(self._device).record_event()

    def _bring(self, number: int, place: Place) -> None:
        packed = self._blocks[number]
        if place.block != number:
            place.block, place.views = number, packed.views(place.memory)
        goal = place.memory[: len(packed.memory)]
        if self._copying is None:
            goal.copy_(packed.memory)
            return
        if place.free is not None:
            self._copying.wait_event(place.free)
        with torch.cuda.stream(self._copying):
            goal.copy_(packed.memory, non_blocking=True)
        place.ready = self._copying.record_event()

    def _look_for_nan(self, number: int, place: Place) -> None:
        if number in self._unchecked:
            self._unchecked.remove(number)
            name = self._blocks[number].name
            self._check({f"{name}.{part}": view for part, view in enumerate(place.views)})

    def _following(self, number: int, name: str) -> int:
        """The block that is likely to be asked next for the same: a wrong guess costs time alone."""
        count = len(self._blocks)
        later = ((number + step) % count for step in range(1, count + 1))
        return next(other for other in later if hasattr(self._blocks[other].block, name))


def _entries(block: nn.Module) -> list[str]:
    return [name for name in ENTRIES if hasattr(block, name)]


def _in_thread(work: Callable[[], M]) -> Future[M]:
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loading")
    try:
        return pool.submit(work)
    finally:
        pool.shutdown(wait=False)
