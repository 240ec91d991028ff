"""LoRA files: every layout written here from its description, read into one form, written, and read again."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import TEXT, random_stage_c, unet_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.config.sizes import STAGE_C_VERSIONS, StageCSizes
from core.weights.checkpoint import CheckpointError, save_archive
from core.weights.lora.files import LAYOUTS, LoraFile, LoraTokens, name_tokens, write_lora
from core.weights.lora.names import diffusers_module, published_orders, stage_c_weights
from core.weights.lora.reading import find_version, read_lora
from modules.lora import LoraUpdate, MergedLora
from modules.stage_c import StageC

from transformers import CLIPTextConfig, CLIPTextModelWithProjection  # isort: skip

SIZES = StageCSizes(
    c_cond=12, c_hidden=(8, 8), nhead=(2, 2), blocks=((1, 2), (2, 1)), c_clip_text=16, c_clip_text_pooled=16,
    c_clip_img=8,
)  # fmt: skip
FIRST = "down_blocks.0.2.attention.attn"  # the first attention block
IN_PROJ, OUT_PROJ = f"{FIRST}.in_proj_weight", f"{FIRST}.out_proj.weight"
Deltas = dict[str, Tensor]


# --- what the tests write ---------------------------------------------------------------------------


@lru_cache
def shapes(sizes: StageCSizes) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = StageC(**asdict(sizes)).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if name.endswith("weight")}


@dataclass(frozen=True)
class Layer:
    """An update as a trainer has it: of a weight, or of a third of the rows of a packed one."""

    weight: str
    part: int | None
    down: Tensor
    up: Tensor
    alpha: float | None  # None: not in the file, where it means the rank

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / len(self.down)


def layer_names(sizes: StageCSizes) -> list[tuple[str, int | None]]:
    packed = {name for name in shapes(sizes) if name.endswith("in_proj_weight")}
    return [(name, part) for name in shapes(sizes) for part in ((0, 1, 2) if name in packed else (None,))]


def make_layer(
    weight: str, part: int | None, rank: int, alpha: float | None, sizes: StageCSizes = SIZES
) -> Layer:
    rows, *others = shapes(sizes)[weight]
    rows = rows if part is None else rows // 3
    down, up = torch.randn(rank, *others), torch.randn(rows, rank, *(1 for _ in others[1:]))
    return Layer(weight, part, down, up, alpha)


def expected(layers: Sequence[Layer], sizes: StageCSizes = SIZES) -> Deltas:
    deltas: Deltas = {}
    for layer in layers:
        delta = layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)
        whole = deltas.setdefault(layer.weight, torch.zeros(shapes(sizes)[layer.weight]))
        rows = slice(None) if layer.part is None else slice(layer.part * len(delta), None)
        whole[rows][: len(delta)] = delta.view(len(delta), *whole.shape[1:])
    return deltas


def deltas_of(lora: LoraFile) -> Deltas:
    return {name: update.delta(shapes(lora.sizes)[name]) for name, update in lora.updates.items()}


def assert_same(found: Deltas, wanted: Deltas) -> None:
    """Equal as far as float32 goes; a weight without a delta is one of zeros."""
    for name in found.keys() | wanted.keys():
        zeros = torch.zeros_like(found.get(name, wanted.get(name)))
        torch.testing.assert_close(found.get(name, zeros), wanted.get(name, zeros), rtol=1e-4, atol=1e-4)


def split_name(weight: str, part: int | None) -> str:
    """kohya, ComfyUI, OneTrainer's legacy layout."""
    return (
        weight.removesuffix(".weight")
        if part is None
        else weight.replace("in_proj_weight", f"to_{'qkv'[part]}")
    )


def numbered_name(weight: str, part: int | None) -> str:
    """OneTrainer's others."""
    return weight.removesuffix(".weight") if part is None else weight.replace("_weight", f".{part}")


def diffusers_name(weight: str, part: int | None) -> str:
    if part is not None:
        return weight.replace("attn.in_proj_weight", f"to_{'qkv'[part]}")
    return weight.removesuffix(".weight").replace("attn.out_proj", "to_out.0")


@dataclass(frozen=True)
class Layout:
    """How a trainer or program names the matrices of a layer."""

    prefix: str
    name: Callable[[str, int | None], str]
    flat: bool = False
    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    alpha: bool = True  # in the file, or in the up matrix

    def write(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        tensors = {}
        for layer in layers:
            name = self.name(layer.weight, layer.part)
            base = self.prefix + (name.replace(".", "_") if self.flat else name)
            up = layer.up if self.alpha else layer.up * layer.scale
            tensors |= {base + self.down: layer.down, base + self.up: up}
            if self.alpha and layer.alpha is not None:
                tensors[f"{base}.alpha"] = torch.tensor(layer.alpha)
        return tensors


AB = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
COMFYUI_SUFFIXES = (
    (".lora_down.weight", ".lora_up.weight"), ("_lora.down.weight", "_lora.up.weight"),
    (".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"), (".lora_A", ".lora_B"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)  # fmt: skip
NAMED = {
    "kohya": Layout("lora_unet_", split_name, flat=True),
    "ComfyUI, early": Layout("lora_prior_unet_", split_name, flat=True),
    "LyCORIS": Layout("lycoris_", split_name, flat=True),
    "OneTrainer LEGACY": Layout("lora_prior_unet_", split_name, flat=True),
    "OneTrainer KOHYA": Layout("lora_unet_", numbered_name, flat=True),
    "OneTrainer DIFFUSERS": Layout("prior.", diffusers_name, **AB, alpha=False),
    "OneTrainer ORIGINAL": Layout("", numbered_name, **AB),
    "OneTrainer COMFY": Layout("diffusion_model.", numbered_name, **AB),
    "OneTrainer INTERNAL": Layout("prior.", diffusers_name),
    **{f"ComfyUI {s}": Layout("diffusion_model.", split_name, False, s, up) for s, up in COMFYUI_SUFFIXES},
    **{f"flat {s}": Layout("lora_unet_", split_name, True, s, up) for s, up in COMFYUI_SUFFIXES},
}  # fmt: skip


def numbered(order: Sequence[str], rank: int, prefix: str, sizes: StageCSizes = SIZES) -> tuple[dict, Deltas]:
    """The layouts of Stability and UltraPixel: by number, alpha 1; a convolution's taps all get the same."""
    tensors, deltas = {}, {}
    for i, weight in enumerate(order):
        rows, columns, *taps = shapes(sizes)[weight]
        down, up = torch.randn(rank, columns), torch.randn(rows, rank)
        tensors |= {f"{prefix}.{i}.lora_down": down, f"{prefix}.{i}.lora_up": up}
        delta = (up @ down / rank).view(rows, columns, *(1 for _ in taps))
        deltas[weight] = delta.expand(rows, columns, *taps)
    return tensors, deltas


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


def read_again(lora: LoraFile, layout: str, folder: Path) -> LoraFile:
    path = folder / ("adapter" if layout == "peft" else f"{layout}.safetensors")
    write_lora(path, lora, layout)
    return read_lora(path, lora.sizes)


def read_tensors(tensors: Mapping[str, Tensor], folder: Path, sizes: StageCSizes | None = SIZES) -> LoraFile:
    path = folder / "given.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return read_lora(path, sizes)


@st.composite
def layers(draw: st.DrawFn) -> list[Layer]:
    torch.manual_seed(draw(st.integers(0, 999)))
    chosen = draw(st.lists(st.sampled_from(layer_names(SIZES)), min_size=1, max_size=12, unique=True))
    alphas = st.one_of(st.none(), st.sampled_from((0.5, 1.0, 3.0, 16.0, -1.0)))
    return [make_layer(*name, draw(st.integers(1, 5)), draw(alphas)) for name in chosen]


# --- round trips ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layers=layers(), layout=st.sampled_from(sorted(NAMED)))
def test_every_named_layout_comes_back_with_the_same_deltas(
    scratch: Path, layers: list[Layer], layout: str
) -> None:
    lora = read_tensors(NAMED[layout].write(layers), scratch)
    wanted = expected(layers)
    assert lora.updates.keys() == wanted.keys()
    assert_same(deltas_of(lora), wanted)
    for to in ("own", "kohya"):
        assert_same(deltas_of(read_again(lora, to, scratch)), wanted)
    plain = replace(lora, updates={n: u for n, u in lora.updates.items() if "depthwise" not in n})
    if plain.updates:
        assert_same(deltas_of(read_again(plain, "peft", scratch)), deltas_of(plain))
    attention = replace(lora, updates={n: u for n, u in lora.updates.items() if ".attn." in n})
    assert_same(deltas_of(read_again(attention, "published", scratch)), deltas_of(attention))


@settings(max_examples=15, deadline=None)
@given(
    rank=st.integers(1, 6),
    everything=st.booleans(),
    prefix=st.sampled_from(["module", "weights"]),
    seed=st.integers(0, 999),
)
def test_numbered_layouts_come_back_with_the_same_deltas(
    scratch: Path, rank: int, everything: bool, prefix: str, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors, wanted = numbered(published_orders(SIZES)[everything], rank, prefix)
    lora = read_tensors(tensors, scratch)
    assert lora.layout == {"module": "UltraPixel's published", "weights": "Stability's"}[prefix]
    assert_same(deltas_of(lora), wanted)
    for to in ("own", "kohya") if everything else LAYOUTS:
        again = read_again(lora, to, scratch)
        assert_same(deltas_of(again), wanted)
        assert {update.rank for update in again.updates.values()} == {rank}  # also of what was taken apart


def test_a_published_file_is_the_same_after_a_detour(scratch: Path) -> None:
    tensors, _ = numbered(published_orders(SIZES)[0], 4, "module")
    lora = read_again(read_again(read_tensors(tensors, scratch), "kohya", scratch), "own", scratch)
    write_lora(scratch / "published.safetensors", lora, "published")
    with safe_open(scratch / "published.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_ranks_and_alphas_of_queries_keys_and_values_stay_apart(scratch: Path) -> None:
    made = [
        make_layer(IN_PROJ, 0, 1, 4.0),
        make_layer(IN_PROJ, 2, 3, 0.5),
        make_layer(OUT_PROJ, None, 2, None),
    ]
    lora = read_tensors(NAMED["kohya"].write(made), scratch)
    assert lora.updates[IN_PROJ].rank == 4 and not lora.updates[IN_PROJ].up[8:16].any()
    write_lora(scratch / "own.safetensors", lora, "own")
    write_lora(scratch / "kohya.safetensors", read_lora(scratch / "own.safetensors", SIZES), "kohya")
    with safe_open(scratch / "kohya.safetensors", "pt") as file:
        ranks = {name: len(file.get_tensor(name)) for name in file.keys() if "down" in name.split(".")[1]}  # noqa: SIM118
    base = "lora_unet_down_blocks_0_2_attention_attn_"
    names = {f"{base}to_q": 1, f"{base}to_v": 3, f"{base}out_proj": 2}
    assert ranks == {f"{name}.lora_down.weight": rank for name, rank in names.items()}
    assert_same(deltas_of(read_lora(scratch / "kohya.safetensors", SIZES)), expected(made))


def test_packed_updates_of_one_scale_are_joined_bit_for_bit(scratch: Path) -> None:
    made = [make_layer(IN_PROJ, part, 3, 0.7) for part in (0, 1, 2)]
    update = read_tensors(NAMED["kohya"].write(made), scratch).updates[IN_PROJ]
    for layer in made:
        block = update.up[8 * layer.part : 8 * layer.part + 8, 3 * layer.part : 3 * layer.part + 3]
        assert torch.equal(block, layer.up)
    assert update.alpha == pytest.approx(3 * 0.7) and torch.equal(
        update.down, torch.cat([m.down for m in made])
    )


def test_own_files_hold_exactly_what_was_read(scratch: Path) -> None:
    made = [make_layer(*name, 2, 0.3) for name in layer_names(SIZES)]
    lora = read_tensors(NAMED["kohya"].write(made), scratch)
    again = read_again(lora, "own", scratch)
    assert again.updates.keys() == lora.updates.keys() == shapes(SIZES).keys()
    for name, update in lora.updates.items():
        other = again.updates[name]
        assert torch.equal(other.down, update.down) and torch.equal(other.up, update.up)
        assert other.alpha == update.alpha


def test_merging_a_file_adds_its_deltas(scratch: Path) -> None:
    made = [make_layer(*name, 2, 3.0) for name in layer_names(SIZES)]
    lora = read_tensors(NAMED["OneTrainer KOHYA"].write(made), scratch)
    stage_c = StageC(**asdict(SIZES))
    before = {name: parameter.detach().clone() for name, parameter in stage_c.named_parameters()}
    MergedLora(stage_c, lora.updates, 0.5)
    wanted = expected(made)
    for name, parameter in stage_c.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] + 0.5 * wanted.get(name, torch.zeros(())))


def test_any_number_format_is_read(scratch: Path) -> None:
    made = [make_layer(OUT_PROJ, None, 2, 1.0)]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensors = {name: tensor.to(dtype) for name, tensor in NAMED["kohya"].write(made).items()}
        update = read_tensors(tensors, scratch).updates[OUT_PROJ]
        assert update.down.dtype == torch.float32 and torch.equal(
            update.down.to(dtype), made[0].down.to(dtype)
        )


# --- the published files and sizes ------------------------------------------------------------------


@pytest.mark.parametrize("version, counts", [("3.6B", (128, 583, 647)), ("1B", (64, 295, 327))])
def test_counts_of_the_published_sizes(version: str, counts: tuple[int, int, int]) -> None:
    attention, everything = published_orders(STAGE_C_VERSIONS[version])
    layers = [name for name, _ in layer_names(STAGE_C_VERSIONS[version]) if "depthwise" not in name]
    assert (len(attention), len(everything), len(layers)) == counts
    assert set(everything) == shapes(STAGE_C_VERSIONS[version]).keys()
    starts = {"3.6B": (4, 76, 292, 293, 509, 581, 582), "1B": (4, 40, 148, 149, 257, 293, 294)}[version]
    assert [everything[start].split(".")[:2] for start in starts] == [
        ["down_blocks", "0"], ["down_blocks", "1"], ["down_downscalers", "1"], ["up_blocks", "0"],
        ["up_blocks", "1"], ["up_upscalers", "0"], ["clf", "1"],
    ]  # fmt: skip
    triple = [name.removeprefix("down_blocks.0.") for name in everything[4:13]]
    assert triple == [
        "0.depthwise.weight", "0.channelwise.0.weight", "0.channelwise.4.weight", "1.mapper.weight",
        "1.mapper_sca.weight", "1.mapper_crp.weight", "2.attention.attn.out_proj.weight",
        "2.attention.attn.in_proj_weight", "2.kv_mapper.1.weight",
    ]  # fmt: skip


def test_the_published_file_is_read_and_written_as_it_is(reference_folder: Path, scratch: Path) -> None:
    manifest = json.loads((reference_folder / "manifests" / "lora_personalized.json").read_text())
    tensors = {name: torch.randn(shape) for name, shape in manifest["tensors"].items()}
    tensors["module.128.indices"] = torch.tensor([49408])
    save_archive(scratch / "lora_cat.safetensors", tensors)  # a pickle in spite of its name
    lora = read_lora(scratch / "lora_cat.safetensors")
    assert list(lora.updates) == manifest["targets"] == published_orders(lora.sizes)[0]
    assert (find_version(lora.sizes), lora.tokens.indices, lora.tokens.names) == ("3.6B", (49408,), None)
    assert not lora.tokens.absolute and torch.equal(lora.tokens.values, tensors["module.128.embeddings"])
    write_lora(scratch / "again.safetensors", lora, "published")
    with safe_open(scratch / "again.safetensors", "pt") as file:
        assert {n: list(file.get_slice(n).get_shape()) for n in file.keys()} == manifest["tensors"]  # noqa: SIM118
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_the_reference_order_is_ours(reference_folder: Path) -> None:
    with safe_open(reference_folder / "lora_stage_c.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    sizes = {
        name: value for name, value in config["stage_c"].items() if name in StageCSizes.__dataclass_fields__
    }
    sizes = {name: _tuples(value) for name, value in sizes.items()}
    assert published_orders(StageCSizes(**sizes))[0] == config["order"]


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("version", STAGE_C_VERSIONS)
def test_the_version_is_found_from_the_file(version: str, scratch: Path) -> None:
    sizes = STAGE_C_VERSIONS[version]
    made = [make_layer("up_blocks.1.2.kv_mapper.1.weight", None, 1, 1.0, sizes)]
    assert read_tensors(NAMED["kohya"].write(made), scratch, None).sizes == sizes
    other = next(v for v in STAGE_C_VERSIONS if v != version)
    message = refusal(lambda: read_lora(scratch / "given.safetensors", STAGE_C_VERSIONS[other]))
    assert message.endswith(f"given.safetensors: the LoRA is for Stage C {version}, not for {other}")


def test_diffusers_has_the_names_that_adapters_are_written_with() -> None:
    stage_c = random_stage_c(8, 2, ((1, 2), (2, 1)))
    theirs = unet_of(stage_c).state_dict()
    for name, part in layer_names(SIZES):
        assert f"{diffusers_module(name, part)}.weight" in theirs


# --- text encoder and tokens ------------------------------------------------------------------------


TEXT_LAYERS = "text_model.encoder.layers"
TEXT_SPELLINGS = {
    "lora_te_text_model_encoder_layers_1_self_attn_q_proj": "text_model.encoder.layers.1.self_attn.q_proj",
    "lora_prior_te_text_model_encoder_layers_0_mlp_fc1": "text_model.encoder.layers.0.mlp.fc1",
    "lora_prior_te_text_projection": "text_projection",
    f"text_encoder.{TEXT_LAYERS}.0.self_attn.out_proj": f"{TEXT_LAYERS}.0.self_attn.out_proj",
    f"text_encoders.clip_g.transformer.{TEXT_LAYERS}.1.mlp.fc2": f"{TEXT_LAYERS}.1.mlp.fc2",
    "lora_te_text_model_encoder_layers_0_self_attn_k_proj": "text_model.encoder.layers.0.self_attn.k_proj",
}  # fmt: skip


@pytest.mark.parametrize("projection", ["lora_prior_te_text_projection", "lora_te2_text_projection"])
def test_updates_of_the_text_encoder_are_kept_apart(scratch: Path, projection: str) -> None:
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        vocab_size=20,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tensors, wanted = {}, {}
    for spelt, module in TEXT_SPELLINGS.items():
        spelt = projection if module == "text_projection" else spelt
        rows, columns = before[f"{module}.weight"].shape
        down, up = torch.randn(2, columns), torch.randn(rows, 2)
        tensors |= {f"{spelt}.lora_down.weight": down, f"{spelt}.lora_up.weight": up}
        tensors[f"{spelt}.alpha"] = torch.tensor(3.0)
        wanted[f"{module}.weight"] = up @ down * 3 / 2
    made = [make_layer(OUT_PROJ, None, 2, 1.0)]
    lora = read_tensors(tensors | NAMED["kohya"].write(made), scratch)
    for read in (lora, read_again(lora, "own", scratch), read_again(lora, "kohya", scratch)):
        assert list(read.updates) == [OUT_PROJ] and read.text_updates.keys() == wanted.keys()
        MergedLora(model, read.text_updates).undo()
        MergedLora(model, read.text_updates)
        for name, parameter in model.named_parameters():
            change = parameter.detach() - before[name]
            assert torch.allclose(change, wanted.get(name, torch.zeros(())), atol=1e-4), name
        model.load_state_dict(before, strict=False)
    assert "no place for text_model." in refusal(lambda: write_lora(scratch / "x", lora, "peft"))
    assert "no place for text_model." in refusal(lambda: write_lora(scratch / "x", lora, "published"))


@pytest.mark.parametrize("prefix", ["module.20", "12", "embeddings", "tokens"])
def test_token_offsets_are_read_named_and_written(scratch: Path, prefix: str) -> None:
    values = torch.randn(2, 16)
    tensors = {f"{prefix}.embeddings": values, f"{prefix}.indices": torch.tensor([300, 41])}
    lora = read_tensors(tensors | NAMED["kohya"].write([make_layer(OUT_PROJ, None, 2, 1.0)]), scratch)
    assert (lora.tokens.indices, lora.tokens.names, lora.tokens.initialise_from) == ((300, 41), None, None)
    named = name_tokens(lora, ["[x]", "<y>"], ["^cat</w>", None])
    for to in ("own", "published"):
        tokens = read_again(named, to, scratch).tokens
        assert torch.equal(tokens.values, values)
        assert replace(tokens, values=values) == LoraTokens(
            values, (300, 41), ("[x]", "<y>"), ("^cat</w>", None)
        )
        assert read_again(lora, to, scratch).tokens.names is None
    assert "not offsets: leave the tokens out" in refusal(lambda: write_lora(scratch / "x", named, "kohya"))
    assert "no place for the tokens (1 in all)" in refusal(lambda: write_lora(scratch / "x", named, "peft"))
    assert not (scratch / "x").exists()


def test_whole_token_rows_of_onetrainer(scratch: Path) -> None:
    first, second = torch.randn(2, 16), torch.randn(1, 16)
    tensors = {"bundle_emb.<a.b>.clip_g": first, "bundle_emb.[c].clip_g": second}
    lora = read_tensors(tensors, scratch)
    for read in (lora, read_again(lora, "own", scratch), read_again(lora, "kohya", scratch)):
        rows = {
            name: read.tokens.values[[name == other for other in read.tokens.names]]
            for name in read.tokens.names
        }
        assert read.tokens.absolute and read.tokens.indices is None
        assert torch.equal(rows["<a.b>"], first) and torch.equal(rows["[c]"], second)
    assert "not whole ones" in refusal(lambda: write_lora(scratch / "x", lora, "published"))
    assert "have no expression" in refusal(lambda: name_tokens(lora, ["a"] * 3, [None] * 3))
    out = {"bundle_emb.[c].clip_g_out": second}
    assert "1 tensor is of no known meaning (bundle_emb.[c].clip_g_out)" in refusal(
        lambda: read_tensors(out, scratch)
    )


@pytest.mark.parametrize(
    "embeddings, indices, message",
    [
        (torch.ones(1, 16), None, "without the other"),
        (None, torch.tensor([4]), "without the other"),
        (torch.ones(1, 16), torch.tensor([4, 5]), "1 token rows, but 2"),
        (torch.ones(1, 16), torch.tensor([-4]), "no row numbers"),
        (torch.ones(1, 16), torch.ones(1), "no row numbers"),
        (torch.ones(16), torch.tensor([4]), "not (16,)"),
        (torch.ones(1, 9), torch.tensor([4]), "width 9, but"),
    ],
)
def test_wrong_token_offsets_are_refused(
    scratch: Path, embeddings: Tensor | None, indices: Tensor | None, message: str
) -> None:
    tensors = {"tokens.embeddings": embeddings, "tokens.indices": indices}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    assert message in refusal(lambda: read_tensors(given, scratch))


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {"tokens.embeddings": torch.ones(1, 16), "bundle_emb.x.clip_g": torch.ones(1, 16)},
            "several places",
        ),
        ({"bundle_emb.y.clip_g": torch.ones(9), "bundle_emb.x.clip_g": torch.ones(16)}, "different widths"),
        ({"bundle_emb.y.clip_g": torch.ones(())}, "width 1, but"),
    ],
)
def test_wrong_token_rows_are_refused(scratch: Path, tensors: dict[str, Tensor], message: str) -> None:
    assert message in refusal(lambda: read_tensors(tensors, scratch))


def test_wrong_names_of_tokens_are_refused(scratch: Path) -> None:
    lora = LoraFile({}, SIZES)
    assert "brings no tokens" in refusal(lambda: name_tokens(lora, ["[x]"]))
    lora = replace(lora, tokens=LoraTokens(torch.ones(1, 16), (3,)))
    assert "1 token rows, but 2 names" in refusal(lambda: name_tokens(lora, ["[x]", "[y]"]))
    assert "'(' is no regular expression" in refusal(lambda: name_tokens(lora, ["[x]"], ["("]))


# --- peft -------------------------------------------------------------------------------------------


def write_adapter(folder: Path, layers: Sequence[Layer], config: object) -> Path:
    folder.mkdir(exist_ok=True)
    layout = Layout("base_model.model.", diffusers_name, **AB)
    save_file(
        layout.write([replace(layer, alpha=None) for layer in layers]), folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "config, alphas",
    [
        ({"r": 4, "lora_alpha": 6, "rank_pattern": {"to_out.0": 2}}, (6, 6, 6)),
        ({"r": 4, "rank_pattern": {"to_out.0": 2}}, (8, 8, 8)),
        ({"lora_alpha": 6, "use_rslora": True}, (6 * 2, 6 * 2, 6 * 2**0.5)),
        ({"lora_alpha": 6, "alpha_pattern": {"to_q": 3, r".*0\.to_out.0": 5, "o_v": 9}}, (3, 6, 6)),
        ({"lora_alpha": 6, "alpha_pattern": {r"down_blocks.*\.to_out.0": 5}}, (6, 6, 5)),
    ],
)
def test_adapters_of_peft_have_their_alpha_in_the_configuration(
    tmp_path: Path, config: dict, alphas: tuple[float, ...]
) -> None:
    made = [
        make_layer(IN_PROJ, 0, 4, None),
        make_layer(IN_PROJ, 2, 4, None),
        make_layer(OUT_PROJ, None, 2, None),
    ]
    folder = write_adapter(tmp_path / "adapter", made, config)
    wanted = expected([replace(layer, alpha=alpha) for layer, alpha in zip(made, alphas, strict=True)])
    for path in (folder, folder / "adapter_model.safetensors"):
        lora = read_lora(path, SIZES)
        assert lora.layout == "peft"
        assert_same(deltas_of(lora), wanted)


def test_wrong_adapters_are_refused(tmp_path: Path) -> None:
    made = [make_layer(OUT_PROJ, None, 2, None)]

    def refused(config: object) -> str:
        return refusal(lambda: read_lora(write_adapter(tmp_path / "adapter", made, config), SIZES))

    assert "adapter_config.json is no configuration of peft: it is [1]" in refused([1])
    assert "lora_alpha in adapter_config.json is 'x', not a number" in refused({"lora_alpha": "x"})
    assert "alpha_pattern is [1], not an object" in refused({"alpha_pattern": [1]})
    assert "alpha_pattern in adapter_config.json holds '('" in refused({"alpha_pattern": {"(": 1}})
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "is no configuration of peft" in refusal(lambda: read_lora(tmp_path / "adapter", SIZES))
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    assert "which must lie beside it" in refusal(lambda: read_lora(tmp_path / "adapter", SIZES))
    assert "is a folder without a LoRA" in refusal(lambda: read_lora(tmp_path, SIZES))


def test_written_adapters_are_right_without_their_configuration_too(tmp_path: Path) -> None:
    made = [
        make_layer(IN_PROJ, 0, 4, 3.0),
        make_layer(OUT_PROJ, None, 2, 7.0),
        make_layer("clf.1.weight", None, 2, 1.0),
    ]
    lora = LoraFile(read_tensors(NAMED["kohya"].write(made), tmp_path).updates, SIZES)
    write_lora(tmp_path / "adapter", lora, "peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"down_blocks.0.2.attention.to_q": 4}
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        shape = file.get_slice("base_model.model.clf.1.lora_A.weight").get_shape()
        tensors = {name.removeprefix("base_model.model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert shape == [2, 8, 1, 1]
    assert_same(deltas_of(read_tensors(tensors, tmp_path)), expected(made))  # where no alpha means the rank


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_itself_reads_and_writes_the_same(tmp_path: Path, use_rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    stage_c = random_stage_c(8, 2, ((1, 2), (2, 1)))
    sizes = replace(SIZES, c_cond=8, c_clip_text=TEXT, c_clip_text_pooled=TEXT, c_clip_img=32)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_v", "to_out.0", "embedding.1", "kv_mapper.1"],
        rank_pattern={"to_q": 2}, alpha_pattern={r"down_blocks.*\.to_v": 7}, use_rslora=use_rslora,
    )  # fmt: skip
    model = peft.get_peft_model(unet_of(stage_c), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "theirs")
    lora = read_lora(tmp_path / "theirs", sizes)
    wanted = model.merge_and_unload().state_dict()
    write_lora(tmp_path / "ours", lora, "peft")
    found = (
        peft.PeftModel.from_pretrained(unet_of(stage_c), tmp_path / "ours").merge_and_unload().state_dict()
    )
    MergedLora(stage_c, lora.updates)
    for name, tensor in unet_of(stage_c).state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)


# --- what is refused --------------------------------------------------------------------------------


def out_proj(**changes: Tensor) -> dict[str, Tensor]:
    tensors = NAMED["kohya"].write([make_layer(OUT_PROJ, None, 2, 1.0)])
    return {name: changes.get(name.split(".")[1], tensor) for name, tensor in tensors.items()}


BASE = "lora_unet_down_blocks_0_2_attention_attn_"
TO_Q = f"{BASE}to_q"
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")


def pair(
    base: str, down: Sequence[int], up: Sequence[int], ways: str = ".lora_down.weight .lora_up.weight"
) -> dict[str, Tensor]:
    return {base + way: torch.ones(*shape) for way, shape in zip(ways.split(), (down, up), strict=True)}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {f"{BASE}out_proj.dora_scale": torch.ones(8)},
            f"is of no known meaning ({BASE}out_proj.dora_scale)",
        ),
        ({f"{BASE}out_proj.lora_mid.weight": torch.ones(2)}, "1 tensor is of no known meaning"),
        (
            {f"{TO_Q}.{kind}": torch.ones(2) for kind in LOHA},
            f"5 tensors are of no known meaning ({TO_Q}.hada_w1_a, {TO_Q}.hada_w1_b, ",
        ),
        ({f"{TO_Q}.lokr_w1": torch.ones(2, 2)}, "1 tensor is of no known meaning"),
        ({"prior.clf.1.lora_magnitude_vector.weight": torch.ones(8)}, "1 tensor is of no known meaning"),
        (pair("lora_unet_down_blocks_0_9_mapper", (2, 64), (16, 2)), "2 tensors are of no known meaning"),
        ({f"{TO_Q}.lora_down.weight": torch.ones(2, 8)}, f"has no lora_up of {TO_Q}"),
        (pair(TO_Q, (2, 8), (8, 3)), f"{TO_Q} is of rank 2 and 3"),
        (pair(TO_Q, (0, 8), (8, 0)), "of rank 0"),
        (pair(TO_Q, (8,), (8, 1)), "no matrix"),
        (pair(TO_Q, (2, 9), (9, 2)), f"{TO_Q} is for a weight of (9, 9), but it has (8, 8): another"),
        (pair(TO_Q, (2, 8), (8, 2)) | {f"{TO_Q}.alpha": torch.ones(2)}, f"the alpha of {TO_Q} is no number"),
        ({f"{BASE}out_proj.lora_A.weight": torch.ones(2, 8)}, "holds the same twice, as"),
        (pair("prior.down_blocks.0.2.attention.to_out.0", (2, 8), (8, 2)), f"two updates of {OUT_PROJ}"),
        (pair(OUT_PROJ, (2, 8), (8, 2), ".lora_down .lora_up"), f"has no alpha of {OUT_PROJ}"),
    ],
)
def test_what_cannot_be_mapped_is_listed(scratch: Path, tensors: dict[str, Tensor], message: str) -> None:
    given = out_proj() | tensors
    assert message in refusal(lambda: read_tensors(given, scratch))


def test_packed_and_split_updates_of_one_weight_are_refused(scratch: Path) -> None:
    made = [make_layer(IN_PROJ, 0, 2, 1.0)]
    lora = read_tensors(NAMED["kohya"].write(made), scratch)
    tensors = NAMED["kohya"].write(made)
    tensors |= {f"{IN_PROJ}.lora_down": torch.ones(2, 8), f"{IN_PROJ}.lora_up": torch.ones(24, 2)}
    save_file(tensors, scratch / "both.safetensors", {"lora": json.dumps({"alphas": {IN_PROJ: 1}})})
    assert f"two updates of {IN_PROJ}" in refusal(lambda: read_lora(scratch / "both.safetensors", SIZES))
    assert lora.updates[IN_PROJ].rank == 2


def test_auxiliary_tensors_of_onetrainer_are_left_out(scratch: Path) -> None:
    assert list(read_tensors(out_proj() | {"_aux.step": torch.ones(1)}, scratch).updates) == [OUT_PROJ]


@pytest.mark.parametrize("count", [1, 7, 13, 20])
def test_a_published_file_of_another_size_is_refused(scratch: Path, count: int) -> None:
    tensors, _ = numbered(published_orders(SIZES)[1][:count], 2, "module")
    message = refusal(lambda: read_tensors(tensors, scratch))
    assert f"has updates for {count} weights, but this model takes 12 (attention) or 61 (all)" in message


def test_another_file_is_called_what_it_is(scratch: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in StageC(**asdict(SIZES)).state_dict().items()}
    assert "is Stage C of width 8, but a LoRA was asked for" in refusal(lambda: read_tensors(state, scratch))
    assert "1 tensor is of no known meaning (clip_g)" in refusal(
        lambda: read_tensors({"clip_g": torch.ones(1, 16)}, scratch)
    )
    assert "the file holds no LoRA" in refusal(lambda: read_tensors({}, scratch))
    with pytest.raises(CheckpointError, match="does not exist"):
        read_lora(scratch / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        read_tensors(out_proj(lora_up=torch.full((8, 2), torch.nan)), scratch)


@pytest.mark.parametrize(
    "entry, message",
    [
        ("{", "is not JSON"),
        ("[]", "the metadata entry 'lora' is [], not an object"),
        ('{"alphas": 3}', "'alphas' is 3"),
        ('{"alphas": {"clf.1.weight": "1"}}', "the alpha of clf.1.weight is '1', not a number"),
        (
            '{"alphas": {"clf.1.weight": 1}, "names": "[x]"}',
            "'names' in the metadata entry 'lora' is no list",
        ),
        (
            '{"alphas": {"clf.1.weight": 1}, "names": [null]}',
            "'names' in the metadata entry 'lora' is no list",
        ),
    ],
)
def test_damaged_notes_are_refused(scratch: Path, entry: str, message: str) -> None:
    tensors = {"clf.1.weight.lora_down": torch.ones(2, 8), "clf.1.weight.lora_up": torch.ones(16, 2)}
    tensors |= {"tokens.embeddings": torch.ones(1, 16), "tokens.indices": torch.tensor([2])}
    save_file(tensors, scratch / "own.safetensors", {"lora": entry})
    assert message in refusal(lambda: read_lora(scratch / "own.safetensors", SIZES))


def test_layouts_refuse_what_they_cannot_hold(scratch: Path) -> None:
    def update(name: str) -> LoraFile:
        rows, columns = stage_c_weights(SIZES)[name][:2]
        return LoraFile({name: LoraUpdate(torch.ones(2, columns), torch.ones(rows, 2))}, SIZES)

    path = scratch / "nothing.safetensors"
    for lora, layout, message in (
        (
            update("clf.1.weight"),
            "published",
            "the published layout has no place for clf.1.weight (1 in all)",
        ),
        (
            update("down_blocks.0.0.depthwise.weight"),
            "peft",
            "no place for down_blocks.0.0.depthwise",
        ),
        (
            update("clf.1.weight"),
            "stability",
            "unknown LoRA layout 'stability': use own, published, kohya, peft",
        ),
        (LoraFile({}, SIZES), "own", "nothing to write"),
        (LoraFile({}, SIZES), "kohya", "nothing to write"),
        (LoraFile({}, SIZES), "peft", "nothing to write"),
    ):
        assert message in refusal(lambda lora=lora, layout=layout: write_lora(path, lora, layout))
        assert not path.exists()


def test_other_metadata_is_kept_but_not_the_hashes_of_another_file(scratch: Path) -> None:
    metadata = {"ss_network_dim": "2", "sshs_model_hash": "ab"}
    save_file(out_proj(), scratch / "kohya.safetensors", metadata)
    lora = read_lora(scratch / "kohya.safetensors", SIZES)
    assert lora.metadata == read_again(lora, "own", scratch).metadata == {"ss_network_dim": "2"}
    assert read_again(lora, "kohya", scratch).metadata["modelspec.architecture"] == "stable-cascade/lora"


# --- the script -------------------------------------------------------------------------------------


def import_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert", ROOT / "models" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert = import_script()


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "models" / "convert.py"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    sizes = STAGE_C_VERSIONS["tiny"]
    tensors, _ = numbered(published_orders(sizes)[0], 4, "module", sizes)
    tensors |= {"module.24.embeddings": torch.ones(1, 128), "module.24.indices": torch.tensor([900])}
    save_archive(tmp_path / "published.safetensors", tensors)
    return tmp_path / "published.safetensors"


def test_the_script_converts_and_says_what(published: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    done = run_script(published, own, "--to", "own", "--token", "[x]", "--initialise_from", "^cat</w>")
    assert done.returncode == 0, done.stderr
    held = "Stage C tiny; updates of Stage C: 24 of rank 4 with alpha 1; token offsets (1, 128) at 900"
    assert done.stdout.splitlines() == [
        f"read    {published}: UltraPixel's published layout; {held} without names",
        f"wrote   {own}: own layout; {held} of [x] from ^cat</w>",
    ]
    assert_same(deltas_of(read_lora(own)), deltas_of(read_lora(published)))


def test_a_mistake_is_one_sentence_and_exit_code_2(published: Path, tmp_path: Path) -> None:
    done = run_script(published, tmp_path / "out", "--to", "kohya")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert (
        done.stderr.startswith("error: the kohya layout holds whole token rows")
        and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", LAYOUTS)
def test_the_script_writes_every_layout(
    published: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / to
    convert.main([str(published), str(out), "--to", to, "--version", "tiny", "--leave_out", "tokens", "text"])
    assert (
        ": 24 of rank 4 with alpha "
        if to in ("own", "published")
        else ": 24 of rank " in capsys.readouterr().out.splitlines()[1]
    )
    assert read_lora(out).tokens is None
    assert_same(deltas_of(read_lora(out)), deltas_of(read_lora(published)))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--version", "2B"], "unknown version '2B' of Stage C: use 3.6B, 1B, tiny, or"),
        (["--version", "1B"], "the LoRA is for Stage C tiny, not for 1B"),
        (["--token", "a", "--token", "b"], "brings 1 token rows, but 2 names"),
        (["--initialise_from", "cat"], "give that too"),
        (["--token", "a", "--initialise_from", "("], "no regular expression"),
    ],
)
def test_the_script_refuses_wrong_flags(
    published: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    assert message in refusal(
        lambda: convert.main([str(published), str(tmp_path / "o"), "--to", "own", *flags])
    )
    assert not (tmp_path / "o").exists()


def test_a_configuration_gives_the_sizes(tmp_path: Path) -> None:
    assert convert.sizes_of(str(ROOT / "configs" / "tiny" / "stage_c.yaml")) == STAGE_C_VERSIONS["tiny"]
    assert convert.sizes_of(None) is None
