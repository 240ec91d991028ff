"""Random numbers that follow from a key, such as (seed, update, sample), wherever they are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def seed_of(key: Sequence[int]) -> int:
    """A seed for torch from a key of non-negative numbers."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] % 2**63)


def generator_of(key: Sequence[int]) -> torch.Generator:
    """A generator on the CPU, so that its numbers are the same for every device and process."""
    return torch.Generator().manual_seed(seed_of(key))
