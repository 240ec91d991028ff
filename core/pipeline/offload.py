"""Where weights rest, and how they visit the device: all stay there, a stage at a time, or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from core.config.offloading import AUTO, BLOCK, NONE
from core.memory import host_memory
from modules.blocks import AttnBlock, ResBlock

M = TypeVar("M", bound=nn.Module)
Load = Callable[[torch.device, bool], M]  # (where the weights will rest, whether NaN is looked for)
Check = Callable[[Mapping[str, Tensor]], None]  # looks for NaN, where the tensors are

HOST = torch.device("cpu")
STREAMED = (ResBlock, AttnBlock)  # they hold nearly all weights of Stages B and C
ENTRIES = ("keys_values", "forward")  # the methods of these that use weights
INT8_MAX, TINY = 127, 1e-30  # of rows that are all zeros the scale is any
ALIGNED = 256  # bytes; each tensor of a block begins at a multiple, as torch's own do
PIECE = 1 << 29  # bytes of system memory that several blocks share, at most


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
    called before each use, with the module where it rests. With `int8` the large blocks rest as 8-bit
    integers, in any mode, and are opened one by one.
    """

    def __init__(
        self,
        load: Load[M],
        placement: Placement,
        prepare: Callable[[M], None] | None = None,
        check: Check | None = None,
        int8: bool = False,
    ) -> None:
        self._load = load
        self._int8 = int8
        self._placement = placement
        self._prepare = prepare
        self._check = check  # what is not yet done of it: on the CPU it would be a pass over all weights
        self._module: M | None = None
        self._ahead: Future[M] | None = None
        self._packed: list[PackedBlock] = []
        self._away = False  # its tensors are on the device for a while

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

    def load_ahead(self, warm: Callable[[M], object] | None = None) -> None:
        """Begin to load it beside what else is done; an error comes out at its use.

        Where it stays on a GPU, `warm` then computes something small, so that its kernels are ready too.
        """
        if self._module is None and self._ahead is None:
            on_gpu = self._placement.home.type == "cuda"
            current = torch.cuda.current_device() if on_gpu else None  # which threads do not share
            self._ahead = _in_thread(lambda: self._loaded_and_warmed(warm, current))

    def forget(self) -> None:
        """Let the module go: it is loaded anew at its next use."""
        self._module, self._ahead, self._packed = None, None, []

    def settle(self) -> None:
        """Move the weights, also those that are being loaded, to where they rest now."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            with suppress(Exception):  # it is loaded anew at its use
                self._module = ahead.result()
        if self._module is None or self._away or self._placement.device.type != "cuda":
            return
        if self._int8 and not self._packed:  # they are packed first, and go there smaller
            return
        home = self._placement.home
        for owner, name, tensor in _tensors(self._module):
            if tensor.device.type not in (home.type, "meta"):
                setattr(owner, name, _in_place_of(tensor, tensor.detach().to(home)))
        if self._placement.mode == NONE and not self._int8:
            self._packed = []
        for packed in self._packed:
            packed.memory = packed.memory.to(home)

    @contextmanager
    def on_device(self) -> Iterator[M]:
        """The module, on the device."""
        module, device, mode = self.module, self._placement.device, self._placement.mode
        blocks = self._blocks(module) if mode == BLOCK or self._int8 else []
        if not blocks and (mode == NONE or device.type == "cpu"):
            yield module
            return
        with ExitStack() as stack:
            streamed = {tensor for block in blocks for tensor in block.tensors}
            self._away = True
            stack.callback(setattr, self, "_away", False)
            stack.enter_context(_visiting(module, device, streamed))
            if self._check is not None:
                self._check(_on(device, module.state_dict()))
            if blocks and mode == BLOCK:
                stack.enter_context(BlockStream(blocks, device, self._check).in_use())
            elif blocks:
                stack.enter_context(opened(blocks, device))
            yield module
        self._check = None

    def _loaded(self) -> M:
        home = HOST if self._int8 else self._placement.home
        if home.type == self._placement.device.type or self._int8:
            self._check = None  # the weights are looked at as they arrive
        return self._load(home, self._check is None)

    def _loaded_and_warmed(self, warm: Callable[[M], object] | None, current: int | None) -> M:
        home = self._placement.home
        if current is None or home.type != "cuda":
            return self._loaded()
        with torch.cuda.device(current):
            stream = torch.cuda.Stream(home)  # not to wait for what is computed meanwhile
        with torch.cuda.device(current), torch.cuda.stream(stream):
            module = self._loaded()
            if warm is not None and not self._int8:
                # What goes wrong here is no reason to make no picture.
                with torch.no_grad(), suppress(RuntimeError, ValueError):
                    warm(module)
        stream.synchronize()
        return module

    def _blocks(self, module: M) -> list[PackedBlock]:
        if not self._packed:
            found = [(name, block) for name, block in module.named_modules() if isinstance(block, STREAMED)]
            packed = [PackedBlock(name, block, self._int8) for name, block in found]
            stays = self._placement.mode == NONE
            pack(packed, pinned=self._placement.device.type == "cuda" and not stays)
            self._packed = packed
            self.settle()
        return self._packed


def _on(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that are on a device."""
    return {name: tensor for name, tensor in tensors.items() if tensor.device.type == device.type}


# --- a stage at a time ----------------------------------------------------------------------------


@contextmanager
def _visiting(module: nn.Module, device: torch.device, without: set[Tensor]) -> Iterator[None]:
    """Within it, the tensors of a module but for those `without` are on the device."""
    homes = [held for held in _tensors(module) if held[2] not in without]
    on_cuda = device.type == "cuda"
    try:
        for owner, name, tensor in homes:
            setattr(owner, name, _in_place_of(tensor, tensor.detach().to(device, non_blocking=on_cuda)))
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
    """A block whose tensors lie in one piece of memory, so that one copy moves them.

    `rest_in` puts them there. With `int8` its matrices are 8-bit integers there, with a scale for each row,
    and have no other place.
    """

    memory: Tensor

    def __init__(self, name: str, block: nn.Module, int8: bool = False) -> None:
        self.name, self.block, self._int8 = name, block, int8
        self._held = _tensors(block)
        self._parts: list[tuple[int, torch.dtype, torch.Size]] = []  # where each begins
        self.size = 0  # bytes
        for _, _, tensor in self._held:
            for dtype, shape in self._kinds(tensor):
                self._parts.append((self.size, dtype, shape))
                self.size += -(-dtype.itemsize * shape.numel() // ALIGNED) * ALIGNED

    def rest_in(self, memory: Tensor) -> None:
        """Copy the tensors into memory of `size` bytes, where they rest from now on."""
        self.memory = memory
        views = self._views(memory)
        stored = (part for _, _, tensor in self._held for part in self._stored(tensor.detach()))
        for view, part in zip(views, stored, strict=True):
            view.copy_(part)
        rests = [tensor.detach().to("meta") for _, _, tensor in self._held] if self._int8 else views
        for (owner, own_name, tensor), rest in zip(self._held, rests, strict=True):
            setattr(owner, own_name, _in_place_of(tensor, rest))
        self._held = _tensors(self.block)

    @property
    def tensors(self) -> list[Tensor]:
        """Where they rest; without content with `int8`."""
        return [tensor for _, _, tensor in self._held]

    def open(self, memory: Tensor) -> list[Tensor]:
        """The block's tensors from a piece of memory that holds what `memory` does."""
        parts = iter(self._views(memory))
        return [self._opened(next(parts), tensor.dtype, parts) for tensor in self.tensors]

    def _kinds(self, tensor: Tensor) -> list[tuple[torch.dtype, torch.Size]]:
        """Of the parts that are stored of a tensor."""
        if not self._int8 or tensor.dim() < 2:
            return [(tensor.dtype, tensor.shape)]
        return [(torch.int8, tensor.shape), (torch.float32, torch.Size((len(tensor), 1)))]

    def _stored(self, tensor: Tensor) -> list[Tensor]:
        if not self._int8 or tensor.dim() < 2:
            return [tensor]
        rows = tensor.float().flatten(1)
        scales = rows.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / INT8_MAX  # (rows, 1)
        return [(rows / scales).round().to(torch.int8).view(tensor.shape), scales]

    def _opened(self, stored: Tensor, dtype: torch.dtype, parts: Iterator[Tensor]) -> Tensor:
        if stored.dtype != torch.int8:
            return stored
        return (stored.flatten(1) * next(parts)).to(dtype).view(stored.shape)

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[start : start + dtype.itemsize * shape.numel()].view(dtype).view(shape)
            for start, dtype, shape in self._parts
        ]

    @contextmanager
    def using(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within it, the block computes with other tensors than its own."""
        try:
            for (owner, name, tensor), other in zip(self._held, tensors, strict=True):
                setattr(owner, name, _in_place_of(tensor, other))
            yield
        finally:
            for owner, name, tensor in self._held:
                setattr(owner, name, tensor)


def pack(blocks: Sequence[PackedBlock], pinned: bool) -> None:
    """Give blocks their memory, several of them a piece.

    torch rounds pinned memory up to a power of two bytes: for blocks of a little over 64 MiB, as Stage C's
    are, one by one that would be nearly twice as much.
    """
    together: list[PackedBlock] = []
    for number, block in enumerate(blocks):
        together.append(block)
        size = sum(one.size for one in together)
        if number + 1 == len(blocks) or size + blocks[number + 1].size > PIECE:
            piece = host_memory((size,), torch.uint8, pinned)
            for one, memory in zip(together, piece.split([one.size for one in together]), strict=True):
                one.rest_in(memory)
            together = []


# (number of a block, a method's name, the method, its arguments) -> what that returns
Call = Callable[..., Any]


@contextmanager
def _calling(blocks: Sequence[PackedBlock], call: Call) -> Iterator[None]:
    """Within it, `call` stands before the methods of blocks that use weights."""
    try:
        for number, packed in enumerate(blocks):
            for name in _entries(packed.block):
                setattr(packed.block, name, partial(call, number, name, getattr(packed.block, name)))
        yield
    finally:
        for packed in blocks:
            for name in _entries(packed.block):
                vars(packed.block).pop(name, None)  # that of its class comes back


@contextmanager
def opened(blocks: Sequence[PackedBlock], device: torch.device) -> Iterator[None]:
    """Within it, all blocks are on the device as they are packed, and each is opened for its use."""
    there = [packed.memory.to(device, non_blocking=device.type == "cuda") for packed in blocks]

    def call(number: int, _name: str, method: Callable[..., Any], *given: Any) -> Any:
        with blocks[number].using(blocks[number].open(there[number])):
            return method(*given)

    with _calling(blocks, call):
        yield


@dataclass
class Place:
    """Memory on the device that holds one block at a time."""

    memory: Tensor
    block: int | None = None
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
            with _calling(self._blocks, self._call):
                yield
        finally:  # the places go, and what is still copied to them must not meet what comes after them
            if self._copying is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._copying)

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
            tensors = self._blocks[number].open(place.memory)
            self._look_for_nan(number, tensors)
            with self._blocks[number].using(tensors):
                return method(*given)
        finally:
            if self._copying is not None:
                place.free = torch.cuda.current_stream(self._device).record_event()

    def _bring(self, number: int, place: Place) -> None:
        packed = self._blocks[number]
        place.block = number
        goal = place.memory[: len(packed.memory)]
        if self._copying is None:
            goal.copy_(packed.memory)
            return
        if place.free is not None:
            self._copying.wait_event(place.free)
        with torch.cuda.stream(self._copying):
            goal.copy_(packed.memory, non_blocking=True)
        place.ready = self._copying.record_event()

    def _look_for_nan(self, number: int, tensors: Sequence[Tensor]) -> None:
        if number in self._unchecked:
            self._unchecked.remove(number)
            name = self._blocks[number].name
            self._check({f"{name}.{part}": view for part, view in enumerate(tensors)})

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
