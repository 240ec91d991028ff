"""Weights in a prompt, as other programs write them: (a house:1.3), (more), [less]; it loads no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

STEP = 1.1  # of (more); [less] is 1 / STEP
NUMBER = r"[-+]?(?:\d(?:\.\d*)?|\.\d+)"  # not the 30 of (at 10:30)
WEIGHT = re.compile(rf":\s*({NUMBER})\s*$")
OPENING = {")": "(", "]": "["}
ESCAPED = "()[]\\"


@dataclass(frozen=True)
class WeightedText:
    """A prompt without its weights, and the weight of each of its letters."""

    text: str
    weights: tuple[float, ...]


@dataclass
class _Letter:
    letter: str
    literal: bool  # no bracket, whatever it is
    weight: float = 1.0
    kept: bool = True


def weighted_text(prompt: str, names: Sequence[str] = ()) -> WeightedText:
    r"""Read the weights of a prompt; they multiply where brackets lie in brackets.

    `\(`, `\[` and brackets without a partner are letters, and so are all those of `names`, which are found
    in any case.
    """
    letters = _letters(prompt, names)
    for start, end in _pairs(letters):
        factor = _factor(letters, start, end)
        for each in letters[start:end]:
            each.weight *= factor
        letters[start].kept = letters[end].kept = False
    kept: list[_Letter] = []
    apart = False  # whether something between two letters was left out
    for each in letters:
        if not each.kept:
            apart = True
            continue
        if apart and kept and kept[-1].letter.isalnum() and each.letter.isalnum():
            kept.append(_Letter(" ", True))  # else two words would become one
        kept.append(each)
        apart = False
    return WeightedText("".join(each.letter for each in kept), tuple(each.weight for each in kept))


def _letters(prompt: str, names: Sequence[str]) -> list[_Letter]:
    """The letters of a prompt, without the backslashes that make brackets literal."""
    wholes = [re.escape(name) for name in sorted(names, key=len, reverse=True) if name]
    pattern = "|".join([*wholes, rf"\\[{re.escape(ESCAPED)}]", "."])
    found: list[_Letter] = []
    for match in re.finditer(pattern, prompt, re.IGNORECASE | re.DOTALL):
        whole = match[0]
        escaped = len(whole) == 2 and whole[0] == "\\" and whole[1] in ESCAPED
        found += [_Letter(letter, len(whole) > 1) for letter in (whole[1:] if escaped else whole)]
    return found


def _pairs(letters: Sequence[_Letter]) -> list[tuple[int, int]]:
    """Where brackets open and close; of two kinds that cross, what opens first counts."""
    open_at: list[int] = []
    pairs = []
    for place, each in enumerate(letters):
        if each.literal:
            continue
        if each.letter in OPENING.values():
            open_at.append(place)
        elif partner := OPENING.get(each.letter):
            alike = [i for i, start in enumerate(open_at) if letters[start].letter == partner]
            if alike:
                pairs.append((open_at[alike[-1]], place))
                del open_at[alike[-1] :]
    return pairs


def _factor(letters: Sequence[_Letter], start: int, end: int) -> float:
    """What a pair of brackets multiplies by; its number is left out of the text."""
    if letters[start].letter == "[":
        return 1 / STEP
    inside = letters[start + 1 : end]
    number = WEIGHT.search("".join("x" if each.literal else each.letter for each in inside))
    if number is None:
        return STEP
    for each in inside[number.start() :]:
        each.kept = False
    return float(number[1])
