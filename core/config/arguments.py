"""What a call from Python may be given, checked before anything is computed; errors say what is right."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path

DTYPE_NAMES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32", "fp32": "float32",
}  # fmt: skip
FLOAT16_NAMES = ("fp16", "float16", "half")
FLOAT16_REFUSED = "float16 gives black pictures or NaN in Stage B and C"
DRAW_SEED = -1
SEEDS = 2**31  # the drawn ones are below it
MOST_PICTURES = 100_000  # of a prompt


def whole_number(name: str, value: object) -> int:
    """The number; TypeError, with what it could be instead, for what is none, such as 128.0 or True."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    near = f": write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
    raise TypeError(f"{name} must be a whole number, not {_shown(value)}{near}")


def number(name: str, value: object) -> float:
    """The number, whole or not; TypeError for what is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {_shown(value)}")
    return float(value)


def last_number(text: str, name: str, form: str) -> tuple[str, float] | None:
    """What lies before a number that ends a text, as in FILE:0.8, and that number; None where there is none.

    ValueError, with the number's name and the right form, for what stands in its place and is no number.
    """
    path, colon, last = text.rpartition(":")
    drive = len(path) == 1 and path.isalpha()
    if not colon or Path(text).exists() or "/" in last or "\\" in last:
        return None
    try:
        found = float(last)
    except ValueError:
        found = math.nan
    if math.isfinite(found) and path:
        return path, found
    if drive:
        return None
    raise ValueError(f"the {name} {last!r} in {text!r} is no number: write {form}")


def truth(name: str, value: object) -> bool:
    """The value; TypeError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {_shown(value)}")
    return value


def text(name: str, value: object) -> str:
    """The text; TypeError for what is none."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds bytes that are not UTF-8: {value!r}") from None
        return value
    several = isinstance(value, Sequence) and all(isinstance(part, str) for part in value)
    near = f": write {', '.join(value)!r}" if several and value else ""
    raise TypeError(f"{name} must be text, not {_shown(value)}{near}")


def prompts_of(prompt: object) -> list[str]:
    """The prompts: one, or each of several; TypeError for what is no text, ValueError for none."""
    if isinstance(prompt, str):
        return [text("prompt", prompt)]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise TypeError(f"prompt must be text, or a list of texts, not {_shown(prompt)}")
    if not prompt:
        raise ValueError("prompt is an empty list: give a text, or a list of texts")
    return [text(f"prompt[{number}]", one) for number, one in enumerate(prompt)]


def picture_count(num_images: object, num_image: object) -> int:
    """How many pictures of each prompt, under either name; 1 where neither is given."""
    given = {"num_images": num_images, "num_image": num_image}
    counts = {name: whole_number(name, value) for name, value in given.items() if value is not None}
    if len({*counts.values()}) > 1:
        raise ValueError(f"num_images is {num_images} and num_image {num_image}: give one of them")
    for name, count in counts.items():
        check_count(name, count)
    return next(iter(counts.values()), 1)


def check_count(name: str, count: int) -> int:
    """A number of pictures of a prompt; ValueError for none and for more than anybody can mean."""
    if count < 1:
        raise ValueError(f"{name} must be at least 1, not {count}")
    if count > MOST_PICTURES:
        raise ValueError(f"{name} must be at most {MOST_PICTURES}, not {count}")
    return count


def first_seed(seed: object) -> int:
    """The seed, or a drawn one for DRAW_SEED."""
    if seed is None:
        raise TypeError(f"seed must be a whole number, not None: {DRAW_SEED} draws one")
    number = whole_number("seed", seed)
    return secrets.randbelow(SEEDS) if number == DRAW_SEED else number


def number_format(name: str) -> str:
    """The configuration's name of a number format, also called by another; ValueError for what is none."""
    if name in FLOAT16_NAMES:
        raise ValueError(f"{FLOAT16_REFUSED}: use bf16 or float32")
    if name not in DTYPE_NAMES:
        raise ValueError(f"unknown number format {name!r}: use bf16 or float32")
    return DTYPE_NAMES[name]


def _shown(value: object) -> str:
    """The value with its type, as 1 and True, or 128 and 128.0, may look alike."""
    return f"{value!r} ({type(value).__name__})" if value is not None else "None"
