"""New tokens of a text encoder: added to its tokenizer, set in its embedding, and taken back exactly."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import AddedToken, Regex, normalizers
from torch import Tensor, nn

from core.weights.clip import TextEncoder
from core.weights.lora.files import LoraTokens
from core.weights.tokenizer import WORD_END, Tokenizer
from modules.clip_text import ClipText

PRIVATE = 0xF0000  # the first of the characters that stand for the rows of a token with several
NEAR = 4  # vocabulary entries that an error lists


# --- rows -----------------------------------------------------------------------------------------


def matching_rows(tokenizer: Tokenizer, expression: str) -> list[int]:
    """Rows of the vocabulary entries, such as `cat</w>`, in which a regular expression finds something.

    Added tokens are left out. ValueError where it finds nothing, or is no regular expression.
    """
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(f"{expression!r} is no regular expression: {error}") from None
    vocabulary = tokenizer.vocabulary()
    rows = sorted(row for entry, row in vocabulary.items() if pattern.search(entry))
    if not rows:
        near = difflib.get_close_matches(re.sub(r"[\^$\\]", "", expression), vocabulary, NEAR)
        hint = f"; near are {', '.join(near)}" if near else ""
        raise ValueError(f"no entry of the text encoder's vocabulary matches {expression!r}{hint}")
    return rows


def add_tokens(encoder: TextEncoder, names: Sequence[str]) -> list[int]:
    """Add tokens to the tokenizer, enlarge the embedding by their rows, zeros, and return these.

    One that was added before keeps its row. Tokens are found wherever they stand in a prompt and in any case,
    plain words as whole words only. ValueError for a name that cannot be one, or comes twice.
    """
    keys = [_key(name) for name in names]
    known = _added(encoder.tokenizer)
    for i, (name, key) in enumerate(zip(names, keys, strict=True)):
        if key in keys[:i]:
            raise ValueError(f"the new token {name!r} comes twice: give each its own name")
        if key not in known:
            _check_name(encoder.tokenizer, name)
    new = [name for name, key in zip(names, keys, strict=True) if key not in known]
    encoder.tokenizer.backend.add_tokens([AddedToken(name, single_word=_is_word(name)) for name in new])
    rows = _added(encoder.tokenizer)
    found = [rows[key] for key in keys]
    _resize(encoder.model, max([len(_embedding(encoder.model)), *(row + 1 for row in found)]))
    return found


def base_rows(encoder: TextEncoder, expressions: Sequence[str | None], rows: Sequence[int]) -> Tensor:
    """What the tokens at `rows` start from, (n, width) in float32: new ones from the mean of matching rows.

    Without an expression a new one starts from 0. The base row of a vocabulary entry is its own.
    """
    embedding = _embedding(encoder.model).detach()
    ordinary = {*encoder.tokenizer.backend.get_vocab().values()} - {*encoder.tokenizer.added().values()}
    base = torch.zeros(len(rows), embedding.shape[1], device=embedding.device)
    for i, (expression, row) in enumerate(zip(expressions, rows, strict=True)):
        if row in ordinary:
            base[i] = embedding[row]
        elif expression is not None:
            base[i] = embedding[matching_rows(encoder.tokenizer, expression)].float().mean(0)
    return base


def whole_rows(encoder: TextEncoder, tokens: LoraTokens) -> LoraTokens:
    """The tokens with whole rows instead of offsets."""
    if tokens.absolute:
        return tokens
    values = _bases(encoder, tokens) + tokens.values.to(_embedding(encoder.model).device, torch.float32)
    return replace(tokens, values=values.cpu(), initialise_from=None, absolute=True)


def mentions(prompt: str, name: str) -> bool:
    """Whether a prompt holds a token."""
    return re.search(_pattern(name), prompt.lower()) is not None


# --- merging --------------------------------------------------------------------------------------


class MergedTokens:
    """A LoRA's tokens in a text encoder: base row + weight x offset, or whole rows, whatever the weight.

    `others` are further LoRAs' (tokens, weight): offsets of one row add up. `undo` restores tokenizer and
    embedding bit for bit. ValueError, with the encoder as it was, for tokens without a name or a base row.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        tokens: LoraTokens,
        weight: float = 1.0,
        others: Sequence[tuple[LoraTokens, float]] = (),
    ) -> None:
        self.names: list[str] = []  # tokens that were added
        self.rows: list[int] = []  # that were set, in the order of the tokens
        self._encoder, self._tokenizer = encoder, encoder.tokenizer
        self._count = len(_embedding(encoder.model))
        self._saved: dict[int, Tensor] = {}
        self._several: dict[str, list[int]] = {}  # rows of tokens that have more than one
        encoder.tokenizer = copy.deepcopy(encoder.tokenizer)
        try:
            self._merge([(tokens, weight), *others])
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put tokenizer and embedding back as they were."""
        self._encoder.tokenizer = self._tokenizer
        _resize(self._encoder.model, self._count)
        with torch.no_grad():
            for row, value in self._saved.items():
                _embedding(self._encoder.model)[row] = value
        self._saved.clear()

    def _merge(self, loras: Sequence[tuple[LoraTokens, float]]) -> None:
        values: dict[int, Tensor] = {}
        for tokens, weight in loras:
            whole, rows = tokens.values.float(), self._find_rows(tokens)
            base = whole if tokens.absolute else _bases(self._encoder, tokens).cpu()
            for i, row in enumerate(rows):
                held = values.get(row, base[i])
                values[row] = held if tokens.absolute else held + weight * whole[i]
        embedding = _embedding(self._encoder.model)
        self._saved = {
            row: embedding[row].detach().to("cpu", copy=True) for row in values if row < self._count
        }
        with torch.no_grad():
            for row, value in values.items():
                embedding[row] = value
        self.rows = list(values)

    def _find_rows(self, tokens: LoraTokens) -> list[int]:
        """The rows of a LoRA's tokens, added where they are new."""
        rows = [_known_row(self._tokenizer, tokens, i) for i in range(len(tokens.values))]
        if None not in rows:
            return rows
        if tokens.names is None:
            raise ValueError(
                "the LoRA does not hold the names of its new tokens: list them, with the expressions they "
                "start from, as 'train_tokens' in Stage C's configuration"
            )
        new = [name for name, row in zip(tokens.names, rows, strict=True) if row is None]
        for name in dict.fromkeys(new):
            found = iter(self._add(name, new.count(name)))
            rows = [
                next(found) if row is None and other == name else row
                for other, row in zip(tokens.names, rows, strict=True)
            ]
        self.names += [name for name in dict.fromkeys(new) if name not in self.names]
        return rows

    def _add(self, name: str, count: int) -> list[int]:
        """`count` rows for a token; what stands for several of them takes its place in a prompt."""
        if count == 1:
            return add_tokens(self._encoder, [name])
        if _key(name) not in self._several:
            tokenizer = self._encoder.tokenizer
            _check_name(tokenizer, name)
            first = PRIVATE + len(tokenizer)
            characters = [chr(first + i) for i in range(count)]
            self._several[_key(name)] = add_tokens(self._encoder, characters)
            backend = tokenizer.backend
            spelt = normalizers.Replace(Regex(_pattern(name)), "".join(characters))
            backend.normalizer = normalizers.Sequence([backend.normalizer, spelt])
        return self._several[_key(name)]


def _bases(encoder: TextEncoder, tokens: LoraTokens) -> Tensor:
    """What a LoRA's offsets are added to, (n, width); ValueError where the LoRA does not say."""
    count = len(tokens.values)
    known = [_known_row(encoder.tokenizer, tokens, i) for i in range(count)]
    expressions = tokens.initialise_from
    if expressions is None and None in known:
        raise ValueError(
            "the LoRA does not say what its new tokens start from: give the expressions, for inference as "
            "'train_tokens' in Stage C's configuration, to models/convert.py with --initialise_from"
        )
    return base_rows(encoder, expressions or [None] * count, [-1 if row is None else row for row in known])


def _known_row(tokenizer: Tokenizer, tokens: LoraTokens, i: int) -> int | None:
    """The row of a LoRA's i-th token if that is a vocabulary entry; its index alone may be of another one."""
    if tokens.indices is None or tokens.indices[i] in tokenizer.added().values():
        return None
    index = tokens.indices[i]
    entry = tokenizer.backend.id_to_token(index) if index < len(tokenizer) else None
    fits = tokens.names is None or tokens.names[i] in (entry, (entry or "").removesuffix(WORD_END))
    return index if entry is not None and fits else None


# --- helpers --------------------------------------------------------------------------------------


def _check_name(tokenizer: Tokenizer, name: str) -> None:
    if not name or re.search(r"\s", name):
        raise ValueError(f"the new token {name!r} must be one word without spaces, such as '[mycat]'")
    key = _key(name)
    if any(special in key for special in tokenizer.special.values()):
        raise ValueError(
            f"the new token {name!r} holds a special one of the text encoder: choose another name"
        )
    if key in tokenizer.backend.get_vocab() or len(tokenizer.encode(name, ends=False)) == 1:
        raise ValueError(
            f"{name!r} is already a word of the text encoder: for a new token put it in brackets: '[{name}]'"
        )


def _key(name: str) -> str:
    """By which a token is known: tokenizers of CLIP lower the case."""
    return name.lower()


def _is_word(name: str) -> bool:
    return name[:1].isalnum() and name[-1:].isalnum()


def _pattern(name: str) -> str:
    """A regular expression of a token in a prompt of lower case."""
    escaped = re.escape(_key(name))
    return rf"\b{escaped}\b" if _is_word(name) else escaped


def _added(tokenizer: Tokenizer) -> dict[str, int]:
    """Rows of the added tokens, by what they are known by."""
    return {_key(name): row for name, row in tokenizer.added().items()}


def _embedding(model: ClipText) -> Tensor:
    return model.get_input_embeddings().weight


def _resize(model: ClipText, count: int) -> None:
    """Cut the embedding to `count` rows, or add rows of zeros."""
    embedding = model.get_input_embeddings()
    old = embedding.weight
    if count == len(old):
        return
    new = old.detach().new_zeros(count, old.shape[1])
    new[: len(old)] = old.detach()[:count]
    embedding.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    embedding.num_embeddings = model.config.vocab_size = count
