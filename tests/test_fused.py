"""The GPU's kernels against their plain twins, interpreted on the CPU, and the CPU's own operators."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import replace
from threading import Thread

import pytest
import torch
from peers import random_stage_b, random_stage_c
from torch import Tensor, nn

from modules import blocks, on_cpu, operators, unet
from modules.blocks import PLAIN, Operators, ResBlock
from modules.lora import LoraUpdate, MergedLora

TOLERANCE = 1e-5  # of the largest value
PLACES = 2**33 + 2**20  # of a sparse buffer: more than 2**31 within a sample
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which older Pythons do not name


def check(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


@pytest.fixture(scope="module")
def fused():
    """The kernels, interpreted."""
    pytest.importorskip("triton", reason="triton is not to be had here")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, where kernels are compiled, and these tensors lie on the CPU")
    from modules import fused

    with pytest.MonkeyPatch.context() as patch:  # less to interpret
        patch.setattr(fused, "GELU_STEPS", 2)
        yield fused


@pytest.fixture(params=["fused", "on_cpu"])
def ops(request: pytest.FixtureRequest) -> Operators:
    """A device's own operators."""
    if request.param == "fused":
        return request.getfixturevalue("fused").OPERATORS
    if not on_cpu.pays():
        pytest.skip("oneDNN's products are not used on this processor")
    return on_cpu.OPERATORS


@pytest.mark.parametrize(("batch", "height", "width", "c"), [(1, 3, 5, 7), (2, 6, 9, 24), (3, 4, 1, 33)])
@torch.no_grad()
def test_depthwise_convolution_and_norm(ops: Operators, batch: int, height: int, width: int, c: int) -> None:
    torch.manual_seed(0)
    convolution, bias = nn.Conv2d(c, c, 3, padding=1, groups=c), torch.randn(c)
    x = torch.randn(batch, height, width, c)
    (wanted, _), (found, residual) = (o.depthwise_norm(x, convolution, bias) for o in (PLAIN, ops))
    check(found, wanted)
    check(ops.add_product(residual.flatten(1, 2), torch.zeros(batch, height * width, 5), torch.zeros(1, c, 5),
                          bias), (x + bias).flatten(1, 2))  # fmt: skip


@pytest.mark.parametrize("rows", [None, 1, 3])
@torch.no_grad()
def test_modulation_and_norm(ops: Operators, rows: int | None) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(3, 5, 7, 20), torch.randn(20)
    modulation = None if rows is None else (1 + torch.randn(rows, 20), torch.randn(rows, 20))
    wanted = PLAIN.modulated_norm(x, modulation, bias)
    found = ops.modulated_norm(x, modulation, bias)
    check(found[0], wanted[0])
    zeros = torch.zeros(3, 35, 4), torch.zeros(1, 20, 4)
    sums = (o.add_product(r.flatten(1, 2), *zeros, bias) for o, r in ((ops, found[1]), (PLAIN, wanted[1])))
    check(*sums)


@pytest.mark.parametrize(("batch", "rows", "c", "k"), [(1, 1, 5, 16), (2, 300, 8, 130), (3, 17, 24, 100)])
@torch.no_grad()
def test_hidden_layer_and_the_sums_of_its_squares(
    ops: Operators, batch: int, rows: int, c: int, k: int
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(c, k), 5 * torch.randn(batch, rows, c)
    for found, wanted in zip(ops.hidden(x, layer), PLAIN.hidden(x, layer), strict=True):
        check(found, wanted)


@pytest.mark.parametrize("batch", [1, 2, 3])
@torch.no_grad()
def test_response_norm_in_the_weight_and_the_product(ops: Operators, batch: int) -> None:
    torch.manual_seed(0)
    weight, gamma, bias = torch.randn(11, 1100), torch.randn(1, 1, 1, 1100), torch.randn(11)
    squares = torch.rand(batch, 1100)
    wanted = PLAIN.grn_weight(weight, squares, gamma)
    check(ops.grn_weight(weight, squares, gamma), wanted)
    x, residual = torch.randn(batch, 9, 1100), torch.randn(batch, 9, 11)
    for weights in (wanted, weight[None]):
        one = residual + x @ weights.transpose(1, 2) + bias
        check(PLAIN.add_product(residual, x, weights, bias), one)
        start = residual + bias if ops is not on_cpu.OPERATORS else residual
        check(ops.add_product(start.clone(), x, weights, bias), one)


@pytest.mark.parametrize(
    ("batch", "heads", "rows", "width", "tokens"),
    [(1, 1, 1, 16, 1), (2, 3, 200, 16, 85), (3, 1, 210, 32, 4), (1, 2, 250, 12, 5)],
)
@torch.no_grad()
def test_attention_in_two_parts(
    ops: Operators, batch: int, heads: int, rows: int, width: int, tokens: int
) -> None:
    torch.manual_seed(0)
    packed = 3 * torch.randn(batch, rows, 3 * heads * width)  # scores far apart
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1))
    condition = tuple(torch.randn(batch, tokens, heads, width).transpose(1, 2) for _ in "kv")
    wanted = PLAIN.attention(q, k, v, condition)
    check(ops.attention(q, k, v, condition), wanted)
    # Heads one after the other, as processes that share a picture exchange them.
    check(ops.attention(*(t.contiguous() for t in (q, k, v)), condition), wanted)


@torch.no_grad()
def test_attention_to_a_long_prompt_is_not_the_kernels(fused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "add_condition_kernel", None)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    condition = tuple(torch.randn(1, 2, fused.MOST_TOKENS + 1, 16) for _ in "kv")
    check(fused.attention(q, k, v, condition), PLAIN.attention(q, k, v, condition))


# --- offsets of 64 bits ---------------------------------------------------------------------------


def sparse() -> Tensor:
    """A buffer of zeros of which only what is written takes memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    try:
        memory = mmap.mmap(-1, 4 * PLACES, flags=flags)
    except (OSError, ValueError) as error:
        pytest.skip(f"no room for addresses: {error}")
    return torch.frombuffer(memory, dtype=torch.float32)


def far(values: Tensor) -> Tensor:
    """The same values (B, N, C), with so much room between pixels that offsets pass 2**31."""
    batch, rows, c = values.shape
    apart = (PLACES - c) // (batch * rows)
    assert apart < 2**31 < apart * (rows - 1)  # what overflows is the product
    copy = sparse().as_strided(values.shape, (rows * apart, apart, 1))
    return copy.copy_(values)


@torch.no_grad()
def test_offsets_of_64_bits_in_norms(fused) -> None:
    torch.manual_seed(0)
    convolution, bias, modulation = (
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        torch.randn(6),
        torch.randn(2, 2, 6),
    )
    x = torch.randn(2, 6, 6)  # (B, 2·3, C)
    wide, y, residual = far(x), far(x), far(x)
    strides = (*wide.stride()[:2], *y.stride()[:2])
    weight = convolution.weight.flatten(1).t().contiguous()
    fused.depthwise_norm_kernel[(4, 2)](
        wide, weight, convolution.bias, bias, y, residual, 2, 3, *strides, C=6, BLOCK_C=8, PIXELS=2, EPS=1e-6
    )
    check(y, PLAIN.depthwise_norm(x.view(2, 2, 3, 6), convolution, bias)[0].flatten(1, 2))
    check(residual, x + bias)
    fused.modulated_norm_kernel[(6, 2)](
        wide, *modulation, bias, y, residual, *strides, 6, C=6, BLOCK_C=8, MODULATED=True, EPS=1e-6
    )
    normed, modulated = PLAIN.modulated_norm(x.view(2, 2, 3, 6), tuple(modulation), bias)
    check(y, normed.flatten(1, 2))
    check(residual, modulated.flatten(1, 2) + bias)


@torch.no_grad()
def test_offsets_of_64_bits_in_gelu_and_attention(fused) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 20)
    wide = far(x)
    sums = torch.empty(2, 1, 20)
    fused.gelu_squares_kernel[(2, 1, 2)](
        wide, wide, sums, 5, 20, *wide.stride()[:2], ROWS=4, COLUMNS=16, STEPS=2
    )
    check(wide, nn.functional.gelu(x))
    check(sums[:, 0], nn.functional.gelu(x).square().sum(1))
    q, k, v = (part.view(2, 5, 1, 16).transpose(1, 2) for part in torch.randn(3, 2, 5, 16))
    condition = tuple(torch.randn(2, 1, 3, 16) for _ in "kv")
    pixels, totals = fused.pixel_attention(q, k, v)
    pixels, wide, y = far(pixels.flatten(2)), far(q.transpose(1, 2).flatten(2)), far(torch.zeros(2, 5, 16))
    fused.add_condition_kernel[(2, 1, 2)](
        wide, *condition, pixels, totals, y, 5, 3, *wide.stride()[:2], 48, 16, *y.stride()[:2], 0.25,
        HEADS=1, WIDTH=16, ROWS=4, TOKENS=16,
    )  # fmt: skip
    check(y, PLAIN.attention(q, k, v, condition))


# --- whole networks -------------------------------------------------------------------------------


@torch.no_grad()
def predicted(
    network: nn.Module, inputs: tuple, monkeypatch: pytest.MonkeyPatch, ops: Operators | None, **more
):
    monkeypatch.setattr(unet.CascadeUNet, "_operators", lambda *_: ops)
    return network(*inputs, **more)


def stage_c_inputs(batch: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
    text = torch.randn(batch, 7, 48), torch.randn(batch, 1, 48), torch.randn(batch, 1, 32)
    return torch.randn(batch, 16, *size), torch.rand(batch), *text


@pytest.mark.parametrize(("batch", "size"), [(1, (3, 5)), (2, (5, 4)), (3, (2, 3))])
def test_stage_c(ops: Operators, monkeypatch: pytest.MonkeyPatch, batch: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stage_c = random_stage_c(32, 2, ((1, 1), (1, 1)))
    inputs = stage_c_inputs(batch, size)
    control = [torch.randn(batch, 32, 2, 2), None, torch.randn(batch, 32, *size)]
    weight = "down_blocks.0.2.attention.attn.in_proj_weight"
    merged = MergedLora(stage_c, {weight: LoraUpdate(torch.randn(2, 32), torch.randn(96, 2))})
    outputs = {o: predicted(stage_c, inputs, monkeypatch, o, control=control) for o in (None, PLAIN, ops)}
    check(outputs[PLAIN], outputs[None])
    check(outputs[ops], outputs[None])
    merged.undo()
    assert float((predicted(stage_c, inputs, monkeypatch, ops) - outputs[ops]).abs().max()) > 1e-3


@pytest.mark.parametrize("kept", [0, 2**30])
def test_stage_b_with_its_hidden_layers_kept_and_in_chunks(
    ops: Operators, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(blocks.KEPT_HIDDEN, "cpu", kept)
    monkeypatch.setitem(blocks.CHUNK_HIDDEN, "cpu", 3000)
    stage_b = random_stage_b((8, 16, 64, 64), ((1, 1, 1, 1), (1, 1, 1, 1)))
    inputs = (torch.randn(2, 4, 16, 32), torch.rand(2), torch.randn(2, 16, 3, 4), torch.randn(2, 1, 48))
    outputs = {o: predicted(stage_b, inputs, monkeypatch, o) for o in (None, PLAIN, ops)}
    check(outputs[PLAIN], outputs[None])
    check(outputs[ops], outputs[None])


@torch.no_grad()
def test_a_large_hidden_layer_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = ResBlock(8).eval(), torch.randn(2, 8, 20, 30)
    sizes = []

    def watched(y: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        sizes.append(y.shape[1])
        return PLAIN.hidden(y, layer)

    ops = Operators(**{**vars(PLAIN), "hidden": watched})
    monkeypatch.setitem(blocks.CHUNK_HIDDEN, "cpu", 2 * 32 * 100)
    block(x, None, ops)
    assert sizes == [100] * 6
    monkeypatch.setitem(blocks.KEPT_HIDDEN, "cpu", 1)
    check(block(x, None, ops), block(x))
    assert sizes == [100] * 18  # once for the sums, and once for the product


def test_rounding_alone_is_no_reason_to_do_without_the_kernels(
    fused, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def with_bias(x: Tensor, modulation: blocks.Modulation | None, bias: Tensor) -> tuple[Tensor, Tensor]:
        normed, residual = PLAIN.modulated_norm(x, modulation, bias)
        return normed, residual + bias

    def without_bias(residual: Tensor, x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        return PLAIN.add_product(residual, x, weights, torch.zeros_like(bias))

    as_kernels_do = replace(PLAIN, modulated_norm=with_bias, add_product=without_bias)
    as_kernels_do = replace(
        as_kernels_do, depthwise_norm=lambda x, c, b: (PLAIN.depthwise_norm(x, c, b)[0], x + b)
    )
    monkeypatch.setattr(fused, "OPERATORS", as_kernels_do)
    assert operators._tried(torch.device("cpu"), 320, torch.bfloat16), recwarn.list


def test_kernels_are_tried_before_they_are_relied_on(fused, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = operators._tried
    monkeypatch.setattr(operators, "TRIED_SIZE", (6, 5))
    cpu = torch.device("cpu")
    before = torch.random.get_rng_state()
    assert tried(cpu, 64, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    wrong = replace(fused.OPERATORS, hidden=lambda x, layer: (layer(x), layer(x).square().sum(1)))
    monkeypatch.setattr(fused, "OPERATORS", wrong)
    with pytest.warns(UserWarning, match="not used, as they fail here .ResBlock gives other values"):
        assert not tried(cpu, 64, torch.float32)
    monkeypatch.setattr(fused, "OPERATORS", replace(wrong, attention=None, hidden=blocks.hidden))
    with pytest.warns(UserWarning, match="not used, as they fail here"):
        assert not tried(cpu, 64, torch.float32)


def test_threads_that_ask_at_once_compile_once(fused, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def slow(_ops: Operators, _device: torch.device, c: int, _dtype: torch.dtype) -> None:
        time.sleep(0.1)
        compared.append(c)

    monkeypatch.setattr(operators, "_compare", slow)
    cpu = torch.device("cpu")
    threads = [Thread(target=operators.fused_works, args=(cpu, 3)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compared == [3]
    operators.KNOWN.clear()
