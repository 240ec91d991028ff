"""Captions as people and tools write them: text or JSON, in any of the Unicode encodings."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

CAPTION_KEYS = ("caption", "text")
EMPTY = " "  # what a missing caption is to the published trainer
WITHOUT = "it has no caption: "
OTHER_KEYS = 5  # that a message names at most


class NoCaption(ValueError):
    """There is none; captions that are damaged raise plain ValueErrors."""


def first_caption(
    sources: Iterable[tuple[str, bytes | Mapping[str, Any]]],
    empty_captions: bool,
    nowhere: str,
    others: str = "",
) -> str:
    """The first usable caption of sources, each with what messages call it: files' contents, or entries.

    Where there is none, it is EMPTY if that is allowed, else a ValueError says why; `nowhere` says what was
    looked for, where there is no source, `others` what there is besides. Damaged captions are always errors.
    """
    reasons = []
    damage: ValueError | None = None
    for name, content in sources:
        try:
            return _caption_of(name, content)
        except NoCaption as error:
            reasons.append(str(error))
        except ValueError as error:
            damage = damage or error
    if damage is not None:
        raise damage
    if empty_captions:
        return EMPTY
    raise NoCaption(WITHOUT + ("; ".join(reasons) or nowhere) + others)


def text_of(content: bytes) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32; ValueError if it is in another encoding."""
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError("the text is not UTF-8")
    return text


def parse_object(content: bytes | str) -> dict[str, Any]:
    """A JSON object; ValueError if it is anything else."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("the caption is not JSON") from None
    if not isinstance(parsed, dict):
        raise ValueError("the caption's JSON is not an object")
    return parsed


def _caption_of(name: str, content: bytes | Mapping[str, Any]) -> str:
    if isinstance(content, Mapping):
        return _of_entry(name, content)
    if name.endswith(".json"):
        return _of_entry(name, parse_object(content))
    if text := _whole(text_of(content)):
        return text
    raise NoCaption(f"its {name} is empty")


def _of_entry(name: str, entry: Mapping[str, Any]) -> str:
    values = [entry[key] for key in CAPTION_KEYS if entry.get(key) is not None]
    for value in values:
        if isinstance(value, str) and (text := _whole(value)):
            return text
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"the caption is not text but {value!r:.40}")
    found = [repr(key) for key, value in entry.items() if isinstance(value, str) and key != "file_name"]
    others = [key for key in found if key.strip("'") not in CAPTION_KEYS][:OTHER_KEYS]
    hint = f", but under {', '.join(others)}" if others else ""
    raise NoCaption(f"its {name} has no text under {' or '.join(map(repr, CAPTION_KEYS))}{hint}")


def _whole(text: str) -> str:
    """Text that can be encoded, as halves of surrogate pairs cannot; empty if nothing in it is seen."""
    text = text.strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text if any(unicodedata.category(letter)[0] not in "CZ" for letter in text) else ""
