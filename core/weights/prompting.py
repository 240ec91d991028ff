"""Prompts to conditions with what is not CLIP's own: parts with weights, and more tokens than it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config.weighted import WeightedText, weighted_text
from core.weights.clip import TextCondition, TextEncoder


@dataclass(frozen=True)
class Reading:
    """How prompts are read; `names` are words whose brackets are no weights, as those of LoRAs' tokens."""

    weighted: bool = False
    long: bool = False
    names: tuple[str, ...] = ()

    def text(self, prompt: str) -> WeightedText:
        """A prompt without its weights, and these."""
        plain = WeightedText(prompt, (1.0,) * len(prompt))
        return weighted_text(prompt, self.names) if self.weighted else plain


@dataclass(frozen=True)
class _Chunk:
    """Token ids that the encoder takes at once, without start and end, and their weights."""

    ids: list[int]
    weights: list[float]


def encode_prompts(
    encoder: TextEncoder, prompts: Sequence[str], device: torch.device | str, reading: Reading
) -> dict[str, TextCondition]:
    """What `TextEncoder.encode` gives, and for long prompts the tokens (1, n·L, D) of n chunks.

    A weight w makes a token e the token e₀ + w·(e - e₀), where e₀ is the empty prompt's at its place. The
    pooled embedding is that of the first chunk, without weights.
    """
    if not (reading.weighted or reading.long):
        return encoder.encode(prompts, device)
    encoder.to(device)
    with torch.no_grad():
        empty, _ = _embed(encoder, _Chunk([], []), device)
        return {prompt: _condition(encoder, prompt, device, reading, empty) for prompt in prompts}


def _condition(
    encoder: TextEncoder, prompt: str, device: torch.device | str, reading: Reading, empty: Tensor
) -> TextCondition:
    parts = []
    for chunk in _chunks(encoder, reading.text(prompt), reading.long):
        tokens, pooled = _embed(encoder, chunk, device)
        excess = torch.zeros(tokens.shape[1], 1)
        excess[1 : 1 + len(chunk.ids), 0] = torch.tensor(chunk.weights) - 1
        weighted = tokens + excess.to(tokens) * (tokens - empty)  # exactly the token where the weight is 1
        parts.append((weighted, pooled))
    return TextCondition(torch.cat([tokens for tokens, _ in parts], dim=1), parts[0][1])


def _chunks(encoder: TextEncoder, read: WeightedText, long: bool) -> list[_Chunk]:
    """A prompt's tokens, as many at a time as the encoder takes; unless `long` the first, with a warning."""
    found = encoder.tokenizer.encode(read.text)
    ids, places = found.ids[1:-1], found.offsets[1:-1]
    weights = [read.weights[start] for start, _ in places]
    room = encoder.model.config.max_position_embeddings - 2  # start and end
    if not long and len(ids) > room:
        encoder.warn_of_cut(ids[room:])
        ids = ids[:room]
    starts = range(0, max(len(ids), 1), room)
    return [_Chunk(ids[start : start + room], weights[start : start + room]) for start in starts]


def _embed(encoder: TextEncoder, chunk: _Chunk, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Tokens (1, L, D) and pooled embedding (1, 1, P) of a chunk, padded as the tokenizer does it."""
    tokenizer = encoder.tokenizer
    whole = [tokenizer.start_id, *chunk.ids, tokenizer.end_id]
    ids, mask = tokenizer.padded(whole, encoder.model.config.max_position_embeddings)
    return encoder.embed_ids(torch.tensor([ids], device=device), torch.tensor([mask], device=device))
