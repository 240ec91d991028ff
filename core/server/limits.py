"""The most that a client of the server may ask for."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PROMPT = 4000  # letters
MEGA = 1_000_000
MOST_SENT = 4  # pictures of full size in one request


@dataclass(frozen=True)
class Limits:
    """Values of the flags of the same names, with `max_` before them."""

    side: int = 4096  # px
    steps: int = 50  # of any pass
    pictures: int = 4  # of a job
    upload_mb: int = 20  # size of a picture that is sent, in millions of bytes
    upload_mp: int = 50  # and in millions of pixels
    jobs: int = 4  # of a client, waiting or running

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--max_{name} must be at least 1, not {value}")

    @property
    def request_bytes(self) -> int:
        """The largest request: its pictures as base64, and text around them."""
        return MOST_SENT * self.upload_mb * MEGA * 4 // 3 + MEGA
