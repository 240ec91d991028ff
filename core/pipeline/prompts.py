"""What in prompts and settings does not do what it may be meant to do, told before a picture is made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from core.config.settings import Job, Settings
from core.config.weighted import NUMBER
from core.pipeline.passes import needs_unconditional
from core.weights.clip import unknown_words

NAMED = 12  # unknown words
# As in (a house:1.3), but not in (at 10:30).
WEIGHTED = rf"\([^()]*(?:\([^()]*\)[^()]*)*:\s*{NUMBER}\s*\)"
# As in [a house:a castle:0.5], which is another prompt from half of the steps on.
CHANGED = re.compile(rf"\[[^\[\]]*:\s*{NUMBER}\s*\]")
# What other programs act on, and nothing here does: its pattern, and what can be done.
FOREIGN = (
    (re.compile(WEIGHTED), "--weighted_prompts makes it a weight"),
    (
        re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE),
        "a LoRA is named by inference/test_personalized.py --lora FILE:WEIGHT",
    ),
    (re.compile(r"\bBREAK\b"), "a prompt is not divided into parts"),
)


def doubts(jobs: Sequence[Job], settings: Settings) -> list[str]:
    """A sentence for everything that will not do what its author may expect, each kind once."""
    read = [(job, job.settings or settings) for job in jobs]
    texts = [(text, own) for job, own in read for text in (job.prompt, job.negative_prompt)]
    weighted = [text for text, own in texts if own.weighted_prompts]
    sentences = taken_as_words([text for text, own in texts if not own.weighted_prompts])
    sentences += [*taken_as_words(weighted, FOREIGN[1:]), *taken_as_weighted(weighted)]
    without = [(job, own) for job, own in read if not needs_unconditional(own)[0]]
    for what, unseen in (
        ("the negative prompt", [own for job, own in without if job.negative_prompt]),
        ("guidance_unconditional", [own for _, own in without if own.guidance_unconditional != 1]),
    ):
        if unseen:
            sentences.append(f"{what} has no effect, {_why_unguided(unseen[0])}")
    return list(dict.fromkeys(sentences))


def unknown(texts: Iterable[str], tokens: Iterable[str], source: str) -> list[str]:
    """A sentence with the words that the text encoder at `source` does not know, without those of tokens."""
    texts = list(texts)
    for token in tokens:
        texts = [re.sub(re.escape(token), " ", text, flags=re.IGNORECASE) for text in texts]
    words = unknown_words(texts, source)
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return [f"unknown to this family: {', '.join(words[:NAMED])}{more}"] if words else []


def taken_as_words(
    texts: Iterable[str], foreign: Sequence[tuple[re.Pattern[str], str]] = FOREIGN
) -> list[str]:
    """A sentence for each kind of other programs' syntax in prompts."""
    found: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        for pattern, instead in foreign:
            if match := pattern.search(text):
                found.setdefault(instead, match[0])
    return [f"{text} is taken as words: {instead}" for instead, text in found.items()]


def taken_as_weighted(texts: Iterable[str]) -> list[str]:
    """A sentence where weighted prompts hold what changes a prompt on the way in other programs."""
    found = next(filter(None, map(CHANGED.search, texts)), None)
    meant = "is only weighted as other words in [brackets]: a prompt stays the same in all steps"
    return [f"{found[0]} {meant}"] if found else []


def _why_unguided(settings: Settings) -> str:
    passes = [settings.cfg_low, *([] if settings.lr_only else [settings.cfg_high])]
    if all(cfg.weight == 1 and cfg.weight_end in (None, 1) for cfg in passes):
        return "as cfg is 1: raise it, as in --cfg 4"
    low, high = settings.cfg_interval
    return f"as no step with a cfg other than 1 lies in the cfg_interval {low:g} to {high:g}: widen it"
