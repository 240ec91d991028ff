"""Several LoRAs with weights: read, checked against each other, merged where they belong, exactly undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from core.config.arguments import last_number
from core.config.schema import StageCConfig, stage_c_sizes
from core.paths import located
from core.weights.clip import TextEncoder
from core.weights.lora.files import LoraFile, LoraTokens, name_tokens
from core.weights.lora.reading import find_lora_file, find_version, read_lora
from core.weights.lora.tokens import WORD_END, MergedTokens, mentions
from modules.lora import MergedLora
from modules.stage_c import StageC


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA, how much of it is added, and where it was read from."""

    file: LoraFile
    weight: float = 1.0
    path: str = "a LoRA"

    @property
    def tokens(self) -> list[str]:
        """The tokens that call it in a prompt, as far as their names are known."""
        names = () if self.file.tokens is None else self.file.tokens.names or ()
        return list(dict.fromkeys(name.removesuffix(WORD_END) for name in names))


# --- reading --------------------------------------------------------------------------------------


def split_weight(text: str) -> tuple[str, float]:
    """Where a file lies, and a weight, from FILE or FILE:WEIGHT; ValueError for one that is no number."""
    found = last_number(text, "weight", "FILE, or FILE:0.8")
    path, weight = (text, 1.0) if found is None else found
    return located(path), weight


def load_loras(texts: Sequence[str], config: StageCConfig) -> list[WeightedLora]:
    """Read the LoRAs that FILE:WEIGHT name, for a Stage C, with their tokens' names from its configuration.

    ValueError or OSError names the file that cannot be used, and why.
    """
    loras = []
    for path, weight in map(split_weight, texts):
        lora = _name_from(read_lora(path, stage_c_sizes(config)), config, path)
        loras.append(WeightedLora(lora, weight, path))
    return loras


def named_files(texts: Sequence[str]) -> dict[str, str]:
    """The files that FILE:WEIGHT name, and that each holds a LoRA; ValueError as `load_loras`."""
    return {str(find_lora_file(path)): "LoRA" for path, _ in map(split_weight, texts)}


def _name_from(lora: LoraFile, config: StageCConfig, path: str) -> LoraFile:
    """The LoRA with what its file does not tell of its new tokens."""
    tokens = lora.tokens
    if tokens is None or tokens.absolute or not config.train_tokens:
        return lora
    names, expressions = zip(*config.train_tokens, strict=True)
    if tokens.names is not None:
        if tokens.initialise_from is not None or not set(tokens.names) <= set(names):
            return lora
        known = dict(config.train_tokens)
        names, expressions = tokens.names, [known[name] for name in tokens.names]
    try:
        return name_tokens(lora, names, expressions)
    except ValueError as error:
        raise ValueError(f"{path}: {error}, as 'train_tokens' in Stage C's configuration has it") from None


def check_loras(loras: Sequence[WeightedLora], config: StageCConfig) -> None:
    """ValueError where a LoRA is for another size of Stage C, or two bring one token with different rows."""
    sizes = stage_c_sizes(config)
    brought: dict[str, tuple[LoraTokens, str]] = {}
    for lora in loras:
        if lora.file.sizes != sizes:
            version = find_version(lora.file.sizes) or "of other sizes"
            raise ValueError(f"{lora.path}: the LoRA is for a Stage C {version}, not for this one")
        for name in lora.tokens:
            rows = _rows_of(lora.file.tokens, name)
            other, path = brought.setdefault(name.lower(), (rows, lora.path))
            if not _same(rows, other):
                raise ValueError(
                    f"{path} and {lora.path} bring different rows for the token {name!r}: use one of them"
                )


def _rows_of(tokens: LoraTokens, name: str) -> LoraTokens:
    """What a LoRA brings for one of its tokens."""
    rows = [i for i, other in enumerate(tokens.names) if other.removesuffix(WORD_END) == name]
    expressions = tokens.initialise_from and tuple(tokens.initialise_from[i] for i in rows)
    return LoraTokens(tokens.values[rows], initialise_from=expressions, absolute=tokens.absolute)


def _same(a: LoraTokens, b: LoraTokens) -> bool:
    known = a.initialise_from == b.initialise_from and a.absolute == b.absolute
    return known and torch.equal(a.values, b.values)


def uncalled(loras: Sequence[WeightedLora], prompts: Sequence[str]) -> list[str]:
    """A sentence for each LoRA with tokens of which some of the prompts have none."""
    sentences = []
    for lora in loras:
        without = [p for p in prompts if not any(mentions(p, name) for name in lora.tokens)]
        if lora.tokens and without:
            which = (
                f"{len(without)} of {len(prompts)} prompts lack" if len(prompts) > 1 else "the prompt lacks"
            )
            tokens = " or ".join(lora.tokens)
            sentences.append(f"{which} {tokens}, which calls what {lora.path} holds: {without[0]!r}")
    return sentences


# --- merging --------------------------------------------------------------------------------------


class LoraMerger:
    """Keeps Stage C and the text encoder at the LoRAs that are wanted; what was merged is undone first.

    No step costs more than without. Both may be anywhere when they are passed in, and stay there.
    """

    def __init__(self) -> None:
        self.wanted: tuple[WeightedLora, ...] = ()
        self._merged: dict[str, tuple[tuple[WeightedLora, ...], ExitStack]] = {}  # by where

    def into_stage_c(self, stage_c: StageC) -> None:
        """Merge the updates of Stage C, if they are not yet."""
        self._bring("stage_c", lambda stack: self._merge_stage_c(stage_c, stack))

    def forget_stage_c(self) -> None:
        """Begin anew with a Stage C that was never merged into."""
        self._merged.pop("stage_c", None)

    def into_text(self, encoder: TextEncoder) -> None:
        """Merge tokens and updates of the text encoder, if they are not yet."""
        self._bring("text", lambda stack: self._merge_text(encoder, stack))

    def _bring(self, place: str, merge: Callable[[ExitStack], None]) -> None:
        held, undo = self._merged.get(place, ((), ExitStack()))
        if held is self.wanted:
            return
        undo.close()
        self._merged[place] = ((), ExitStack())
        if self.wanted:
            with ExitStack() as stack:  # undoes what is done, if the rest fails
                merge(stack)
                self._merged[place] = (self.wanted, stack.pop_all())

    def _merge_stage_c(self, stage_c: StageC, stack: ExitStack) -> None:
        merged = MergedLora(stage_c, {}, others=[(lora.file.updates, lora.weight) for lora in self.wanted])
        stack.callback(merged.undo)

    def _merge_text(self, encoder: TextEncoder, stack: ExitStack) -> None:
        tokens = [(lora.file.tokens, lora.weight) for lora in self.wanted if lora.file.tokens is not None]
        if tokens:
            stack.callback(MergedTokens(encoder, *tokens[0], tokens[1:]).undo)
        updates = [(lora.file.text_updates, lora.weight) for lora in self.wanted]
        stack.callback(MergedLora(encoder.model, {}, others=updates).undo)


def lora_files(loras: Sequence[WeightedLora]) -> dict[str, str]:
    """The files of LoRAs, by what they hold."""
    return {
        f"LoRA {number} (x {lora.weight:g})": str(find_lora_file(lora.path))
        for number, lora in enumerate(loras, 1)
    }
