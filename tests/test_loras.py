"""LoRAs with weights: read, merged wherever the networks are, adding up, and exactly undone."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from check_reference import CLIP_INPUTS, NETWORK_BOUND, read_reference, relative_error
from conftest import ROOT, random_pipeline
from torch import Tensor

from core.config.schema import StageCConfig
from core.config.settings import Job, Settings
from core.config.sizes import STAGE_C_VERSIONS, StageCSizes
from core.config.yaml import load_stage_c
from core.pipeline.pipeline import UltraPixelPipeline
from core.weights.checkpoint import CheckpointError, read_tensors
from core.weights.clip import TextEncoder
from core.weights.lora.files import LoraFile, LoraTokens, write_lora
from core.weights.lora.merging import (
    LoraMerger,
    WeightedLora,
    check_loras,
    load_loras,
    split_weight,
    uncalled,
)
from core.weights.lora.names import published_orders, stage_c_weights
from core.weights.lora.reading import find_lora_file, read_lora
from modules.lora import LoraUpdate, MergedLora
from modules.stage_c import StageC

sys.path.insert(0, str(ROOT / "models"))
import convert  # noqa: E402
from random_family import Family, randomise  # noqa: E402

SIZES = Family().stage_c
JOB = Job("a [x] boat", 96, 96, seed=3)
QUICK = Settings(steps=1, steps_b=1)
TEXT_WEIGHT = "text_model.encoder.layers.0.mlp.fc1.weight"


def update_of(shape: tuple[int, ...], rank: int = 2, size: float = 0.1) -> LoraUpdate:
    return LoraUpdate(torch.randn(rank, shape[1]) * size, torch.randn(shape[0], rank), alpha=3.0)


def make_lora(
    seed: int, tokens: LoraTokens | None = None, text: bool = False, sizes: StageCSizes = SIZES
) -> LoraFile:
    """A LoRA of the attention, with or without updates of the text encoder."""
    torch.manual_seed(seed)
    shapes = stage_c_weights(sizes)
    updates = {name: update_of(shapes[name], 2 + seed % 2) for name in published_orders(sizes)[0]}
    texts = {TEXT_WEIGHT: update_of((2 * sizes.c_clip_text, sizes.c_clip_text))} if text else {}
    return LoraFile(updates, sizes, texts, tokens)


def new_token(name: str | None = "[x]", row: int = 10**6) -> LoraTokens:
    torch.manual_seed(1)
    known = {} if name is None else {"names": (name,), "initialise_from": ("^a</w>",)}
    return LoraTokens(torch.randn(1, SIZES.c_clip_text), (row,), **known)


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def pipeline(family_folder: Path) -> UltraPixelPipeline:
    return random_pipeline(family_folder)


def pixels(pipeline: UltraPixelPipeline, *loras: WeightedLora, job: Job = JOB) -> Tensor:
    pipeline.set_loras(loras)
    return pipeline.run([job], QUICK)[0].pixels


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0), ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir/a:-1", "dir/a", -1.0), (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:.5", r"C:\loras\a.safetensors", 0.5), ("C:/a", "C:/a", 1.0),
        ("C:a.safetensors", "C:a.safetensors", 1.0), ("a:b/c", "a:b/c", 1.0), ("a:b/c:2", "a:b/c", 2.0),
    ],
)  # fmt: skip
def test_a_weight_stands_behind_a_colon(text: str, path: str, weight: float) -> None:
    assert split_weight(text) == (path, weight)


@pytest.mark.parametrize("text", ["a.safetensors:strong", "a.safetensors:", "a.safetensors:nan", "a:b:1e999"])
def test_a_weight_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no number: write FILE, or FILE:0.8"):
        split_weight(text)


def test_a_file_with_a_colon_in_its_name_needs_no_weight(tmp_path: Path) -> None:
    (tmp_path / "a:b").touch()
    assert split_weight(f"{tmp_path}/a:b") == (f"{tmp_path}/a:b", 1.0)
    assert split_weight(f"{tmp_path}/a:b:2") == (f"{tmp_path}/a:b", 2.0)


@pytest.fixture
def config(family_folder: Path) -> StageCConfig:
    return load_stage_c(family_folder / "stage_c.yaml")


def test_files_are_read_with_their_weights(config: StageCConfig, tmp_path: Path) -> None:
    for layout in ("own", "kohya", "peft"):
        write_lora(tmp_path / layout, make_lora(1), layout)
    loras = load_loras([f"{tmp_path}/own:0.5", f"{tmp_path}/kohya", f"{tmp_path}/peft:2"], config)
    assert [lora.weight for lora in loras] == [0.5, 1.0, 2.0]
    deltas = [lora.file.updates[published_orders(SIZES)[0][1]].delta((192, 64)) for lora in loras]
    for delta in deltas[1:]:
        torch.testing.assert_close(delta, deltas[0], rtol=1e-4, atol=1e-5)


def test_files_that_do_not_fit_are_named(config: StageCConfig, tmp_path: Path) -> None:
    other = STAGE_C_VERSIONS["tiny"]
    write_lora(tmp_path / "tiny.safetensors", make_lora(1, sizes=other), "own")
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors: the LoRA is for Stage C tiny"):
        load_loras([str(tmp_path / "tiny.safetensors")], config)
    with pytest.raises(ValueError, match=r"mine: the LoRA is for a Stage C tiny, not for this one"):
        check_loras([WeightedLora(make_lora(1, sizes=other), 1.0, "mine")], config)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        load_loras([str(tmp_path / "nowhere.safetensors")], config)


def test_names_of_tokens_come_from_the_configuration(config: StageCConfig, tmp_path: Path) -> None:
    path = tmp_path / "lora_cat.safetensors"
    write_lora(path, make_lora(1, new_token(None)), "published")
    named = replace(config, train_tokens=(("[cat]", "^a</w>"),))
    (lora,) = load_loras([str(path)], named)
    assert lora.tokens == ["[cat]"]
    assert lora.file.tokens.initialise_from == ("^a</w>",)
    assert load_loras([str(path)], config)[0].tokens == []
    with pytest.raises(ValueError, match=r"lora_cat.*1 token rows, but 2 names.*'train_tokens'"):
        load_loras([str(path)], replace(config, train_tokens=(("[a]", None), ("[b]", None))))
    own = tmp_path / "own.safetensors"
    write_lora(own, make_lora(1, replace(new_token(), initialise_from=None)), "own")
    given = replace(config, train_tokens=(("[y]", None), ("[x]", "^b</w>")))
    assert load_loras([str(own)], given)[0].file.tokens.initialise_from == ("^b</w>",)
    write_lora(own, make_lora(1, new_token()), "own")
    assert load_loras([str(own)], named)[0].tokens == ["[x]"]  # the file knows better


def test_the_published_training_configuration_names_the_published_token() -> None:
    path = ROOT / "configs" / "training" / "lora_personalization.yaml"
    assert load_stage_c(path).train_tokens == (("[roubaobao]", "^cat</w>"),)


def test_two_loras_do_not_bring_one_token_with_different_rows(config: StageCConfig) -> None:
    loras = [WeightedLora(make_lora(1, new_token("[x]")), 1.0, "first"),
             WeightedLora(make_lora(2, new_token("[X]")), 0.5, "second")]  # fmt: skip
    check_loras(loras, config)
    moved = replace(new_token("[X]"), values=torch.ones(1, SIZES.c_clip_text))
    loras[1] = WeightedLora(make_lora(2, moved), 0.5, "second")
    with pytest.raises(ValueError, match=r"first and second bring different rows for the token '\[X\]'"):
        check_loras(loras, config)


def test_prompts_without_the_token_are_told() -> None:
    lora = WeightedLora(make_lora(1, new_token("[x]")), 1.0, "cat.safetensors")
    plain = WeightedLora(make_lora(1), 1.0, "style.safetensors")
    assert uncalled([lora, plain], ["a [X] boat"]) == []
    (sentence,) = uncalled([lora, plain], ["a boat"])
    assert all(part in sentence for part in ("'a boat'", "[x]", "cat.safetensors"))
    assert "2 of 3 prompts" in uncalled([lora], ["a boat", "[x]", "a ship"])[0]


# --- merging --------------------------------------------------------------------------------------


def test_merged_updates_are_the_references(reference_folder: Path) -> None:
    ref = read_reference(reference_folder / "lora_stage_c.safetensors")
    sizes = StageCSizes(**{k: _tuples(v) for k, v in ref.config["stage_c"].items()})
    updates = {
        name: LoraUpdate(
            *(ref.weights[f"lora/module.{i}.lora_{w}"] for w in ("down", "up")), ref.config["alpha"]
        )
        for i, name in enumerate(ref.config["order"])
    }
    halves = [WeightedLora(LoraFile(updates, sizes), weight) for weight in (0.75, 0.25)]
    stage_c = StageC(**asdict(sizes)).eval()
    stage_c.load_state_dict({n: w for n, w in ref.weights.items() if not n.startswith("lora/")})
    before, merger = state(stage_c), LoraMerger()
    merger.wanted = tuple(halves)
    merger.into_stage_c(stage_c)
    with torch.no_grad():
        out = stage_c(ref.inputs["x"], ref.inputs["r"], *(ref.inputs[k] for k in CLIP_INPUTS))
    assert relative_error(out, ref.outputs["out"]) < NETWORK_BOUND
    merger.wanted = ()
    merger.into_stage_c(stage_c)
    assert same(before, state(stage_c))


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_add_up_in_any_order_and_are_undone_exactly(dtype: torch.dtype) -> None:
    stage_c = StageC(**asdict(SIZES))
    randomise(stage_c)
    stage_c.to(dtype)
    before, shapes = state(stage_c), stage_c_weights(SIZES)
    a, b = (WeightedLora(make_lora(seed), weight) for seed, weight in ((1, 0.8), (2, -0.5)))
    merger, merged = LoraMerger(), []
    for wanted in ((a, b), (b, a), (a,), (), (a, b)):
        merger.wanted = wanted
        merger.into_stage_c(stage_c)
        merger.into_stage_c(stage_c)  # nothing is added twice
        merged.append(state(stage_c))
    assert same(merged[0], merged[1])
    assert same(merged[0], merged[4])
    assert same(merged[3], before)
    for name, weight in before.items():
        delta = sum(x.weight * x.file.updates[name].delta(shapes[name]) for x in (a, b)
                    if name in x.file.updates)  # fmt: skip
        assert torch.equal(merged[0][name], (weight.float() + delta).to(dtype))
    assert not same(merged[0], merged[2])


def test_a_merge_that_fails_halfway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    stage_c = StageC(**asdict(SIZES))
    randomise(stage_c)
    before, file, delta, calls = state(stage_c), make_lora(1), LoraUpdate.delta, []

    def full(update: LoraUpdate, shape: torch.Size) -> torch.Tensor:
        calls.append(update)
        if len(calls) == len(file.updates):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return delta(update, shape)

    monkeypatch.setattr(LoraUpdate, "delta", full)
    with pytest.raises(torch.OutOfMemoryError):
        MergedLora(stage_c, file.updates)
    assert len(calls) > 1 and same(state(stage_c), before)


def test_what_fails_leaves_everything_as_it_was(family_folder: Path) -> None:
    encoder = TextEncoder.load(str(family_folder), torch.float32)
    before, vocabulary, merger = state(encoder.model), encoder.tokenizer.backend.get_vocab(), LoraMerger()
    broken = LoraFile({}, SIZES, {"text_model.nothing.weight": update_of((8, 8))}, new_token())
    merger.wanted = (WeightedLora(broken),)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"text_model\.nothing\.weight"):
            merger.into_text(encoder)
        assert same(before, state(encoder.model))
        assert encoder.tokenizer.backend.get_vocab() == vocabulary


# --- in the pipeline ------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
def test_the_pipeline_uses_what_was_set_last(
    pipeline: UltraPixelPipeline, family_folder: Path, resident: bool
) -> None:
    a = WeightedLora(make_lora(1, new_token(), text=True))
    b = WeightedLora(make_lora(2), 0.7)
    plain = pixels(pipeline)
    other = UltraPixelPipeline.from_config(
        family_folder / "stage_c.yaml", family_folder / "stage_b.yaml",
        family_folder / "ultrapixel_t2i.safetensors", resident=resident,
    )  # fmt: skip
    with_a = pixels(other, a)  # set before anything is loaded
    with_both = pixels(other, a, b)
    assert not torch.equal(plain, with_a)
    assert not torch.equal(with_a, with_both)
    assert torch.equal(pixels(other, b, a), with_both)
    assert torch.equal(pixels(other, a), with_a)
    assert torch.equal(pixels(other), plain)


@pytest.mark.parametrize("part", ["updates", "text_updates", "tokens"])
def test_every_part_of_a_lora_counts(pipeline: UltraPixelPipeline, part: str) -> None:
    whole = make_lora(1, new_token(), text=True)
    alone = LoraFile({}, SIZES) if part != "updates" else LoraFile(whole.updates, SIZES)
    alone = replace(alone, **{part: getattr(whole, part)})
    plain, changed = pixels(pipeline), pixels(pipeline, WeightedLora(alone))
    assert not torch.equal(plain, changed)
    if part == "tokens":
        other = replace(JOB, prompt="a boat")
        assert torch.equal(pixels(pipeline, job=other), pixels(pipeline, WeightedLora(alone), job=other))


def test_a_published_file_works_with_the_configured_token(
    pipeline: UltraPixelPipeline, family_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lora_cat.safetensors"
    write_lora(path, make_lora(1, new_token(None)), "published")
    config = replace(load_stage_c(family_folder / "stage_c.yaml"), train_tokens=(("[x]", "^a</w>"),))
    named = pixels(pipeline, *load_loras([str(path)], config))
    assert torch.equal(
        named, pixels(pipeline, WeightedLora(replace(read_lora(path, SIZES), tokens=new_token())))
    )
    with pytest.raises(ValueError, match="'train_tokens' in Stage C's configuration"):
        pixels(pipeline, *load_loras([str(path)], pipeline.config_c))
    assert path.name in str(pipeline.files())
    pipeline.set_loras([])
    assert path.name not in str(pipeline.files())


# --- models/convert.py ----------------------------------------------------------------------------


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    """A LoRA of the tiny family in our layout, with a token and an update of its text encoder."""
    sizes = STAGE_C_VERSIONS["tiny"]
    torch.manual_seed(2)
    tokens = LoraTokens(torch.randn(1, sizes.c_clip_text), (777,), ("[x]",), ("^balloon</w>",))
    write_lora(tmp_path / "cat.safetensors", make_lora(1, tokens, text=True, sizes=sizes), "own")
    return tmp_path / "cat.safetensors"


def test_conversion_to_kohya_writes_whole_rows(cat: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "kohya.safetensors", ROOT / "models" / "tiny"
    arguments = [str(cat), str(out), "--to", "kohya"]
    with pytest.raises(ValueError, match="--text_encoder FOLDER"):
        convert.main(arguments)
    convert.main([*arguments, "--text_encoder", str(folder), "--leave_out", "text"])
    encoder = TextEncoder.load(str(folder), torch.float32)
    row = encoder.tokenizer.backend.get_vocab()["balloon</w>"]
    tokens = read_lora(out).tokens
    assert (tokens.names, tokens.absolute) == (("[x]",), True)
    base = encoder.model.get_input_embeddings().weight[row]
    torch.testing.assert_close(tokens.values[0], base + read_lora(cat).tokens.values[0])


def test_conversion_checks_updates_of_the_text_encoder(cat: Path, tmp_path: Path) -> None:
    lora = read_lora(cat)
    wrong = replace(lora, text_updates={TEXT_WEIGHT: update_of((16, 24))})
    write_lora(cat, wrong, "own")
    folder = str(ROOT / "models" / "tiny")
    with pytest.raises(ValueError, match=r"mlp\.fc1\.weight is for a weight of \(16, 24\)"):
        convert.main([str(cat), str(tmp_path / "out"), "--to", "own", "--text_encoder", folder])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["own", "published", "kohya", "peft"])
def test_conversion_writes_the_number_format(cat: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / to
    convert.main([str(cat), str(out), "--to", to, "--dtype", "float16", "--leave_out", "tokens", "text"])
    held = {n: t for n, t in read_tensors(find_lora_file(out)).items() if not n.endswith(".alpha")}
    assert {t.dtype for t in held.values()} == {torch.float16}
    name = published_orders(STAGE_C_VERSIONS["tiny"])[0][0]
    found, wanted = (read_lora(path).updates[name].delta((192, 192)) for path in (out, cat))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_numbers_that_do_not_fit_the_format_are_refused(tmp_path: Path) -> None:
    lora = make_lora(1)
    name = next(iter(lora.updates))
    lora.updates[name] = replace(lora.updates[name], up=lora.updates[name].up * 1e6)
    with pytest.raises(ValueError, match="no room"):
        write_lora(tmp_path / "out", lora, "own", torch.float16)
    assert not (tmp_path / "out").exists()
