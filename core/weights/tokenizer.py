"""CLIP's tokenizer by the tokenizers library alone: importing transformers takes a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Encoding, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

START, END = "<|startoftext|>", "<|endoftext|>"
KINDS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}  # by CLIP's own files
MORE = ("additional_special_tokens", "extra_special_tokens", "split_special_tokens")
WORD_END = "</w>"  # of a vocabulary entry that ends a word
PIECES = (  # of a text, each of which is joined from bytes by itself
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass
class Tokenizer:
    """Token ids of texts, between a start and an end."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]  # what starts, ends and pads, by its name in a configuration

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From a tokenizer.json, or a vocab.json with merges.txt; any Exception for damaged files.

        Whatever is not as in CLIP's own files, such as tokens beyond the vocabulary, is left to transformers.
        """
        with suppress(Exception):  # transformers tells what is wrong, if anything is
            return _plain(folder)
        from transformers import CLIPTokenizer

        read = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        special = {kind: getattr(read, kind) for kind in KINDS}
        if absent := [kind for kind in ("bos_token", "eos_token", "pad_token") if not special[kind]]:
            raise ValueError(f"its {absent[0]} is {special[absent[0]]!r}")
        return cls(read.backend_tokenizer, {kind: token for kind, token in special.items() if token})

    @property
    def start_id(self) -> int:
        """The token before a text."""
        return self.backend.token_to_id(self.special["bos_token"])

    @property
    def end_id(self) -> int:
        """The token after a text."""
        return self.backend.token_to_id(self.special["eos_token"])

    @property
    def pad_id(self) -> int:
        """The token that fills up what is short."""
        return self.backend.token_to_id(self.special["pad_token"])

    def encode(self, text: str, ends: bool = True) -> Encoding:
        """A text's `ids` and their `offsets`, places in it; with start and end unless `ends` is False."""
        return self.backend.encode(text, add_special_tokens=ends)

    def padded(self, ids: Sequence[int], length: int) -> tuple[list[int], list[int]]:
        """As many ids as `length`, cut before the end or padded, and their mask: 0 where padded."""
        if len(ids) > length:
            return [*ids[: length - 1], ids[-1]], [1] * length
        padding = length - len(ids)
        return [*ids, *[self.pad_id] * padding], [1] * len(ids) + [0] * padding

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self.backend.decode(ids, skip_special_tokens=False).replace(WORD_END, " ").strip()

    def added(self) -> dict[str, int]:
        """Ids of the tokens that were added to the vocabulary, without those that start, end and pad."""
        known = self.backend.get_added_tokens_decoder().items()
        return {token.content: i for i, token in known if token.content not in self.special.values()}

    def vocabulary(self) -> dict[str, int]:
        """Ids by entry, without those that were added, or start, end and pad."""
        without = self.added().keys() | set(self.special.values())
        return {entry: i for entry, i in self.backend.get_vocab().items() if entry not in without}

    def __len__(self) -> int:
        return self.backend.get_vocab_size()


def _plain(folder: Path) -> Tokenizer:
    """The tokenizer of files like CLIP's own; any Exception for others."""
    config, whole = _read(folder / "tokenizer_config.json"), _read(folder / "tokenizer.json")
    rows = config.get("added_tokens_decoder")
    if rows is None:
        config |= _read(folder / "special_tokens_map.json")
        rows = {token["id"]: token for token in whole.get("added_tokens", [])}
    if any(config.get(name) for name in MORE) or (folder / "added_tokens.json").exists():
        raise ValueError("more tokens than the vocabulary")
    named = {kind: _added_token(config.get(kind, own), special=True) for kind, own in KINDS.items()}
    special = {kind: token.content for kind, token in named.items()}
    if whole:
        pairs = whole["model"]["merges"]
        vocabulary = whole["model"]["vocab"]
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
    else:
        vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokens = {int(row): _added_token(token) for row, token in rows.items()}
    if any(vocabulary[token.content] != row for row, token in tokens.items()):
        raise ValueError("tokens with other rows than in the vocabulary")
    made = _made_of(vocabulary, merges, special)
    listed = [token for _, token in sorted(tokens.items())]
    known = {token.content for token in listed}
    for token in [*listed, *(token for token in named.values() if token.content not in known)]:
        token.special = token.special or token.content in special.values()
        made.add_tokens([token])
    return Tokenizer(made, special)


def _read(path: Path) -> dict[str, Any]:
    """An object in JSON, empty where there is no such file."""
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def _added_token(stored: str | dict[str, Any], **more: Any) -> AddedToken:
    """A token with the flags that a file gives it."""
    if isinstance(stored, str):
        return AddedToken(stored, **more)
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{name: stored[name] for name in names if name in stored} | more)


def _made_of(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], special: dict[str, str]
) -> tokenizers.Tokenizer:
    """CLIP's tokenizer with a vocabulary; KeyError where this lacks what starts, ends or pads."""
    rows = {kind: (token, vocabulary[token]) for kind, token in special.items()}
    model = BPE(
        vocabulary,
        merges,
        unk_token=special["unk_token"],
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
    )
    made = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    ends = rows["eos_token"], rows["bos_token"]
    made.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return made
