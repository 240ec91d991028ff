"""Conditioning on a CLIP of random weights: which layer, which token, which folder, and the errors."""

import json
import shutil
import warnings
from pathlib import Path

import modules.torchvision_operators  # noqa: F401

# isort: split
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.utils import logging

from core.pipeline.conditioning import Conditions, conditions, stack
from core.weights.clip import ImageEncoder, TextCondition, TextEncoder, clip_pixels

LENGTH, WIDTH, PROJECTED = 16, 32, 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
END = len(VOCABULARY) - 1
ADDED = END + 1  # the id of the first added token


def text_config(**changes) -> CLIPTextConfig:
    sizes = {
        "vocab_size": ADDED + 1, "hidden_size": WIDTH, "intermediate_size": 48, "projection_dim": PROJECTED,
        "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": LENGTH,
        "bos_token_id": END - 1, "eos_token_id": END, "initializer_factor": 20.0,
    }  # fmt: skip
    return CLIPTextConfig(**{**sizes, **changes})


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=48, projection_dim=PROJECTED, num_hidden_layers=2,
        num_attention_heads=2, image_size=32, patch_size=16, initializer_factor=20.0,
    )  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_model(model: torch.nn.Module, folder: Path) -> None:
    """As published files are written: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.to_json_file(folder / "config.json")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def text_model() -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(text_config()).eval()
    for parameter in model.text_model.final_layer_norm.parameters():  # far from the identity it starts as
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def folder(tmp_path, text_model) -> Path:
    write_model(text_model, tmp_path / "models" / "text_encoder")
    write_tokenizer(tmp_path / "models" / "tokenizer")
    return tmp_path / "models"


@pytest.fixture
def encoder(folder) -> TextEncoder:
    return TextEncoder.load(str(folder), torch.float32)


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """A hub cache of the test's own, and no way to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def by_hand(model: CLIPTextModelWithProjection, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last layer's output (1, n, D) and the projection of its last token, with plain matrix products.

    `ids` without padding: in a causal model nothing that follows a token changes it.
    """
    w = {name: value.double() for name, value in model.state_dict().items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        return torch.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    text = "text_model"
    x = w[f"{text}.embeddings.token_embedding.weight"][ids]
    x = x + w[f"{text}.embeddings.position_embedding.weight"][: len(ids)]
    hidden = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.double).triu(1)
    for i in range(model.config.num_hidden_layers):
        layer = f"{text}.encoder.layers.{i}"
        normed = norm(x, f"{layer}.layer_norm1")
        q, k, v = (
            linear(normed, f"{layer}.self_attn.{part}_proj").unflatten(-1, (2, -1)).transpose(0, 1)
            for part in "qkv"
        )
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + hidden).softmax(-1)
        x = x + linear((weights @ v).transpose(0, 1).flatten(1), f"{layer}.self_attn.out_proj")
        inner = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(inner * torch.sigmoid(1.702 * inner), f"{layer}.mlp.fc2")
    pooled = linear(norm(x[-1], f"{text}.final_layer_norm"), "text_projection")
    return x[None], pooled[None, None]


def ids_of(prompt: str) -> list[int]:
    """Start, one token per letter (the last of a word ends it), end."""
    tokens = [t for word in prompt.split() for t in [*word[:-1], word[-1] + "</w>"]]
    return [END - 1, *(VOCABULARY.index(token) for token in tokens), END]


# -------------------------------------------------------------------------------------------------- text


def test_tokens_and_pooled_equal_a_computation_by_hand(folder, text_model):
    encoder = TextEncoder.load(str(folder), torch.float64)
    for prompt in ("", "fox", "a red fox"):
        condition = encoder.encode([prompt], "cpu")[prompt]
        assert condition.tokens.shape == (1, LENGTH, WIDTH)
        assert condition.pooled.shape == (1, 1, PROJECTED)
        tokens, pooled = by_hand(text_model, ids_of(prompt))
        torch.testing.assert_close(condition.tokens[:, : tokens.shape[1]], tokens)
        torch.testing.assert_close(condition.pooled, pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_text_tower_is_that_of_transformers_bit_for_bit(folder, tmp_path, dtype, activation):
    torch.manual_seed(1)
    theirs = CLIPTextModelWithProjection(text_config(hidden_act=activation)).to(dtype).eval()
    write_model(theirs, folder / "text_encoder")
    encoder = TextEncoder.load(str(folder), dtype)
    captured = []
    theirs.text_model.final_layer_norm.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    for prompts in (["fox"], ["", "a red fox"], ["a b c d e f g h i j k l m n"]):
        ids, mask = encoder.tokenize(prompts)
        with torch.no_grad():
            last = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
            tokens, pooled = encoder.embed_ids(ids, mask)
        assert torch.equal(tokens, captured[-1])
        ends = (ids == END).int().argmax(dim=1)
        theirs_pooled = theirs.text_projection(last[torch.arange(len(ids)), ends][:, None])
        torch.testing.assert_close(pooled, theirs_pooled)
        assert not torch.allclose(tokens, last, atol=0.1)


def test_the_text_tower_of_a_file_of_all_of_clip_has_the_sizes_of_its_part(folder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({"model_type": "clip", "text_config": json.loads(path.read_text())}))
    assert (
        TextEncoder.load(str(folder), torch.float32).encode(["fox"], "cpu")["fox"].tokens.shape[-1] == WIDTH
    )


def test_an_unknown_activation_is_named(folder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "swish"}))
    with pytest.raises(
        ValueError, match="text encoder cannot be loaded .*'swish' is not one of quick_gelu, gelu"
    ):
        TextEncoder.load(str(folder), torch.float32)


@pytest.mark.parametrize("eos_token_id", [2, END, 7])
def test_pooled_is_at_the_first_end_of_text_whatever_the_config_says(folder, text_model, eos_token_id):
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": eos_token_id}))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<cat>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = TextEncoder.load(str(folder), torch.float64)
    start, a, end = ids_of("a")
    assert encoder.tokenizer.encode("<cat> a").ids == [start, ADDED, a, end]
    tokens, pooled = by_hand(text_model, [start, ADDED, a, end])
    condition = encoder.encode(["<cat> a"], "cpu")["<cat> a"]
    torch.testing.assert_close(condition.tokens[:, :4], tokens)
    torch.testing.assert_close(condition.pooled, pooled)


def test_padding_is_masked(encoder):
    """A padded position sees the prompt and not the padding before it."""
    text = encoder.model.text_model
    condition = encoder.encode(["fox"], "cpu")["fox"]
    ids, mask = encoder.tokenize(["fox"])
    without = text(ids, torch.ones_like(mask))
    masked = condition.tokens
    torch.testing.assert_close(masked[:, :5], without[:, :5])
    assert not torch.allclose(masked[:, 7:], without[:, 7:], atol=1e-2)


def test_every_distinct_prompt_is_encoded_once_and_alone(encoder):
    calls = []
    with encoder.model.register_forward_hook(lambda *_: calls.append(1)):
        together = encoder.encode(["fox", "", "fox", "a red fox"], "cpu")
    assert list(together) == ["fox", "", "a red fox"] and len(calls) == 3
    alone = encoder.encode(["a red fox"], "cpu")["a red fox"]
    assert torch.equal(alone.tokens, together["a red fox"].tokens)
    assert torch.equal(alone.pooled, together["a red fox"].pooled)
    assert not together["fox"].tokens.requires_grad


def test_long_prompts_are_cut_with_a_warning(encoder):
    fits, long = "a b c d e f g h i j k l m n", "a b c d e f g h i j k l m n o p q"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = encoder.encode([fits], "cpu")[fits]
    with pytest.warns(UserWarning, match="3 tokens too long; what follows is cut: 'o p q") as caught:
        condition = encoder.encode([long], "cpu")[long]
    assert len(caught) == 1
    assert torch.equal(condition.tokens, expected.tokens) and torch.equal(condition.pooled, expected.pooled)


def test_dtype_and_device(folder):
    encoder = TextEncoder.load(str(folder), torch.bfloat16)
    condition = encoder.encode(["fox"], "cpu")["fox"]
    assert condition.tokens.dtype == condition.pooled.dtype == torch.bfloat16
    assert condition.tokens.device.type == "cpu"
    assert encoder.to("meta") is encoder and encoder.model.text_projection.weight.is_meta


# --------------------------------------------------------------------------------------------- conditions


def test_conditions_and_their_halves():
    text = TextCondition(torch.randn(1, 7, 5), torch.randn(1, 1, 4))
    empty = TextCondition(torch.randn(1, 7, 5), torch.randn(1, 1, 4))
    embedding = torch.randn(1, 1, 3)
    conditional, unconditional = conditions(text, embedding, 3), conditions(empty, None, 3)
    assert torch.equal(conditional.clip_img, embedding)
    assert torch.equal(unconditional.clip_img, torch.zeros(1, 1, 3))
    both = stack(conditional, unconditional)
    assert both.clip_text.shape == (2, 7, 5) and torch.equal(both.clip_text[0], text.tokens[0])
    assert both.clip_text_pooled.shape == (2, 1, 4) and torch.equal(both.clip_text_pooled[1], empty.pooled[0])
    assert torch.equal(both.clip_img, torch.cat([embedding, torch.zeros(1, 1, 3)]))


def test_conditions_move_as_one():
    half = Conditions(torch.ones(1, 7, 5), torch.ones(1, 1, 4), torch.ones(1, 1, 3)).to(
        "meta", torch.bfloat16
    )
    for tensor in (half.clip_text, half.clip_text_pooled, half.clip_img):
        assert tensor.device.type == "meta" and tensor.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------- image


@pytest.mark.parametrize("size", [(64, 48), (40, 90), (32, 32), (500, 20)])
def test_pixels_are_those_of_transformers(size):
    noise = Image.effect_noise(size, 60).convert("RGB")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(noise, return_tensors="pt")["pixel_values"]
    ours = clip_pixels(noise, 32)
    assert ours.shape == (1, 3, 32, 32)
    assert (ours - expected).abs().max() < 2.1 / 255 / 0.26  # one or two 8-bit steps: they round differently


def test_image_embedding(tmp_path):
    torch.manual_seed(1)
    model = CLIPVisionModelWithProjection(vision_config()).eval()
    write_model(model, tmp_path / "image_encoder")
    encoder = ImageEncoder.load(str(tmp_path), torch.float32)
    image = Image.effect_noise((70, 50), 90).convert("RGBA")
    embedding = encoder.encode(image, "cpu")
    assert embedding.shape == (1, 1, PROJECTED) and not embedding.requires_grad
    expected = model(pixel_values=clip_pixels(image, 32)).image_embeds[:, None]
    torch.testing.assert_close(embedding, expected)
    assert ImageEncoder.load(str(tmp_path), torch.bfloat16).encode(image, "cpu").dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ loading


def test_model_and_tokenizer_side_by_side(folder, tmp_path, encoder):
    flat = tmp_path / "flat"
    shutil.copytree(folder / "text_encoder", flat)
    shutil.copytree(folder / "tokenizer", flat, dirs_exist_ok=True)
    expected = encoder.encode(["fox"], "cpu")["fox"]
    condition = TextEncoder.load(str(flat), torch.float32).encode(["fox"], "cpu")["fox"]
    assert torch.equal(condition.tokens, expected.tokens)


def test_both_towers_in_one_file_load_quietly(tmp_path, capfd):
    config = CLIPConfig(
        text_config=text_config().to_dict(), vision_config=vision_config().to_dict(), projection_dim=PROJECTED
    )
    write_model(CLIPModel(config), tmp_path)
    write_tokenizer(tmp_path)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    text = TextEncoder.load(str(tmp_path), torch.float32)
    image = ImageEncoder.load(str(tmp_path), torch.float32)
    assert "".join(capfd.readouterr()) == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    stored = load_file(tmp_path / "model.safetensors")
    for name, value in [*text.model.state_dict().items(), *image.model.state_dict().items()]:
        assert torch.equal(value, stored[name]), name


def test_hub_id_in_the_local_cache(folder, tmp_path, encoder):
    repository = tmp_path / "hub" / "models--someone--some-model"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    cached = TextEncoder.load("someone/some-model", torch.float32)
    expected = encoder.encode(["fox"], "cpu")["fox"]
    assert torch.equal(cached.encode(["fox"], "cpu")["fox"].tokens, expected.tokens)


def test_nothing_is_downloaded_unasked_and_only_what_is_needed(folder, monkeypatch):
    calls = []

    def fake_download(repository, allow_patterns, local_files_only):
        calls.append((repository, local_files_only))
        wanted = {"text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/vocab.json"}
        assert wanted <= set(allow_patterns)
        assert not any("stage" in pattern or pattern.startswith("*") for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    TextEncoder.load("someone/some-model", torch.float32)
    TextEncoder.load("someone/some-model", torch.float32, allow_download=True)
    TextEncoder.load(str(folder), torch.float32, allow_download=True)
    assert calls == [("someone/some-model", True), ("someone/some-model", False)]


@pytest.mark.parametrize("source", ["no-such-folder", "someone/no-such-model", "./a/b/c"])
def test_missing_source_names_the_way_out(source):
    message = f"^{source}: the text encoder cannot be found .* neither"
    with pytest.raises(FileNotFoundError, match=message) as error:
        TextEncoder.load(source, torch.float32)
    assert "name its folder" in str(error.value) and "--allow_download" in str(error.value)
    assert "download.py" not in str(error.value)  # which puts it into models/ alone
    with pytest.raises(FileNotFoundError, match="the image encoder cannot be found .* --allow_download"):
        ImageEncoder.load(source, torch.float32)


def test_offline_wins_over_allow_download():
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE forbids the download"):
        TextEncoder.load("someone/no-such-model", torch.float32, allow_download=True)


@pytest.mark.parametrize(
    "removed, message",
    [
        ("text_encoder/config.json", "text_encoder: the text encoder is incomplete, config.json is missing"),
        ("text_encoder/model.safetensors", "incomplete, model.safetensors is missing"),
        ("tokenizer/merges.txt", "tokenizer: the tokenizer is incomplete, merges.txt is missing"),
    ],
)
def test_missing_files_are_named(folder, removed, message):
    (folder / removed).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        TextEncoder.load(str(folder), torch.float32)


@pytest.mark.parametrize(
    "damaged", ["text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/vocab.json"]
)
def test_damaged_files_are_named(folder, damaged):
    (folder / damaged).write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=f"{Path(damaged).parent}: .* cannot be loaded"):
        TextEncoder.load(str(folder), torch.float32)


def test_missing_and_misshapen_tensors_are_errors(folder):
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    projection = tensors.pop("text_projection.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing, text_projection.weight among them"):
        TextEncoder.load(str(folder), torch.float32)
    save_file({**tensors, "text_projection.weight": projection[:3]}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the text encoder cannot be loaded"):
        TextEncoder.load(str(folder), torch.float32)
