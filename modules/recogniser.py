"""A small convolutional network that tells the attributes of a scene from its picture, and its features.

With a narrow embedding between features and attributes it is the tiny family's image encoder: what it keeps
of a picture in a few numbers is what Stage C sees of an image prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 128  # pixels, of the pictures that the network looks at
GRID = 4  # the last map is averaged to this many cells a side, so that places are told apart
UNLABELLED = -100  # where a picture has no label of an attribute


class AttributeHeads(nn.ModuleList):
    """A linear classifier per attribute: (B, D) -> logits (B, classes) each."""

    def __init__(self, width: int, classes: Sequence[int]) -> None:
        super().__init__(nn.Linear(width, count) for count in classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self]


class Block(nn.Module):
    """A depthwise convolution and a per-pixel MLP, added to the input (B, C, H, W)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False),
            nn.BatchNorm2d(c),
            nn.Conv2d(c, 2 * c, 1),
            nn.ReLU(),
            nn.Conv2d(2 * c, c, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Recogniser(nn.Module):
    """Attributes of pictures (B, 3, H, W) in [0, 1], which are resized to 128 x 128 where they are not.

    `c_embedding`: how many numbers the attributes are told from; None: from all features.
    """

    def __init__(
        self,
        classes: Sequence[int],  # values of each attribute
        c_hidden: Sequence[int] = (24, 48, 64, 96),  # width after each halving
        blocks: Sequence[int] = (0, 1, 2, 2),
        c_features: int = 64,
        c_embedding: int | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide, count in zip((3, *c_hidden[:-1]), c_hidden, blocks, strict=True):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide)]
            layers += [nn.ReLU(), *(Block(wide) for _ in range(count))]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(c_hidden[-1]), nn.AdaptiveAvgPool2d(GRID))
        self.project = nn.Linear(c_hidden[-1] * GRID**2, c_features)
        self.norm = nn.BatchNorm1d(c_features)
        self.embedding = None if c_embedding is None else nn.Linear(c_features, c_embedding)
        self.heads = AttributeHeads(c_embedding or c_features, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the heads look at, for distances between sets of pictures: (B, 3, H, W) -> (B, c_features)."""
        x = resize(x, SIDE).contiguous(memory_format=torch.channels_last)
        x = self.body(2 * x - 1)  # (B, C, 4, 4)
        return F.relu(self.norm(self.project(x.flatten(1))))

    def embed(self, x: Tensor) -> Tensor:
        """What is kept of pictures (B, 3, H, W): (B, c_embedding) of unit mean square."""
        embedded = self.embedding(self.features(x))
        return F.normalize(embedded, dim=1) * embedded.shape[1] ** 0.5

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits (B, classes) of every attribute."""
        return self.heads(self.features(x) if self.embedding is None else self.embed(x))


def resize(x: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, H, W) as squares of `side` pixels, bilinear with antialiasing."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def attribute_losses(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross entropy of each sample (B,), summed over the attributes of labels (B, attributes)."""
    losses = [
        F.cross_entropy(row, labels[:, i], ignore_index=UNLABELLED, reduction="none")
        for i, row in enumerate(logits)
    ]
    return torch.stack(losses).sum(dim=0)


def accuracies(logits: Sequence[Tensor], labels: Tensor) -> list[float]:
    """The share of right answers per attribute, over the samples that have a label of it."""
    shares = []
    for i, row in enumerate(logits):
        labelled = labels[:, i] != UNLABELLED
        right = row.argmax(dim=1)[labelled] == labels[labelled, i]
        shares.append(right.float().mean().item())
    return shares
