"""The tiny family's text encoder: its tokenizer, its captions, its training, and the trained files."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from core.config.schema import SceneData
from core.data.loader import LoaderSettings
from core.family.text_encoder import texts_of
from core.scenes.captions import caption
from core.scenes.labelled import FILLERS, Captions, caption_batches, loosen, read_captions
from core.scenes.scene import ATTRIBUTES, labels, sample_scene
from core.weights.clip import TextEncoder, words_of

SCRIPT, CONFIG = (
    ROOT / "train" / "train_text_encoder.py",
    ROOT / "configs" / "tiny" / "train_text_encoder.yaml",
)
TRAINED = ROOT / "models" / "tiny"
HELD_OUT = SceneData(split="held_out")
PROMPT = "Red house on the left, green hills, night with stars"
PROMPT_MEANS = ("night", "stars", "hills", "house", "red", "left")


# --- captions -------------------------------------------------------------------------------------


def test_batches_go_on_from_a_position_and_are_shared_out() -> None:
    scenes, whole = SceneData(count=10), LoaderSettings(batch_size=6, seed=3)
    first, second, third = itertools.islice(caption_batches(scenes, whole, None, 0.5), 3)
    again = list(itertools.islice(caption_batches(scenes, whole, first[1], 0.5), 2))
    assert [batch.texts for batch, _ in again] == [second[0].texts, third[0].texts]
    assert again[1][1] == {"batch": 3}
    halves = [LoaderSettings(batch_size=3, rank=rank, world_size=2, seed=3) for rank in (0, 1)]
    parts = [next(caption_batches(scenes, half, None, 0.5))[0] for half in halves]
    assert parts[0].texts + parts[1].texts == first[0].texts
    assert torch.cat([part.labels for part in parts]).equal(first[0].labels)


def test_captions_have_the_labels_of_their_scenes() -> None:
    found = read_captions(HELD_OUT, range(8), seed=0)
    assert found.labels.tolist() == [list(labels(sample_scene(n, "held_out"))) for n in range(8)]


def test_a_loosened_caption_keeps_the_words_that_mean_something() -> None:
    for number in range(50):
        text = caption(sample_scene(number), number)
        telling = set(text.replace(",", " ").replace(":", " ").split()) - FILLERS
        assert telling <= set(loosen(text, random.Random(number)).split())


def test_the_shipped_words_are_those_of_the_captions_and_a_token_each() -> None:
    shipped = (TRAINED / "tokenizer" / "words.txt").read_text("utf-8").split()
    assert shipped == sorted(words_of(texts_of(SceneData(), 0)))
    vocabulary = json.loads((TRAINED / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert {f"{word}</w>" for word in shipped} <= set(vocabulary)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a text encoder after two updates."""
    folder = tmp_path_factory.mktemp("text")
    overrides = [
        f"checkpoint_path={folder / 'run'}", f"output_path={folder}", f"export_path={folder / 'models'}",
        "updates=2", "batch_size=4", "text_encoder={width: 32, layers: 1, heads: 2, hidden: 32, length: 40}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(CONFIG), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out captions, pooled: sky" in done.stderr
    return folder / "models"


def test_a_run_writes_files_that_load(small: Path) -> None:
    condition = TextEncoder.load(str(small), torch.float32).encode([PROMPT], "cpu")[PROMPT]
    assert condition.tokens.shape == (1, 40, 32) and condition.pooled.shape == (1, 1, 32)


def test_every_word_is_one_token_and_any_text_can_be_written(small: Path) -> None:
    tokenizer = TextEncoder.load(str(small), torch.float32).tokenizer
    text = "A striped hot air balloon, in front of snowy mountains"
    words = text.lower().replace(",", " ,").split()
    assert tokenizer.encode(text, ends=False).tokens == [f"{word}</w>" for word in words]
    strange = "zebra ünïcode 日本 42"
    ids = tokenizer.encode(strange).ids
    assert tokenizer.end_id not in ids[:-1]
    assert "".join(tokenizer.decode(ids[1:-1]).split()) == "".join(strange.split())


def test_padding_repeats_the_end_of_text(small: Path) -> None:
    encoder = TextEncoder.load(str(small), torch.float32)
    ids, mask = encoder.tokenizer.padded(encoder.tokenizer.encode("a tree").ids, 8)
    assert ids[3:] == [encoder.tokenizer.end_id] * 5 and mask == [1] * 4 + [0] * 4
    config = json.loads((small / "text_encoder" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ids[0], ids[3])


# --- the trained files ----------------------------------------------------------------------------


def embed(encoder: TextEncoder, texts: list[str]) -> dict[str, Tensor]:
    """What the stages read of every text, with a constant: pooled, and the mean of the tokens."""
    found = encoder.encode(texts, "cpu", together=True)
    rows = {"pooled": [found[text].pooled[0, 0] for text in texts],
            "tokens": [found[text].tokens[0].mean(dim=0) for text in texts]}  # fmt: skip
    return {part: torch.cat([torch.stack(row), torch.ones(len(row), 1)], dim=1) for part, row in rows.items()}


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    if not (TRAINED / "text_encoder").is_dir():
        pytest.skip("models/tiny has no text encoder")
    return TextEncoder.load(str(TRAINED), torch.float32)


@pytest.fixture(scope="module")
def classifiers(encoder: TextEncoder) -> dict[str, list[Tensor]]:
    """Linear classifiers of all attributes, fitted to the embeddings of captions for training."""
    known = read_captions(SceneData(), range(500), seed=0)
    inputs = embed(encoder, known.texts)
    goals = [
        torch.nn.functional.one_hot(known.labels[:, i], len(values)).float()
        for i, values in enumerate(ATTRIBUTES.values())
    ]
    return {part: [torch.linalg.pinv(x, rtol=1e-4) @ goal for goal in goals] for part, x in inputs.items()}


def answers(
    encoder: TextEncoder, classifiers: dict[str, list[Tensor]], texts: list[str]
) -> dict[str, Tensor]:
    """The attributes (B, attributes) that the classifiers tell from texts."""
    inputs = embed(encoder, texts)
    return {part: torch.stack([(inputs[part] @ w).argmax(1) for w in rows], 1)
            for part, rows in classifiers.items()}  # fmt: skip


@pytest.mark.parametrize("loosened", [0.0, 1.0])
def test_all_attributes_of_held_out_captions_can_be_told(
    encoder: TextEncoder, classifiers: dict[str, list[Tensor]], loosened: float
) -> None:
    unseen: Captions = read_captions(HELD_OUT, range(60), seed=1, loosened=loosened)
    for part, found in answers(encoder, classifiers, unseen.texts).items():
        share = (found == unseen.labels).float().mean(dim=0)
        assert share.min() >= 59 / 60, part


def test_plain_phrases_are_understood(encoder: TextEncoder, classifiers: dict[str, list[Tensor]]) -> None:
    found = answers(encoder, classifiers, [PROMPT])["pooled"][0].tolist()
    told = [values[i] for values, i in zip(ATTRIBUTES.values(), found, strict=True)]
    assert tuple(told[: len(PROMPT_MEANS)]) == PROMPT_MEANS


def test_the_embeddings_have_unit_scale(encoder: TextEncoder) -> None:
    condition = encoder.encode([PROMPT], "cpu")[PROMPT]
    for value in (condition.tokens, condition.pooled):
        assert 0.5 < value.square().mean() < 2


def test_the_files_are_small() -> None:
    paths = [path for part in ("text_encoder", "tokenizer") for path in (TRAINED / part).glob("*")]
    assert sum(path.stat().st_size for path in paths) < 2e6
