"""One picture on several processes: the halves of cfg, and rows of pixels, each on processes of their own.

Every process goes through all passes and draws the same noise; what a network predicts in a step is shared
out and put together again. With an even number of processes the conditional half is made by the first of them
and the unconditional one by the others. Within a half each process has some rows of the map: convolutions get
the rows beside them from their neighbours, global response normalisation its sums from all, and attention is
computed head by head over all rows (Ulysses, arXiv 2309.14509). All of it is exact but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules.blocks import AttnBlock, KeysValues, Operators
from modules.guidance import GuidanceFeatures
from modules.stage_b import StageB
from modules.stage_c import StageC


@dataclass(frozen=True)
class Share:
    """What a process makes of a prediction: one half of cfg, or both, and rows of the latent, or all."""

    half: int | None  # None: all samples
    bounds: tuple[int, ...] | None  # of all processes' rows; None: all rows
    row_rank: int
    group: dist.ProcessGroup | None  # those that share the rows, None: all

    @property
    def rows(self) -> slice:
        """The latent's rows."""
        return slice(None) if self.bounds is None else slice(*self.bounds[self.row_rank : self.row_rank + 2])

    def map_rows(self, patch_size: int) -> slice:
        """The rows of the map that a network with such patches makes of the latent."""
        if self.bounds is None:
            return slice(None)
        return slice(self.rows.start // patch_size, self.rows.stop // patch_size)

    def samples(self, batch: int) -> slice:
        """The samples of a batch [conditional, unconditional]."""
        return (
            slice(None) if self.half is None else slice(self.half * batch // 2, (self.half + 1) * batch // 2)
        )

    def of(self, batch: Tensor) -> Tensor:
        """The part of a batch of latents (B, C, H, W)."""
        return batch[self.samples(len(batch)), :, self.rows]

    def whole(self, part: Tensor) -> Tensor:
        """The batch of which all processes have such parts."""
        bounds = self.bounds or (0, part.shape[2])
        most = max(end - start for start, end in pairwise(bounds))
        sent = part.new_zeros(*part.shape[:2], most, part.shape[3])
        sent[:, :, : part.shape[2]] = part
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, sent)
        halves = 1 if self.half is None else 2
        each = len(parts) // halves
        columns = [parts[half * each : (half + 1) * each] for half in range(halves)]
        if self.bounds is None:
            return torch.cat([column[0] for column in columns])
        sizes = [end - start for start, end in pairwise(bounds)]
        cropped = [[p[:, :, :n] for p, n in zip(column, sizes, strict=True)] for column in columns]
        return torch.cat([torch.cat(column, dim=2) for column in cropped])

    @contextmanager
    def within(self, network: StageB | StageC) -> Iterator[None]:
        """Within it, the network computes on these rows as on all."""
        if self.bounds is not None:
            network.over = partial(over_rows, share=self)
        try:
            yield
        finally:
            network.over = None


Shares = dict[bool, Share]  # of one half alone, and of both


class Split:
    """All processes of a launch, on one picture."""

    def __init__(self, device: torch.device, store: dist.Store, rank: int, count: int) -> None:
        """`store` is one that all of them have, `count` how many there are."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
        self._rank, self._count = rank, count
        members = (range(count // 2), range(count // 2, count)) if count % 2 == 0 else ()
        self._halves = [dist.new_group(list(ranks)) for ranks in members]

    def shares(self, network: StageB | StageC, height: int | None) -> Shares:
        """What this process makes of predictions for latents of a height; None: their rows stay together.

        They do so, too, where the network's levels would not divide between the processes.
        """
        return {both: self._share(network, height, both) for both in (False, True)}

    def _share(self, network: StageB | StageC, height: int | None, both: bool) -> Share:
        halved = both and bool(self._halves)
        count = self._count // 2 if halved else self._count
        half, rank = divmod(self._rank, count)
        group = self._halves[half] if halved else None
        bounds = None if height is None or count == 1 else row_bounds(network, height, count)
        return Share(half if halved else None, bounds, rank, group)

    def from_first(self, features: GuidanceFeatures) -> GuidanceFeatures:
        """The features of the first process, whose half is the conditional one."""
        maps = tuple(feature.contiguous() for feature in features.maps)
        for feature in maps:
            dist.broadcast(feature, 0)
        return GuidanceFeatures(maps)


def row_bounds(network: StageB | StageC, height: int, count: int) -> tuple[int, ...] | None:
    """Where the rows of each of `count` processes begin in a latent, and the end; None if they stay whole."""
    heads = [b.attention.attn.heads for b in network.modules() if isinstance(b, AttnBlock)]
    grain = network.row_grain
    if grain is None or height % grain or height // grain < count or min(heads, default=count) < count:
        return None
    return tuple(height // grain * rank // count * grain for rank in range(count + 1))


# --- what blocks compute over rows ----------------------------------------------------------------


def over_rows(base: Operators, share: Share) -> Operators:
    """The operators of maps of which every process has its share of rows."""
    group = share.group

    def depthwise_norm(x: Tensor, convolution: nn.Conv2d, bias: Tensor) -> tuple[Tensor, Tensor]:
        halo = convolution.kernel_size[0] // 2
        made = base.depthwise_norm(with_neighbours(x, halo, group), convolution, bias)
        return tuple(y[:, halo : y.shape[1] - halo].contiguous() for y in made)

    def total(squares: Tensor) -> Tensor:
        summed = base.total(squares).contiguous()
        dist.all_reduce(summed, group=group)
        return summed

    def attention(q: Tensor, k: Tensor, v: Tensor, condition: KeysValues) -> Tensor:
        return attention_by_heads(base, q, k, v, condition, share)

    return replace(base, depthwise_norm=depthwise_norm, total=total, attention=attention)


def with_neighbours(x: Tensor, halo: int, group: dist.ProcessGroup | None) -> Tensor:
    """A map (B, h, W, C) with the last and first `halo` rows of those above and below; zeros at the ends."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    above, below = (torch.zeros_like(x[:, :halo], memory_format=torch.contiguous_format) for _ in "ab")
    exchanges = []
    for other, got, given in ((rank - 1, above, x[:, :halo]), (rank + 1, below, x[:, x.shape[1] - halo :])):
        if 0 <= other < count:
            peer = dist.get_global_rank(group, other) if group is not None else other
            exchanges.append(dist.P2POp(dist.isend, given.contiguous(), peer, group))
            exchanges.append(dist.P2POp(dist.irecv, got, peer, group))
    for exchange in dist.batch_isend_irecv(exchanges):
        exchange.wait()
    return torch.cat([above, x, below], dim=1)


def attention_by_heads(
    base: Operators, q: Tensor, k: Tensor, v: Tensor, condition: KeysValues, share: Share
) -> Tensor:
    """Attention (B, n, C) of this process's pixels over those of all and the condition's.

    q, k and v (B, heads, n, C / heads) are exchanged for all pixels of some heads, and the result back.
    """
    batch, heads, n, width = q.shape
    heights = [end - start for start, end in pairwise(share.bounds)]
    pixels = [n * height // heights[share.row_rank] for height in heights]  # of each process, in this map
    count = len(heights)
    spans = [slice(heads * each // count, heads * (each + 1) // count) for each in range(count)]
    mine = spans[share.row_rank]
    packed = torch.stack([q, k, v])
    shapes = [(3, batch, mine.stop - mine.start, each, width) for each in pixels]
    got = _exchange([packed[:, :, span] for span in spans], shapes, share.group)
    q, k, v = torch.cat(got, dim=3)  # (B, heads of this process, N, d) each
    y = base.attention(q, k, v, tuple(part[:, mine] for part in condition))  # (B, N, its heads · d)
    shapes = [(batch, n, (span.stop - span.start) * width) for span in spans]
    return torch.cat(_exchange(list(y.split(pixels, dim=1)), shapes, share.group), dim=2)


def _exchange(
    given: list[Tensor], shapes: list[tuple[int, ...]], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Give each process of a group its tensor; those got have these shapes."""
    sent = torch.cat([tensor.reshape(-1) for tensor in given])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    got = sent.new_empty(sum(sizes))
    dist.all_to_all_single(got, sent, sizes, [tensor.numel() for tensor in given], group)
    return [part.view(shape) for part, shape in zip(got.split(sizes), shapes, strict=True)]
