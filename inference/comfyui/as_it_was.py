"""What our files set for a process of their own, set back in a process that belongs to others too."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, PngImagePlugin

LIMITS = (
    (Image, "MAX_IMAGE_PIXELS"),
    (PngImagePlugin, "MAX_TEXT_CHUNK"),
    (PngImagePlugin, "MAX_TEXT_MEMORY"),
)


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """After it, the environment, the filters of warnings and Pillow's limits are as before it."""
    environment, limits = dict(os.environ), [getattr(owner, name) for owner, name in LIMITS]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for (owner, name), value in zip(LIMITS, limits, strict=True):
            setattr(owner, name, value)
