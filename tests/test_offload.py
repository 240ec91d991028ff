"""Where weights rest: every mode makes the same picture, and where memory is full the next one goes on."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_graphs import Recorder
from torch import Tensor, nn

import core.pipeline.batches
import core.pipeline.stages
from core.commands.flags import picture_parser
from core.commands.report import describe_plan
from core.config.offloading import MODES, NONE, STAGE, offload_named
from core.config.schema import LatentGeometry, stage_c_sizes
from core.config.settings import Job, Settings
from core.memory import free_memory
from core.pipeline import offload
from core.pipeline.control import Control
from core.pipeline.entries import Entries
from core.pipeline.estimate import (
    GIB,
    StageEstimate,
    best_mode,
    fitting_tile,
    stage_a_activations,
    taken,
)
from core.pipeline.graphs import PassRecordings
from core.pipeline.offload import BlockStream, Offloaded, PackedBlock, Placement, pack
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import plan
from core.weights.checkpoint import CheckpointError
from core.weights.lora.files import LoraFile
from core.weights.lora.merging import WeightedLora
from modules.blocks import AttnBlock, ResBlock
from modules.fp8 import replaced_layers
from modules.lora import LoraUpdate
from modules.stage_a import StageA

sys.path.insert(0, str(ROOT / "benchmarks"))
from training_memory import LiveBytes  # noqa: E402

CPU = torch.device("cpu")
QUICK = Settings(steps=2, steps_b=2)
JOBS = [Job("a fox", 96, 64, seed) for seed in range(2)]


def pipeline_of(folder: Path, offload: str = "auto", **named: object) -> UltraPixelPipeline:
    return UltraPixelPipeline.from_config(
        folder / "stage_c.yaml", folder / "stage_b.yaml", folder / "ultrapixel_t2i.safetensors", "cpu",
        offload=offload, **named,
    )  # fmt: skip


def pixels(pipeline: UltraPixelPipeline, controls: tuple[Control, ...] = ()) -> list[Tensor]:
    return [picture.pixels for picture in pipeline.run(JOBS, QUICK, controls=controls)]


def packed_blocks(blocks: Iterable[nn.Module], int8: bool = False) -> list[PackedBlock]:
    packed = [PackedBlock(str(number), block, int8) for number, block in enumerate(blocks)]
    pack(packed, pinned=False)
    return packed


@pytest.fixture(scope="module")
def expected(family_folder: Path) -> list[Tensor]:
    return pixels(pipeline_of(family_folder, "none"))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- the modes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_the_same_pictures(family_folder: Path, expected: list[Tensor], mode: str) -> None:
    pipeline = pipeline_of(family_folder, mode)
    assert same(pixels(pipeline), expected)
    assert same(pixels(pipeline), expected)  # again, with what the first run left
    assert pipeline.offload == mode


def test_blocks_are_brought_one_ahead_of_their_use(
    family_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought, used = [], []
    bring, call = BlockStream._bring, BlockStream._call

    def seen(self: BlockStream, number: int, place: object) -> None:
        brought.append(number)
        bring(self, number, place)

    def asked(self: BlockStream, number: int, name: str, *rest: object) -> object:
        assert len([place for place in self._places if place.memory is not None]) == 2
        used.append((number, any(place.block == number for place in self._places)))
        return call(self, number, name, *rest)

    monkeypatch.setattr(BlockStream, "_bring", seen)
    monkeypatch.setattr(BlockStream, "_call", asked)
    pixels(pipeline_of(family_folder, "block"))
    ready = sum(there for _, there in used)
    assert len(used) > 50 and ready > 0.8 * len(used)
    assert {number for number, _ in used} <= set(brought)


def test_a_blocks_weights_are_held_once(family_folder: Path) -> None:
    stage_c = pipeline_of(family_folder, "block").stage_c
    with stage_c.on_device() as module:
        blocks = [block for block in module.modules() if isinstance(block, ResBlock | AttnBlock)]
        pieces = {block.memory.untyped_storage().data_ptr() for block in stage_c._packed}
        assert len(pieces) == 1 and len(stage_c._packed) == len(blocks)
        for block, packed in zip(blocks, stage_c._packed, strict=True):
            first, end = packed.memory.data_ptr(), packed.memory.data_ptr() + packed.size
            assert all(first <= p.data_ptr() < end for p in block.parameters())
    assert all("forward" not in vars(block) for block in blocks)


@pytest.mark.parametrize("int8", [False, True])
def test_blocks_share_pieces_of_memory_and_keep_their_values(
    monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    blocks = [ResBlock(width) for width in (8, 8, 8, 64, 8, 8)]
    before = [[p.detach().clone() for p in block.parameters()] for block in blocks]
    small, large = (PackedBlock("x", ResBlock(width), int8).size for width in (8, 64))
    monkeypatch.setattr(offload, "PIECE", 2 * small)
    assert large > 2 * small  # it has a piece of its own
    packed = packed_blocks(blocks, int8)
    pieces = [block.memory.untyped_storage().nbytes() for block in packed]
    assert pieces == [2 * small, 2 * small, small, large, 2 * small, 2 * small]
    for block, own in zip(packed, before, strict=True):
        for opened, tensor in zip(block.open(block.memory), own, strict=True):
            torch.testing.assert_close(opened, tensor, rtol=0, atol=0.01 if int8 else 0)


def test_blocks_rest_in_usual_memory_where_no_more_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def limited(*given: object, pin_memory: bool = False, **named: object) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nand much more")
        return empty(*given, **named)

    monkeypatch.setattr(torch, "empty", limited)
    packed = [PackedBlock("x", ResBlock(8))]
    with pytest.warns(UserWarning, match=r"pins no more memory.*slower: CUDA error: out of memory$"):
        pack(packed, pinned=True)
    assert len(packed[0].memory) == packed[0].size


def test_blocks_are_their_own_again_after_an_error() -> None:
    block = ResBlock(8)
    (packed,) = packed_blocks([block])
    before = [p.data_ptr() for p in block.parameters()]
    with pytest.raises(RuntimeError), BlockStream([packed], CPU).in_use():
        block(torch.ones(1, 9, 4, 4))
    assert [p.data_ptr() for p in block.parameters()] == before and "forward" not in vars(block)


class FakeStream:
    """A CUDA stream that only notes what waits for what."""

    def __init__(self, waited: list) -> None:
        self.waited = waited

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    def record_event(self) -> object:
        return object()

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


def test_copies_and_computing_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    computing, copying = FakeStream([]), FakeStream([])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    blocks = nn.ModuleList(ResBlock(4) for _ in range(3))
    stream = BlockStream(packed_blocks(blocks), CPU)
    stream._copying = copying
    bring, x = stream._bring, torch.ones(1, 4, 3, 3)

    def watched(number: int, place: object) -> None:
        used = place.free
        bring(number, place)
        assert used is None or copying.waited[-1] is used  # what was computed there is done

    stream._bring = watched
    with stream.in_use():
        for block in (*blocks, *blocks):
            block(x)
            (place,) = (p for p in stream._places if stream._blocks[p.block].block is block)
            assert place.ready in computing.waited and place.free is not None
    assert len(copying.waited) == 5 and computing.waited[-1] is copying  # nothing is under way at the end


def test_control_and_guidance_are_the_same_block_by_block(family_folder: Path) -> None:
    made = []
    for mode in ("none", "block"):
        pipeline = pipeline_of(family_folder, mode)
        entries = [torch.ones(1, pipeline.stage_c.module.down_blocks[0][0].depthwise.in_channels, 4, 4)]
        pipeline.run_controlnet = lambda _, entries=entries: [[Entries(entries)]] * 2
        made.append(pixels(pipeline))
    assert same(*made)


def test_resident_is_another_name_of_none(family_folder: Path) -> None:
    assert pipeline_of(family_folder, resident=True).offload == "none"
    parse = picture_parser("x").parse_args
    assert parse(["--resident"]).offload == parse(["--offload", "none"]).offload == "none"
    assert parse([]).offload == "auto"


@pytest.mark.parametrize(
    ("given", "part"),
    [({"offload": "disk"}, "auto, none, stage, block, not 'disk'"),
     ({"offload": "block", "resident": True}, "'block': use one")],
)  # fmt: skip
def test_an_unknown_mode_is_told(family_folder: Path, given: dict, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        pipeline_of(family_folder, **given)
    with pytest.raises(ValueError, match=part):
        offload_named(given["offload"], given.get("resident", False))


# --- memory is full -------------------------------------------------------------------------------


def once(work: Callable, at: int = 1) -> Callable:
    """The function, but that its call number `at` finds the memory full."""
    calls = []

    def full(*args: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return work(*args, **named)

    return full


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("stage", ["low_resolution_pass", "high_resolution_pass", "stage_b_pass"])
def test_a_full_memory_costs_no_picture(
    family_folder: Path, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    work = getattr(core.pipeline.batches, stage)
    monkeypatch.setattr(core.pipeline.batches, stage, once(work, at))
    pipeline = pipeline_of(family_folder, "stage")
    with pytest.warns(UserWarning, match="memory is full in stage [BC]: it goes on with --offload block"):
        assert same(pixels(pipeline), expected)
    assert pipeline.offload == "block"


def test_modes_follow_each_other_until_none_is_left(
    family_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(core.pipeline.batches, "stage_b_pass", full)
    pipeline = pipeline_of(family_folder, "none")
    with pytest.warns(UserWarning) as told, pytest.raises(torch.OutOfMemoryError):
        pixels(pipeline)
    assert [str(w.message).rpartition(" ")[2] for w in told] == ["stage", "block"]


def test_a_full_memory_in_stage_a_makes_its_tiles_smaller(
    family_folder: Path, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles, decode = [], core.pipeline.stages.decode_picture
    broken = once(decode)

    def seen(*args: object) -> Tensor:
        tiles.append(args[4])
        return broken(*args)

    monkeypatch.setattr(core.pipeline.stages, "decode_picture", seen)
    with pytest.warns(UserWarning, match="memory is full in stage A: it goes on with tiles of 128"):
        assert same(pixels(pipeline_of(family_folder)), expected)
    assert tiles == [None, 128, 128]


@pytest.mark.parametrize("mode", ["none", "stage"])
def test_where_memory_is_full_recordings_go_first(
    family_folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    settings = replace(QUICK, steps_b=3)
    wanted = pipeline_of(family_folder).run(JOBS, settings)
    work = core.pipeline.batches.stage_b_pass
    monkeypatch.setattr(core.pipeline.stages, "of_nvidia", lambda _: True)
    pipeline = pipeline_of(family_folder, mode)
    pipeline._kept = PassRecordings.of_all(Recorder())
    # Stage B's steps are recorded in the first picture's pass, and the second one's finds the memory full.
    monkeypatch.setattr(core.pipeline.batches, "stage_b_pass", once(work, 2))
    with pytest.warns(UserWarning, match="full in stage B: it goes on with steps that are not recorded"):
        made = pipeline.run(JOBS, settings)
    assert pipeline.offload == mode and pipeline._kept == PassRecordings()
    assert same([picture.pixels for picture in made], [picture.pixels for picture in wanted])


def test_what_is_loaded_ahead_goes_too_where_memory_is_full() -> None:
    offloaded = Offloaded(lambda home, _: nn.Linear(2, 2, device=home), Placement(CPU))
    offloaded.load_ahead()
    loaded = offloaded._ahead.result()
    offloaded.settle()
    assert offloaded._ahead is None and offloaded.module is loaded
    broken = Offloaded(broken_file, Placement(CPU))
    broken.load_ahead()
    broken.settle()
    with pytest.raises(CheckpointError, match="b.safetensors is damaged"):
        _ = broken.module


def test_memory_that_recordings_keep_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(device: int, pool: tuple[int, int]) -> dict:
        return {"device": device, "segment_pool_id": pool, "total_size": 100, "allocated_size": 30}

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    segments = [segment(0, (0, 0)), segment(0, (0, 0)), segment(0, (0, 3)), segment(1, (0, 0))]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [free_memory(torch.device(name)) for name in ("cuda:0", "cuda")] == [1140, 1070]
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")  # tells no segments
    monkeypatch.setattr(torch.cuda, "memory_snapshot", None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    assert free_memory(torch.device("cuda:0")) == 1200


def test_a_full_memory_while_texts_are_read_costs_nothing(
    family_folder: Path, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(family_folder, "none")
    monkeypatch.setattr(pipeline, "_encode", once(pipeline._encode))
    with pytest.warns(UserWarning, match="memory is full in text: it goes on with --offload stage"):
        assert same(pixels(pipeline), expected)


def test_recorded_steps_go_first_where_memory_is_full(
    family_folder: Path, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, recorder = pipeline_of(family_folder, "none"), Recorder()
    pipeline._kept = PassRecordings.of_all(recorder)
    monkeypatch.setattr(pipeline, "_recordings", lambda: contextlib.nullcontext(pipeline._kept))
    monkeypatch.setattr(core.pipeline.batches, "stage_b_pass", once(core.pipeline.batches.stage_b_pass))
    with pytest.warns(UserWarning, match="memory is full in stage B: it goes on with steps that are not"):
        assert same(pixels(pipeline), expected)
    assert recorder.recorded > 0 and not pipeline._kept.are_any and pipeline.offload == "none"


# --- what auto chooses ----------------------------------------------------------------------------

STAGES = [
    StageEstimate("C", 7 * GIB, 1 * GIB),
    StageEstimate("B", 2 * GIB, 5 * GIB),
    StageEstimate("A", 0, GIB),
]


@pytest.mark.parametrize(
    ("free", "mode"), [(141, "none"), (17, "none"), (16, "stage"), (9, "stage"), (8, "block"), (2, "block")]
)
def test_auto_takes_the_fastest_that_fits(free: int, mode: str) -> None:
    chosen, why = best_mode(STAGES, GIB, free * GIB)
    assert chosen == mode and f"{free:.1f} GiB are free" in why


def test_recorded_steps_are_counted_where_weights_stay() -> None:
    recorded = [replace(stage, kept=stage.activations) for stage in STAGES[:2]] + STAGES[2:]
    assert taken(NONE, recorded, GIB) == taken(NONE, STAGES, GIB) + 2 * GIB  # C's and A's maps beside B's
    assert taken(STAGE, recorded, GIB) == taken(STAGE, STAGES, GIB)


def test_on_the_cpu_weights_rest_where_they_compute(family_folder: Path) -> None:
    pipeline = pipeline_of(family_folder)
    assert pipeline.settle_offload(64, 64, QUICK).startswith("offload: none (on the CPU")


def test_a_tile_fits_into_what_is_free() -> None:
    sizes = plan(4096, 4096, LatentGeometry())
    stage_a = StageA(c_hidden=64, bottleneck_blocks=2)
    needed = partial(stage_a_activations, sizes, 64, stage_a.halo)
    assert fitting_tile(stage_a, sizes, 2 * needed(256), None) is None
    assert fitting_tile(stage_a, sizes, int(needed(64) / 0.89), None) == 64
    assert fitting_tile(stage_a, sizes, 2 * needed(256), 128) == 128
    assert fitting_tile(stage_a, sizes, 0, None) == 32


def test_stage_as_estimate_is_what_it_takes() -> None:
    sizes = plan(512, 512, LatentGeometry())
    stage_a = StageA(c_hidden=32, bottleneck_blocks=2)
    latent = torch.randn(1, 4, *sizes.stage_b_latent)
    with torch.no_grad(), LiveBytes() as live:
        stage_a.decode(latent)
    counted = stage_a_activations(sizes, 32, stage_a.halo)
    assert live.peak <= counted <= 1.15 * live.peak


# --- loading ahead --------------------------------------------------------------------------------


def test_a_module_is_loaded_beside_what_else_is_done() -> None:
    offloaded = Offloaded(lambda home, _: nn.Linear(2, 2, device=home), Placement(CPU))
    offloaded.load_ahead()
    offloaded.load_ahead()
    assert offloaded._ahead.result() is offloaded.module is offloaded.module


def test_an_error_of_loading_ahead_comes_out_at_the_use(family_folder: Path) -> None:
    pipeline = pipeline_of(family_folder)
    pipeline.stage_b = Offloaded(broken_file, Placement(CPU))
    with pytest.raises(CheckpointError, match="b.safetensors is damaged"):
        pixels(pipeline)


def broken_file(_home: torch.device, _checked: bool) -> nn.Module:
    raise CheckpointError("b.safetensors is damaged: delete it")


# --- 8-bit weights --------------------------------------------------------------------------------


def test_8_bit_weights_make_the_same_picture_in_every_mode_and_nearly_that_of_whole_ones(
    family_folder: Path, expected: list[Tensor]
) -> None:
    made = [pixels(pipeline_of(family_folder, mode, int8=True)) for mode in MODES]
    assert same(made[0], made[1]) and same(made[0], made[2]) and not same(made[0], expected)
    assert all((a - b).abs().mean() < 0.05 for a, b in zip(made[0], expected, strict=True))


def test_8_bit_weights_take_a_quarter_of_float32_and_are_off_by_half_a_level() -> None:
    block = ResBlock(32)
    nn.init.normal_(block.channelwise[0].weight)
    before = [p.detach().clone() for p in block.parameters()]
    (packed,) = packed_blocks([block], int8=True)
    assert packed.memory.nbytes < 0.4 * sum(p.nbytes for p in before)
    assert all(p.is_meta for p in block.parameters())
    for a, b in zip(packed.open(packed.memory), before, strict=True):
        level = b.flatten(1).abs().amax(1).view(-1, *(1,) * (b.dim() - 1)) / 127 if b.dim() > 1 else 0
        assert ((a - b).abs() <= 0.5001 * level).all()


@pytest.mark.parametrize("named", [{"int8": True}, {"offload": "block"}])
def test_loras_are_merged_before_blocks_are_brought(family_folder: Path, named: dict) -> None:
    pipeline = pipeline_of(family_folder, **named)
    plain = pixels(pipeline)
    name = "down_blocks.0.0.channelwise.0.weight"
    shape = pipeline.stage_c.module.get_parameter(name).shape
    update = LoraUpdate(torch.ones(1, shape[1]), torch.ones(shape[0], 1))
    sizes = stage_c_sizes(pipeline.config_c)
    pipeline.set_loras(WeightedLora(LoraFile({name: update}, sizes)))
    one = pixels(pipeline)
    assert not same(one, plain)
    again = replace(update, up=update.up.clone())  # as a file that is read again
    pipeline.set_loras(WeightedLora(LoraFile({name: again}, sizes), 0.5))
    assert not same(pixels(pipeline), one)
    pipeline.set_loras([])
    assert same(pixels(pipeline), plain)


@pytest.mark.parametrize("named", [{"int8": True}, {"offload": "block"}])
def test_fp8_is_left_out_where_blocks_come_and_go(family_folder: Path, named: dict) -> None:
    pipeline = pipeline_of(family_folder, **named)
    plain = pixels(pipeline)
    with pytest.warns(UserWarning, match="fp8 does not go with (int8|offload block), and is left out"):
        made = pipeline.run(JOBS, replace(QUICK, fp8="on"))
    assert same([picture.pixels for picture in made], plain)


def test_what_warms_the_kernels_of_stages_b_and_a_runs(family_folder: Path) -> None:
    pipeline = pipeline_of(family_folder)
    with torch.no_grad():
        pipeline._warm_stage_b(pipeline.stage_b.module)
        pipeline._warm_stage_a(pipeline.stage_a.module)


def test_a_dry_run_says_where_weights_would_rest(family_folder: Path) -> None:
    pipeline = pipeline_of(family_folder)
    text = describe_plan(pipeline, JOBS, QUICK)
    assert "\noffload: none (on the CPU" in text
    pipeline.device = torch.device("cuda")  # as if there were one
    pipeline.best_offload = lambda *_: ("stage", "8.0 GiB are free on the device")
    assert "\noffload: none; auto would choose stage (8.0 GiB" in describe_plan(pipeline, JOBS, QUICK)


def test_copies_in_float8_are_counted(family_folder: Path) -> None:
    pipeline, sizes = pipeline_of(family_folder), plan(64, 64, LatentGeometry())
    off, on, auto = (
        [stage.weights for stage in pipeline.estimate(sizes, replace(QUICK, fp8=fp8))]
        for fp8 in ("off", "on", "auto")
    )
    for number, network in enumerate((pipeline.stage_c.module, pipeline.stage_b.module)):
        layers = [layer for _, _, layer in replaced_layers(network)]
        assert on[number] - off[number] == sum(layer.weight.numel() for layer in layers) > 0
    assert on[2] == off[2] and auto == off  # a CPU has no such products


def test_a_plan_counts_the_passes_that_are_made() -> None:
    pipeline = UltraPixelPipeline.from_preset("small-big", "cpu")
    small, large = (plan(side, side, LatentGeometry()) for side in (1024, 4096))
    low = pipeline.estimate(large, replace(QUICK, lr_only=True))
    assert low == pipeline.estimate(small, replace(QUICK, lr_only=True))
    assert low[1].activations < pipeline.estimate(large, QUICK)[1].activations / 4
    least = pipeline.estimate(plan(64, 64, LatentGeometry()), QUICK)[0].activations
    assert least == low[0].activations  # the low-resolution pass is the larger one then
    jobs = [Job("a", 256, 256, seed, settings=replace(QUICK, cfg=cfg)) for seed, cfg in enumerate((1.0, 4.0))]
    texts = {describe_plan(pipeline, order, QUICK).partition("# memory")[2] for order in (jobs, jobs[::-1])}
    assert len(texts) == 1


def test_a_card_without_bfloat16_is_told(family_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.pipeline.stages, "of_nvidia", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.warns(UserWarning, match="Tesla T4 does not compute in bfloat16: use --dtype float32"):
        core.pipeline.stages._warn_of_bfloat16(CPU, "float32", "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        core.pipeline.stages._warn_of_bfloat16(CPU, "float32", "float32")


def test_8_bit_weights_are_counted_as_such(family_folder: Path) -> None:
    sizes, weights = plan(64, 64, LatentGeometry()), []
    for int8 in (False, True):
        stages = pipeline_of(family_folder, int8=int8).estimate(sizes, QUICK)
        weights.append([stage.weights for stage in stages])
    guidance = sum(p.nbytes for p in pipeline_of(family_folder).guidance.module.parameters())
    for column in weights:
        column[0] -= guidance  # which is kept as it is
    assert [a / b for a, b in zip(*weights, strict=True)] == [4, 4, 1]


@pytest.mark.parametrize("int8", [False, True])
def test_weights_that_come_and_go_are_counted_as_such(family_folder: Path, int8: bool) -> None:
    pipeline, sizes = pipeline_of(family_folder, "block", int8=int8), plan(64, 64, LatentGeometry())
    counted = pipeline.estimate(sizes, QUICK)
    guidance = sum(p.nbytes for p in pipeline.guidance.module.parameters())
    for number, offloaded in enumerate((pipeline.stage_c, pipeline.stage_b)):
        stage, beside = counted[number], 0 if number else guidance
        blocks = offloaded._blocks(offloaded.module)
        streamed = {tensor for block in blocks for tensor in block.tensors}
        stays = sum(p.nbytes for p in offloaded.module.parameters() if p not in streamed)
        places = 2 * max(len(block.memory) for block in blocks)
        opened = max(sum(p.nbytes for p in block.tensors) for block in blocks) if int8 else 0
        assert stage.weights_in("block") == pytest.approx(beside + stays + places + opened, rel=0.1)
        assert stage.weights_in("stage") == stage.weights > 0


def test_a_plan_counts_blocks_and_pictures_at_once() -> None:
    jobs = [Job("a house", 1024, 1024, seed) for seed in range(3)]
    found = {}
    for mode, batch in (("stage", 1), ("block", 1), ("block", 2), ("block", 8)):
        pipeline = UltraPixelPipeline.from_preset("small-big", "cpu", offload=mode)
        text = describe_plan(pipeline, jobs, QUICK, batch)
        told = re.search(r"stage C: .*weights ([\d.]+), maps ([\d.]+)", text)
        found[mode, batch] = float(told[1]), float(told[2])
    assert found["stage", 1][0] > 6 and found["block", 1][0] < 1
    maps = [found["block", batch][1] / found["stage", 1][1] for batch in (1, 2, 8)]
    assert maps == pytest.approx([1, 2, 3], rel=0.1)
