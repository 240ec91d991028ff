"""New tokens: found in any prompt, set where they belong, pooled at the end of the text, and gone again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from core.weights.clip import TextCondition, TextEncoder
from core.weights.lora.files import LoraTokens
from core.weights.lora.tokens import MergedTokens, add_tokens, base_rows, matching_rows, mentions, whole_rows

TINY = str(ROOT / "models" / "tiny")  # whose text encoder has words of more than a letter
PROMPTS = ("a striped balloon", "a [stripes] balloon over the sea", "sks, desks (sks)", "")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest) -> TextEncoder:
    return TextEncoder.load(TINY, request.param)


@pytest.fixture
def encoder(loaded: TextEncoder) -> TextEncoder:
    """An encoder that every test leaves as it was."""
    before = state(loaded)
    yield loaded
    after = state(loaded)
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


def state(encoder: TextEncoder) -> tuple[object, list[Tensor]]:
    """All that may not be different afterwards."""
    texts = encoder.encode(PROMPTS, "cpu").values()
    ids = [encoder.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    known = encoder.tokenizer.backend.get_vocab(), ids, encoder.model.config.vocab_size
    weights = [parameter.clone() for parameter in encoder.model.parameters()]
    return known, [*weights, *(t for text in texts for t in (text.tokens, text.pooled))]


def embedding(encoder: TextEncoder) -> Tensor:
    return encoder.model.get_input_embeddings().weight


def width(encoder: TextEncoder) -> int:
    return embedding(encoder).shape[1]


def ids(encoder: TextEncoder, prompt: str) -> list[int]:
    return encoder.tokenizer.encode(prompt).ids[1:-1]


def encode(encoder: TextEncoder, prompt: str) -> TextCondition:
    return encoder.encode([prompt], "cpu")[prompt]


def offsets(encoder: TextEncoder, count: int, **known: object) -> LoraTokens:
    size = len(embedding(encoder))
    known = {"indices": tuple(range(size, size + count))} | known
    return LoraTokens(torch.randn(count, width(encoder)), **known)


# --- rows -----------------------------------------------------------------------------------------


def test_expressions_find_vocabulary_entries_but_no_added_ones(encoder: TextEncoder) -> None:
    vocabulary = encoder.tokenizer.backend.get_vocab()
    assert matching_rows(encoder.tokenizer, "^balloon</w>") == [vocabulary["balloon</w>"]]
    both = matching_rows(encoder.tokenizer, "^(red|blue)</w>$")
    assert both == sorted([vocabulary["red</w>"], vocabulary["blue</w>"]])
    assert vocabulary["<|endoftext|>"] not in matching_rows(encoder.tokenizer, ".")
    merged = MergedTokens(encoder, offsets(encoder, 1, names=("[balloon]",), initialise_from=(None,)))
    assert merged.rows[0] not in matching_rows(encoder.tokenizer, "balloon")
    merged.undo()


@pytest.mark.parametrize(
    ("expression", "parts"),
    [("^balloons</w>", ["'^balloons</w>'", "balloon</w>"]), ("(", ["'('", "no regular expression"]),
     ("^qqqq$", ["'^qqqq$'"])],
)  # fmt: skip
def test_expressions_that_find_nothing_say_so(
    encoder: TextEncoder, expression: str, parts: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        matching_rows(encoder.tokenizer, expression)
    assert all(part in str(caught.value) for part in parts)


def test_base_rows_are_means_zero_or_their_own(encoder: TextEncoder) -> None:
    red, blue = matching_rows(encoder.tokenizer, "^(red|blue)</w>$")
    new = len(embedding(encoder))
    found = base_rows(encoder, ["^(red|blue)</w>$", None, "^red</w>"], [new, new + 1, blue])
    mean = embedding(encoder)[[red, blue]].float().mean(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], mean, rtol=0, atol=0)
    assert not found[1].any()
    assert torch.equal(found[2], embedding(encoder)[blue].float())


# --- adding ---------------------------------------------------------------------------------------


def test_tokens_are_added_once_and_keep_their_rows(loaded: TextEncoder) -> None:
    fresh = TextEncoder.load(TINY, torch.float32)
    count = len(embedding(fresh))
    assert add_tokens(fresh, ["[stripes]", "sks"]) == [count, count + 1]
    assert add_tokens(fresh, ["[x]", "[STRIPES]"]) == [count + 2, count]
    assert len(embedding(fresh)) == fresh.model.config.vocab_size == count + 3
    assert not embedding(fresh)[count:].any()
    assert torch.equal(embedding(fresh)[:count].to(embedding(loaded).dtype), embedding(loaded))


@pytest.mark.parametrize(
    ("names", "message"),
    [([""], "one word"), (["a b"], "one word"), (["balloon"], r"'\[balloon\]'"), (["ballo"], "already"),
     (["[x]", "[X]"], "twice"), (["<|endoftext|>"], "special"), (["x<|endoftext|>"], "special")],
)  # fmt: skip
def test_names_that_cannot_be_tokens_are_refused(
    encoder: TextEncoder, names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_tokens(encoder, names)


@pytest.mark.parametrize(
    ("prompt", "there"),
    [("[stripes]", 1), ("a [Stripes] balloon", 1), ("[STRIPES]balloon,[stripes]!", 2), ("x[stripes]", 1),
     ("stripes", 0), ("a sks", 1), ("SKS, (sks)", 2), ("asks sksy", 0)],
)  # fmt: skip
def test_tokens_are_found_wherever_they_stand(encoder: TextEncoder, prompt: str, there: int) -> None:
    merged = MergedTokens(
        encoder, offsets(encoder, 2, names=("[Stripes]", "sks"), initialise_from=(None,) * 2)
    )
    assert sum(ids(encoder, prompt).count(row) for row in merged.rows) == there
    assert any(mentions(prompt, name) for name in merged.names) == (there > 0)
    merged.undo()


# --- merging --------------------------------------------------------------------------------------


def test_rows_are_base_plus_weighted_offset(encoder: TextEncoder) -> None:
    tokens = offsets(encoder, 2, names=("[a]", "[b]"), initialise_from=("^(red|blue)</w>$", None))
    mean = embedding(encoder)[matching_rows(encoder.tokenizer, "^(red|blue)</w>$")].float().mean(0)
    merged = MergedTokens(encoder, tokens, 0.5)
    rows = embedding(encoder)[merged.rows]
    assert (merged.names, len(rows)) == (["[a]", "[b]"], 2)
    assert torch.equal(rows[0], (mean + 0.5 * tokens.values[0]).to(rows.dtype))
    assert torch.equal(rows[1], (0.5 * tokens.values[1]).to(rows.dtype))
    merged.undo()


def test_known_words_move_and_come_back(encoder: TextEncoder) -> None:
    (row,) = matching_rows(encoder.tokenizer, "^balloon</w>")
    before = embedding(encoder)[row].float().clone()
    for names in (None, ("balloon</w>",), ("balloon",)):
        tokens = LoraTokens(torch.randn(1, width(encoder)), (row,), names)
        merged = MergedTokens(encoder, tokens)
        assert torch.equal(embedding(encoder)[row], (before + tokens.values[0]).to(embedding(encoder).dtype))
        assert merged.names == []
        merged.undo()


def test_an_index_of_another_vocabulary_is_not_taken_for_a_word(encoder: TextEncoder) -> None:
    tokens = LoraTokens(torch.randn(1, width(encoder)), (5,), ("[a]",), (None,))
    merged = MergedTokens(encoder, tokens)
    assert merged.rows == [len(embedding(encoder)) - 1]
    merged.undo()


def test_a_token_of_several_rows_stands_for_all_of_them(encoder: TextEncoder) -> None:
    values = torch.randn(3, width(encoder))
    tokens = LoraTokens(values, names=("[m]", "sks", "[m]"), absolute=True)
    merged = MergedTokens(encoder, tokens, weight=0.1)  # whole rows have no weight
    assert torch.equal(embedding(encoder)[merged.rows], values.to(embedding(encoder).dtype))
    first, word, second = merged.rows
    found = ids(encoder, "a [M], sks [m]")
    assert [row for row in found if row in merged.rows] == [first, second, word, first, second]
    merged.undo()


def test_tokens_of_several_loras_do_not_see_each_other(encoder: TextEncoder) -> None:
    (red,) = matching_rows(encoder.tokenizer, "^red</w>")
    moved = LoraTokens(torch.randn(1, width(encoder)), (red,))
    from_red = offsets(encoder, 1, names=("[a]",), initialise_from=("^red</w>",))
    base = embedding(encoder)[red].float().clone()
    for pairs in ([(moved, 1.0), (from_red, 0.5)], [(from_red, 0.5), (moved, 1.0)]):
        merged = MergedTokens(encoder, *pairs[0], others=[pairs[1], (from_red, 0.25)])
        new = len(embedding(encoder)) - 1
        dtype = embedding(encoder).dtype
        assert torch.equal(embedding(encoder)[red], (base + moved.values[0]).to(dtype))
        torch.testing.assert_close(
            embedding(encoder)[new].float(), (base + 0.75 * from_red.values[0]).to(dtype).float()
        )
        merged.undo()


@pytest.mark.parametrize(
    ("known", "message"),
    [({}, "names of its new tokens.*'train_tokens'"), ({"names": ("[a]",)}, "start from.*'train_tokens'"),
     ({"names": ("[a]",), "initialise_from": ("^nothing",)}, "'\\^nothing'"),
     ({"names": ("balloon",), "initialise_from": (None,)}, "already")],
)  # fmt: skip
def test_what_is_not_known_is_asked_for_and_nothing_is_changed(
    encoder: TextEncoder, known: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MergedTokens(encoder, offsets(encoder, 1, **known))


def test_text_is_pooled_at_its_end_and_not_at_the_highest_row(encoder: TextEncoder) -> None:
    tokens = offsets(encoder, 1, names=("[a]",), initialise_from=("^red</w>",))
    merged = MergedTokens(encoder, tokens)
    assert merged.rows[0] > encoder.tokenizer.end_id
    ends = [encode(encoder, f"[a] balloon {last}").pooled for last in ("by day", "by night")]
    assert not torch.equal(*ends)  # what stands behind the token counts
    merged.undo()
    row = base_rows(encoder, ["^red</w>"], [len(embedding(encoder))]) - tokens.values
    tokens = LoraTokens(row, tokens.indices, ("[a]",), ("^red</w>",))
    merged = MergedTokens(encoder, tokens, weight=0.0)  # the row of "red" itself
    as_new = encode(encoder, "a [a] balloon by day")
    merged.undo()
    as_word = encode(encoder, "a red balloon by day")
    assert torch.equal(as_new.pooled, as_word.pooled)
    assert torch.equal(as_new.tokens, as_word.tokens)


def test_whole_rows_say_the_same_as_offsets(encoder: TextEncoder) -> None:
    tokens = offsets(encoder, 2, names=("[a]", "[b]"), initialise_from=("^red</w>", None))
    whole = whole_rows(encoder, tokens)
    assert whole.absolute
    assert whole_rows(encoder, whole) is whole
    texts = []
    for each in (tokens, whole):
        merged = MergedTokens(encoder, each)
        texts.append(encode(encoder, "a [a] [b] balloon"))
        merged.undo()
    assert torch.equal(texts[0].tokens, texts[1].tokens)


def test_the_random_family_takes_them_too(family_folder: Path) -> None:
    encoder = TextEncoder.load(str(family_folder), torch.float32)
    before = state(encoder)
    merged = MergedTokens(encoder, offsets(encoder, 1, names=("[a]",), initialise_from=("^a</w>",)))
    assert len(ids(encoder, "x [a]")) == 2
    merged.undo()
    assert before[0] == state(encoder)[0]
