"""What the networks are conditioned on: the text of a prompt and, if there is one, an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.weights.clip import TextCondition


@dataclass(frozen=True)
class Conditions:
    """What Stage C is conditioned on, under the names of its arguments; Stage B takes the pooled text."""

    clip_text: Tensor  # (B, L, D)
    clip_text_pooled: Tensor  # (B, 1, P)
    clip_img: Tensor  # (B, 1, I), zero without an image

    def only(self, i: int) -> Conditions:
        """Those of sample i alone."""
        return Conditions(*(value[i : i + 1] for value in vars(self).values()))

    @classmethod
    def together(cls, pictures: Sequence[Conditions]) -> Conditions:
        """Those of several pictures as one batch: all first samples, then all second ones."""
        columns = zip(*(vars(one).values() for one in pictures), strict=True)
        return cls(*(torch.cat([x[i : i + 1] for i in range(len(c[0])) for x in c]) for c in columns))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditions:
        """The same on a device and in a dtype."""
        return Conditions(
            self.clip_text.to(device, dtype),
            self.clip_text_pooled.to(device, dtype),
            self.clip_img.to(device, dtype),
        )


def conditions(text: TextCondition, image_embedding: Tensor | None, clip_img_width: int) -> Conditions:
    """Conditions of one picture from its prompt and, if there is one, its image embedding (1, 1, I).

    The unconditional half is the same with the empty or the negative prompt and no image.
    """
    image = text.pooled.new_zeros(1, 1, clip_img_width) if image_embedding is None else image_embedding
    return Conditions(text.tokens, text.pooled, image)


def of_one_length(texts: Sequence[TextCondition], empty: TextCondition) -> list[TextCondition]:
    """Prompts of different numbers of chunks, all as long as the longest, by the empty prompt's tokens."""
    longest = max(text.tokens.shape[1] for text in texts)

    def filled(text: TextCondition) -> TextCondition:
        missing = (longest - text.tokens.shape[1]) // empty.tokens.shape[1]
        return replace(text, tokens=torch.cat([text.tokens, *[empty.tokens] * missing], dim=1))

    return [filled(text) for text in texts]


def stack(conditional: Conditions, unconditional: Conditions) -> Conditions:
    """Both halves as one batch, the conditional first."""
    return Conditions(
        torch.cat([conditional.clip_text, unconditional.clip_text]),
        torch.cat([conditional.clip_text_pooled, unconditional.clip_text_pooled]),
        torch.cat([conditional.clip_img, unconditional.clip_img]),
    )
