"""What in prompts and settings does not do what it may be meant to do, told before a picture is made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from core.config.settings import Job, Settings
from core.pipeline.passes import needs_unconditional
from core.weights.clip import unknown_words

NAMED = 12  # unknown words
# As in (a house:1.3), but not in (at 10:30).
WEIGHTED = r"\([^()]*(?:\([^()]*\)[^()]*)*:\s*[-+]?(?:\d(?:\.\d*)?|\.\d+)\s*\)"
# What other programs act on, and nothing here does: its pattern, and what can be done.
FOREIGN = (
    (re.compile(WEIGHTED), "a part of a prompt cannot be weighted"),
    (
        re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE),
        "a LoRA is named by inference/test_personalized.py --lora FILE:WEIGHT",
    ),
    (re.compile(r"\bBREAK\b"), "a prompt is not divided into parts"),
)


def doubts(jobs: Sequence[Job], settings: Settings) -> list[str]:
    """A sentence for everything that will not do what its author may expect, each kind once."""
    sentences = taken_as_words(text for job in jobs for text in (job.prompt, job.negative_prompt))
    if any(job.negative_prompt for job in jobs) and not needs_unconditional(settings)[0]:
        sentences.append(f"the negative prompt has no effect, {_why_unguided(settings)}")
    return sentences


def unknown(texts: Iterable[str], tokens: Iterable[str], source: str) -> list[str]:
    """A sentence with the words that the text encoder at `source` does not know, without those of tokens."""
    texts = list(texts)
    for token in tokens:
        texts = [re.sub(re.escape(token), " ", text, flags=re.IGNORECASE) for text in texts]
    words = unknown_words(texts, source)
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return [f"unknown to this family: {', '.join(words[:NAMED])}{more}"] if words else []


def taken_as_words(texts: Iterable[str]) -> list[str]:
    """A sentence for each kind of other programs' syntax in prompts."""
    found: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        for pattern, instead in FOREIGN:
            if match := pattern.search(text):
                found.setdefault(instead, match[0])
    return [f"{text} is taken as words: {instead}" for instead, text in found.items()]


def _why_unguided(settings: Settings) -> str:
    if settings.cfg == 1 and settings.cfg_end in (None, 1):
        return "as cfg is 1: raise it, as in --cfg 4"
    low, high = settings.cfg_interval
    return f"as no step with a cfg other than 1 lies in the cfg_interval {low:g} to {high:g}: widen it"
