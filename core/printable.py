"""Text on standard output and error, whatever they can show, and whether or not anybody still reads them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines


def printable(text: str, encoding: str | None) -> str:
    """The text with an escape (\\u98a8) for each letter that an encoding (None: UTF-8) does not have.

    So have control characters, as file names may hold them, which could change what a terminal shows.
    """
    name = encoding or "utf-8"
    return CONTROL.sub(_escaped, text).encode(name, "backslashreplace").decode(name)


def _escaped(found: re.Match[str]) -> str:
    return f"\\x{ord(found.group()):02x}"


def say(text: str, stream: TextIO | None) -> None:
    """Write a line to a stream that may be closed, broken or full (None: there is none)."""
    if stream is not None:
        with unbroken(stream):
            stream.write(printable(text, stream.encoding) + "\n")
            stream.flush()


@contextmanager
def unbroken(stream: TextIO | None) -> Iterator[None]:
    """Where the stream breaks within, a warning says so, and what is written to it later is dropped."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: it was closed
        with suppress(OSError, ValueError, AttributeError):  # not all streams have a number
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())  # else Python fails at the exit, at what is left
        name = getattr(stream, "name", "the output")
        warnings.warn(f"{name} cannot be written to any more ({error}); the run goes on", stacklevel=4)
