"""Steps recorded once and replayed: on a GPU, those of small latents are short beside their launches."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Outputs = tuple[Tensor, ...]
# Runs a function and returns how to run it again, from and to the same memory, and its outputs there.
Recorder = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]
RECORDED_PIXELS = 2560**2  # of pictures made at once; with more, steps take longer than their launches
MOST_LOW = 4  # recordings of the low-resolution step: two shapes, with and without the unconditional half
MOST_HIGH = 2  # of others: with and without the unconditional half
FIRST_REPLAYED = 2  # step of a pass: the first is run as it is, the second recorded
T = TypeVar("T")


def cuda_graph(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """A function of tensors on the current GPU as a CUDA graph: how to replay it, and its outputs.

    It must have run before in this thread, so that libraries have made their choices.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    mode = "thread_local"  # others may load meanwhile
    # The outer context ends on today's stream even where the inner one fails at its end.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=stream, capture_error_mode=mode),
    ):
        outputs = function()
    return graph.replay, outputs


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for each GPU: PyTorch's own is of the GPU that recorded first."""
    return torch.cuda.Stream(device)


@dataclass
class Recording:
    """A recorded step: the memory that it reads, how to run it, and where its outputs are then."""

    step: list[Tensor]
    held: list[Tensor]
    replay: Callable[[], None]
    outputs: Outputs
    sources: list[weakref.ref[Tensor]] = field(default_factory=list)  # tensors whose values `held` has

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `held` has the values of these tensors."""
        pairs = zip(self.sources, tensors, strict=False)
        return len(self.sources) == len(tensors) and all(ref() is tensor for ref, tensor in pairs)


class Recordings:
    """Recordings of one pass's step, one per shape of its inputs, kept between pictures.

    They read the weights where these lay: `for_pass` forgets them where the weights have moved since (values
    may change in place, as a LoRA's do), and `clear` must be called before the weights' memory is given back.
    Each has the memory of a step for itself, so that `most` are kept, the last ones used.
    """

    def __init__(self, most: int, recorder: Recorder = cuda_graph) -> None:
        self._most, self._recorder = most, recorder
        self._recordings: dict[tuple, Recording] = {}
        self._seen: set[tuple] = set()
        self._weights: tuple[int, ...] = ()
        self._failed = False

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._recordings)

    def clear(self) -> None:
        """Forget all recordings."""
        self._recordings.clear()
        self._weights = ()

    def for_pass(self, device: torch.device, *networks: nn.Module) -> Recordings | None:
        """These for one pass of networks; None where their weights do not all lie on the device."""
        parameters = [p for network in networks for p in network.parameters()]
        if self._failed or not all(_on(device, p) for p in parameters):
            return None
        weights = tuple(p.data_ptr() for p in parameters)
        if weights != self._weights:
            self.clear()
            self._weights = weights
        return self

    def run(self, function: Callable[[Any, Any], Outputs], step: Any, held: Any) -> Outputs:
        """`function(step, held)`, run as it is for the first inputs of a shape, then by its recording.

        Both are tensors, or dataclasses, lists and tuples of them; `held` is what rarely changes between
        steps. What else is in them counts as a part of the shape. It must always be the same function, and
        the outputs of a recording lie in memory that its next run overwrites.
        """
        tensors = list(_tensors(step)), list(_tensors(held))
        key = tuple((t.shape, t.dtype) for part in tensors for t in part), tuple(_constants((step, held)))
        seen = threading.get_ident(), key  # libraries make their choices in every thread
        if self._failed or seen not in self._seen:
            self._seen.add(seen)
            return function(step, held)
        recording = self._recordings.pop(key, None)
        if recording is None:
            while len(self._recordings) >= self._most:
                del self._recordings[next(iter(self._recordings))]
            try:
                recording = self._record(function, step, held)
            except RuntimeError as error:
                self._failed = True
                warnings.warn(f"steps could not be recorded, and are run one by one: {error}", stacklevel=2)
        if recording is None:  # here, where the error no longer holds what it found
            self.clear()
            return function(step, held)
        self._recordings[key] = recording
        torch._foreach_copy_(recording.step, tensors[0])
        if tensors[1] and not recording.holds(tensors[1]):
            torch._foreach_copy_(recording.held, tensors[1])
            recording.sources = [weakref.ref(tensor) for tensor in tensors[1]]
        recording.replay()
        return recording.outputs

    def _record(self, function: Callable[[Any, Any], Outputs], step: Any, held: Any) -> Recording:
        own = [[t.clone() for t in _tensors(part)] for part in (step, held)]
        inputs = [_with(part, iter(tensors)) for part, tensors in zip((step, held), own, strict=True)]
        device = own[0][0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return Recording(*own, *self._recorder(lambda: function(*inputs)))


@dataclass(frozen=True)
class PassRecordings:
    """Those of the three passes that take steps; None where these are run one by one."""

    low: Recordings | None = None
    high: Recordings | None = None
    stage_b: Recordings | None = None

    @classmethod
    def of_all(cls, recorder: Recorder = cuda_graph) -> PassRecordings:
        """Of all three, without any recording yet."""
        return cls(*(Recordings(most, recorder) for most in (MOST_LOW, MOST_HIGH, MOST_HIGH)))

    @property
    def are_any(self) -> bool:
        """Whether any step is recorded."""
        return any(recordings.count for recordings in self._each)

    def clear(self) -> None:
        """Forget all recordings."""
        for recordings in self._each:
            recordings.clear()

    @property
    def _each(self) -> list[Recordings]:
        return [each for each in (self.low, self.high, self.stage_b) if each is not None]


def _on(device: torch.device, weights: Tensor) -> bool:
    """Whether weights lie on a device, which may be a GPU without a number."""
    return weights.device.type == device.type and device.index in (None, weights.device.index)


# --- tensors of structures ------------------------------------------------------------------------


def _parts(structure: Any) -> list[Any] | None:
    """What a structure is made of; None if it is none."""
    if is_dataclass(structure):
        return [getattr(structure, part.name) for part in fields(structure)]
    return list(structure) if isinstance(structure, list | tuple) else None


def _leaves(structure: Any) -> Iterator[Any]:
    parts = _parts(structure)
    if parts is None:
        yield structure
    for part in parts or ():
        yield from _leaves(part)


def _tensors(structure: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(structure) if isinstance(leaf, Tensor))


def _constants(structure: Any) -> Iterator[Any]:
    """What is no tensor, and which places tensors and networks have."""
    return (type(leaf) if isinstance(leaf, Tensor | nn.Module) else leaf for leaf in _leaves(structure))


def _with(structure: T, tensors: Iterator[Tensor]) -> T:
    """The same structure of other tensors, in the same order."""
    if isinstance(structure, Tensor):
        return next(tensors)
    parts = _parts(structure)
    if parts is None:
        return structure
    made = [_with(part, tensors) for part in parts]
    if is_dataclass(structure):
        return replace(structure, **dict(zip((f.name for f in fields(structure)), made, strict=True)))
    return type(structure)(made)
