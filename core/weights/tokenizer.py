"""CLIP's tokenizer by the tokenizers library alone: importing transformers takes a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Encoding, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

START, END = "<|startoftext|>", "<|endoftext|>"
KINDS = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}  # by CLIP's own files
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
        """From a tokenizer.json, or a vocab.json with merges.txt; any Exception for damaged files."""
        special, further = _configured(folder)
        whole = folder / "tokenizer.json"
        backend = tokenizers.Tokenizer.from_file(str(whole)) if whole.is_file() else _made_of(folder, special)
        backend.no_truncation()
        backend.no_padding()
        for token in special.values():
            _id_of(token, backend)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens([token for token in set(special.values()) if token not in known])
        backend.add_tokens([token for token in further if token.content not in special.values()])
        return cls(backend, special)

    @property
    def start_id(self) -> int:
        """The token before a text."""
        return self.backend.token_to_id(self.special["bos_token"])

    @property
    def end_id(self) -> int:
        """The token after a text."""
        return self.backend.token_to_id(self.special["eos_token"])

    def encode(self, text: str, ends: bool = True) -> Encoding:
        """A text's `ids` and their `offsets`, places in it; with start and end unless `ends` is False."""
        return self.backend.encode(text, add_special_tokens=ends)

    def padded(self, ids: Sequence[int], length: int) -> tuple[list[int], list[int]]:
        """As many ids as `length`, cut before the end or padded, and their mask: 0 where padded."""
        if len(ids) > length:
            return [*ids[: length - 1], ids[-1]], [1] * length
        padding = length - len(ids)
        pad = self.backend.token_to_id(self.special["pad_token"])
        return [*ids, *[pad] * padding], [1] * len(ids) + [0] * padding

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


def _configured(folder: Path) -> tuple[dict[str, str], list[AddedToken]]:
    """What starts, ends and pads, and tokens beyond the vocabulary, as the configurations beside it say."""
    special, further = dict(KINDS), {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            stored = json.loads((folder / name).read_text("utf-8"))
            for kind in KINDS.keys() & stored.keys():
                token = stored[kind]
                special[kind] = token["content"] if isinstance(token, dict) else token
            further.update(stored.get("added_tokens_decoder", {}))
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    rows = sorted(further.items(), key=lambda item: int(item[0]))
    return special, [AddedToken(**{n: token[n] for n in names if n in token}) for _, token in rows]


def _made_of(folder: Path, special: dict[str, str]) -> tokenizers.Tokenizer:
    """The tokenizer of a vocab.json and merges.txt."""
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    model = BPE.from_file(
        *files, unk_token=special["unk_token"], continuing_subword_prefix="", end_of_word_suffix=WORD_END
    )
    made = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    start, end = ((special[kind], _id_of(special[kind], model)) for kind in ("bos_token", "eos_token"))
    made.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return made


def _id_of(token: str, within: tokenizers.Tokenizer | BPE) -> int:
    found = within.token_to_id(token)
    if found is None:
        raise ValueError(f"the vocabulary lacks {token}")
    return found
