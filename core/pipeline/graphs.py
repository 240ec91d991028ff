"""Low-resolution steps recorded once and replayed: on a GPU they are short beside their launches."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.guidance import GuidanceFeatures
from modules.stage_c import StageC, StageCConditions
from modules.unet import Times

Outputs = tuple[Tensor, ...]
# Runs a function and returns how to run it again, from and to the same memory, and its outputs there.
Recorder = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]
WARM_UPS = 2  # runs before a recording, so that libraries have made their choices
Control = Sequence[Tensor | None] | None


def cuda_graph(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """A function of tensors on the current GPU as a CUDA graph: how to replay it, and its outputs."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may load meanwhile
        outputs = function()
    return graph.replay, outputs


@dataclass
class Recording:
    """A recorded step: the memory that it reads, how to run it, and where its outputs are then."""

    step: list[Tensor]  # the latent and what depends on its time
    held: list[Tensor]  # of the prompt and of a control
    replay: Callable[[], None]
    outputs: Outputs
    # What is in `held`: conditions of a picture, and entries of its controls.
    sources: tuple[weakref.ref[StageCConditions] | weakref.ref[Tensor], ...] = ()

    def holds(self, sources: Sequence[object]) -> bool:
        """Whether `held` has the values of these objects."""
        pairs = zip(self.sources, sources, strict=False)
        return len(self.sources) == len(sources) and all(ref() is source for ref, source in pairs)


class LowPassGraphs:
    """Recordings of Stage C's low-resolution step, one per shape of its inputs, kept between pictures.

    They read the weights where these lay: `for_pass` forgets them where the weights have moved since (values
    may change in place, as a LoRA's do), and `clear` must be called before the weights' memory is given back.
    """

    def __init__(self, recorder: Recorder = cuda_graph) -> None:
        self._recorder = recorder
        self._recordings: dict[tuple, Recording] = {}
        self._weights: tuple[int, ...] = ()
        self._failed = False

    def clear(self) -> None:
        """Forget all recordings."""
        self._recordings.clear()
        self._weights = ()

    def for_pass(self, stage_c: StageC, device: torch.device) -> LowPassGraphs | None:
        """These for one pass; None where its weights do not all lie on the device."""
        parameters = list(stage_c.parameters())
        if self._failed or not all(_on(device, p) for p in parameters):
            return None
        weights = tuple(p.data_ptr() for p in parameters)
        if weights != self._weights:
            self.clear()
            self._weights = weights
        return self

    def step(
        self, stage_c: StageC, x: Tensor, time: Times, conditions: StageCConditions, control: Control
    ) -> tuple[Tensor, GuidanceFeatures]:
        """`StageC.predict_with_features` by its recording, which is made where there is none yet.

        The features lie in memory that the next step overwrites.
        """
        step, held = [x, time.embed, *_modulations(time)], _held(conditions, control)
        key = tuple((t.shape, t.dtype) for t in (*step, *held)), _places(control)
        if key not in self._recordings:
            try:
                self._recordings[key] = self._record(stage_c, step, held, time, conditions, control)
            except RuntimeError as error:
                self._failed = True
                warnings.warn(f"steps could not be recorded, and are run one by one: {error}", stacklevel=2)
                return stage_c.predict_with_features(x, time, conditions, control=control)
        recording = self._recordings[key]
        torch._foreach_copy_(recording.step, step)
        sources = (conditions, *(entry for entry in control or () if entry is not None))
        if not recording.holds(sources):
            torch._foreach_copy_(recording.held, held)
            recording.sources = tuple(map(weakref.ref, sources))
        recording.replay()
        prediction, *maps = recording.outputs
        return prediction.clone(), GuidanceFeatures(tuple(maps))

    def _record(self, stage_c, step, held, time: Times, conditions: StageCConditions, control: Control):
        step, held = ([t.clone() for t in tensors] for tensors in (step, held))
        x, own_time = step[0], _times_of(step[1:], time)
        own_conditions, own_control = _conditions_of(held, conditions, control)

        def function() -> Outputs:
            prediction, features = stage_c.predict_with_features(
                x, own_time, own_conditions, control=own_control
            )
            return prediction, *features.maps

        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return Recording(step, held, *self._recorder(function))


def _on(device: torch.device, weights: Tensor) -> bool:
    """Whether weights lie on a device, which may be a GPU without a number."""
    return weights.device.type == device.type and device.index in (None, weights.device.index)


# --- tensors of structures, and back --------------------------------------------------------------


def _modulations(time: Times) -> list[Tensor]:
    return [t for level in time.modulations or () for pair in level if pair is not None for t in pair]


def _times_of(tensors: Sequence[Tensor], like: Times) -> Times:
    """The times whose tensors these are, in the order embed, modulations."""
    embed, *rest = tensors
    parts = iter(rest)
    levels = [
        [None if pair is None else (next(parts), next(parts)) for pair in level]
        for level in like.modulations or ()
    ]
    return Times(embed, levels or None)


def _places(control: Control) -> tuple[bool, ...]:
    return tuple(entry is not None for entry in control or ())


def _held(conditions: StageCConditions, control: Control) -> list[Tensor]:
    pairs = [kv for level in conditions.keys_values for kv in level if kv is not None]
    return [t for kv in pairs for t in kv] + [entry for entry in control or () if entry is not None]


def _conditions_of(
    tensors: Sequence[Tensor], conditions: StageCConditions, control: Control
) -> tuple[StageCConditions, Control]:
    """The conditions and control whose tensors these are, in the order of `_held`."""
    parts = iter(tensors)
    levels = [
        [None if kv is None else (next(parts), next(parts)) for kv in level]
        for level in conditions.keys_values
    ]
    entries = None if control is None else [None if entry is None else next(parts) for entry in control]
    return StageCConditions(levels), entries
