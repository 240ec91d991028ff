"""The U-shaped trunk that Stage B and Stage C share: levels of blocks, skips, repeats, control, guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.blocks import (
    AttnBlock,
    KeysValues,
    Modulation,
    Operators,
    ResBlock,
    TimestepBlock,
    channels_first,
    modulated,
    pixels_last,
    resize_like,
    timestep_embedding,
    xavier_linears,
)
from modules.operators import operators_for

LevelKeysValues = list[KeysValues | None]  # one entry per block of a level, None where it is not attention
AtSite = Callable[
    [int, Tensor], Tensor
]  # called with the level's number in running order and its feature map
Scaler = Callable[[int, int, int], nn.Module]  # (level, c_in, c_out) -> the change between two levels


@dataclass
class InnerMaps:
    """What all levels but the outermost make of a step, kept for steps after it, as it changes little.

    It is made anew every `every` steps (DeepCache, arXiv 2312.00858), and where there are more samples than
    it has.
    """

    every: int
    kept: Tensor | None = None  # (B, C0, H, W), as the outermost level gets it on the way up
    age: int = 0  # steps since it was made

    def of(self, samples: int) -> Tensor | None:
        """The map of the first `samples` samples, for one more step; None where it has to be made."""
        self.age += 1
        if self.kept is None or self.age >= self.every or len(self.kept) < samples:
            return None
        return self.kept[:samples]

    def keep(self, x: Tensor) -> None:
        """Keep the map of this step."""
        self.kept, self.age = x, 0


@dataclass(frozen=True)
class Times:
    """Embeddings of r and further conditions (B, c_r·(1 + n)), and what timestep blocks make of them.

    `modulations` has an entry per level, in running order, and block, None where it is no timestep block.
    """

    embed: Tensor
    modulations: list[list[Modulation | None]] | None = None  # None: each is computed when it is needed

    def at(self, index: int) -> Times:
        """Those of one of the times alone, for all samples of a batch."""
        row = slice(index, index + 1)
        levels = [
            [None if m is None else (m[0][row], m[1][row]) for m in level] for level in self.modulations or ()
        ]
        return Times(self.embed[row], levels or None)

    def modulation(self, level: int, index: int, block: TimestepBlock) -> Modulation:
        """Scale and shift of a level's block."""
        made = None if self.modulations is None else self.modulations[level][index]
        return block.scale_shift(self.embed) if made is None else made


def sliced_keys_values(levels: list[LevelKeysValues], samples: slice) -> list[LevelKeysValues]:
    """The keys and values of these samples."""
    return [[None if kv is None else (kv[0][samples], kv[1][samples]) for kv in level] for level in levels]


def build_level(
    layout: str,
    count: int,
    c: int,
    *,
    c_skip: int,
    heads: int,
    c_cond: int,
    c_r: int,
    t_conds: tuple[str, ...],
    kernel_size: int,
    dropout: float,
    self_attn: bool,
) -> nn.ModuleList:
    """One level: `layout` (C: ResBlock, T: TimestepBlock, A: AttnBlock) repeated `count` times."""
    blocks = nn.ModuleList()
    for kind in layout * count:
        if kind == "C":
            blocks.append(ResBlock(c, 0 if len(blocks) else c_skip, kernel_size, dropout))
        elif kind == "T":
            blocks.append(TimestepBlock(c, c_r, t_conds))
        elif kind == "A":
            blocks.append(AttnBlock(c, c_cond, heads, self_attn))
        else:
            raise ValueError(f"the level layout {layout!r} holds {kind!r}; the blocks are C, T and A")
    return blocks


class CascadeUNet(nn.Module):
    """Levels of blocks on the way down and up again, with skips between them, for Stage B and Stage C."""

    def __init__(
        self,
        *,
        c_hidden: Sequence[int],
        nhead: Sequence[int],
        blocks: Sequence[Sequence[int]],
        block_repeat: Sequence[Sequence[int]],
        level_config: Sequence[str],
        c_cond: int,
        c_r: int,
        t_conds: Sequence[str],
        kernel_size: int,
        dropout: Sequence[float],
        self_attn: bool,
        down_scaler: Scaler,
        up_scaler: Scaler,
    ) -> None:
        super().__init__()
        n = len(c_hidden)
        for name, values in (
            ("nhead", nhead),
            ("level_config", level_config),
            ("dropout", dropout),
            ("blocks[0]", blocks[0]),
            ("blocks[1]", blocks[1]),
        ):
            if len(values) != n:
                raise ValueError(f"{name} has {len(values)} entries, but c_hidden has {n} levels")
        self.c_r, self.t_conds = c_r, tuple(t_conds)
        self.gradient_checkpointing = False
        # What makes operators for parts of a map out of a device's own, where a map is shared out.
        self.over: Callable[[Operators], Operators] | None = None
        self.plain = False  # without the device's own operators

        def level(i: int, count: int, c_skip: int) -> nn.ModuleList:
            return build_level(
                level_config[i],
                count,
                c_hidden[i],
                c_skip=c_skip,
                heads=nhead[i],
                c_cond=c_cond,
                c_r=c_r,
                t_conds=self.t_conds,
                kernel_size=kernel_size,
                dropout=dropout[i],
                self_attn=self_attn,
            )

        def repeat_mappers(i: int, repeat: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(c_hidden[i], c_hidden[i], 1) for _ in range(repeat - 1))

        self.down_blocks, self.down_downscalers, self.down_repeat_mappers = (
            nn.ModuleList() for _ in range(3)
        )
        for i in range(n):
            self.down_downscalers.append(down_scaler(i, c_hidden[i - 1], c_hidden[i]) if i else nn.Identity())
            self.down_blocks.append(level(i, blocks[0][i], 0))
            self.down_repeat_mappers.append(repeat_mappers(i, block_repeat[0][i]))
        self.up_blocks, self.up_upscalers, self.up_repeat_mappers = (nn.ModuleList() for _ in range(3))
        for k, i in enumerate(reversed(range(n))):
            self.up_blocks.append(level(i, blocks[1][k], c_hidden[i] if k else 0))
            self.up_upscalers.append(up_scaler(i, c_hidden[i], c_hidden[i - 1]) if i else nn.Identity())
            self.up_repeat_mappers.append(repeat_mappers(i, block_repeat[1][k]))

    def embed_time(self, r: Tensor, conditions: Sequence[Tensor | None]) -> Tensor:
        """Embeddings of r (B,) and of further conditions (B,) (None: 0), side by side: (B, c_r·(1 + n))."""
        values = [r] + [torch.zeros_like(r) if c is None else c for c in conditions]
        return torch.cat([timestep_embedding(value, self.c_r) for value in values], dim=1)

    def level_keys_values(self, tokens: Tensor) -> list[LevelKeysValues]:
        """Keys and values of condition tokens (B, n, c_cond) per level and block, in running order."""
        levels = [*self.down_blocks, *self.up_blocks]
        return [
            [b.keys_values(tokens) if isinstance(b, AttnBlock) else None for b in level] for level in levels
        ]

    def times(self, r: Tensor, conditions: Sequence[Tensor | None]) -> Times:
        """All that depends on the times r (S,) alone: of a whole pass in one product a block."""
        embed = self.embed_time(r, conditions)
        levels = [*self.down_blocks, *self.up_blocks]
        return Times(
            embed,
            [[b.scale_shift(embed) if isinstance(b, TimestepBlock) else None for b in lv] for lv in levels],
        )

    def resblock_runs(self) -> list[int]:
        """How often ResBlocks run in each level, in running order, repeats counted."""
        blocks = (*self.down_blocks, *self.up_blocks)
        mappers = (*self.down_repeat_mappers, *self.up_repeat_mappers)
        counts = (sum(isinstance(block, ResBlock) for block in level) for level in blocks)
        return [count * (len(others) + 1) for count, others in zip(counts, mappers, strict=True)]

    def run_levels(
        self,
        x: Tensor,
        time: Times,
        keys_values: list[LevelKeysValues],
        control: Sequence[Tensor | None] | None = None,
        at_site: AtSite | None = None,
        inner: InnerMaps | None = None,
    ) -> Tensor:
        """Down and up through all levels.

        x (B, C0, H, W) -> the same shape. `control` has an entry per ResBlock run, added before it.
        `at_site(n, x)` is called after the first attention block of level n, and what it returns goes on.
        `inner` stands for all levels but the outermost in some steps; not with `control`.
        """
        assert inner is None or not control, "control entries are counted over all levels"
        entries = iter(control or ())
        run = partial(self._run_level, ops=self._operators(x), time=time, control=entries, at_site=at_site)
        skips: list[Tensor] = []
        n = len(self.down_blocks)

        def down(i: int, x: Tensor) -> Tensor:
            x = self.down_downscalers[i](x)
            x = run(i, self.down_blocks[i], self.down_repeat_mappers[i], x, None, keys_values[i])
            skips.append(x)
            return x

        def up(k: int, x: Tensor) -> Tensor:
            skip = skips.pop()  # of the deepest level it is x itself
            blocks, mappers, kv = self.up_blocks[k], self.up_repeat_mappers[k], keys_values[n + k]
            x = run(n + k, blocks, mappers, x, skip if k else None, kv)
            return self.up_upscalers[k](x)

        x = down(0, x)
        kept = None if inner is None else inner.of(len(x))
        if kept is None:
            for i in range(1, n):
                x = down(i, x)
            for k in range(n - 1):
                x = up(k, x)
            if inner is not None:
                inner.keep(x)
        return up(n - 1, x if kept is None else kept)

    def init_trunk(self) -> None:
        """Initial values of the levels for training from nothing: timestep blocks and GRN start idle."""
        xavier_linears(self)
        depth = sum(1 for m in self.down_blocks.modules() if isinstance(m, ResBlock))
        for module in self.modules():
            if isinstance(module, TimestepBlock):
                for name in module.names:
                    nn.init.zeros_(module.get_submodule(name).weight)
            elif isinstance(module, ResBlock):
                module.channelwise[-1].weight.data *= (1 / depth) ** 0.5
                nn.init.zeros_(module.channelwise[2].gamma)
                nn.init.zeros_(module.channelwise[2].beta)
            elif isinstance(module, AttnBlock):
                nn.init.xavier_uniform_(module.attention.attn.in_proj_weight)
                nn.init.zeros_(module.attention.attn.in_proj_bias)

    def _operators(self, x: Tensor) -> Operators | None:
        """How blocks compute here without gradients; None where their plain forward is asked for."""
        if torch.is_grad_enabled() or self.training or torch.is_autocast_enabled(x.device.type):
            return None
        ops = operators_for(x, self.plain)
        return ops if self.over is None else self.over(ops)

    def _run_level(
        self,
        site: int,
        blocks: nn.ModuleList,
        repeat_mappers: nn.ModuleList,
        x: Tensor,
        skip: Tensor | None,
        keys_values: LevelKeysValues,
        *,
        ops: Operators | None,
        time: Times,
        control: Iterator[Tensor | None],
        at_site: AtSite | None,
    ) -> Tensor:
        if skip is not None:
            x = resize_like(x, skip.shape[-2:])
        waiting = at_site is not None
        modulation = None  # of a timestep block, where the attention block after it applies it
        for repeat in range(len(repeat_mappers) + 1):
            for j, (block, kv) in enumerate(zip(blocks, keys_values, strict=True)):
                if isinstance(block, ResBlock):
                    entry = next(control, None)
                    if entry is not None:
                        x = x + resize_like(entry, x.shape[-2:])
                    x = self._call(block, x, skip if j == 0 else None, ops)
                elif isinstance(block, AttnBlock):
                    x = self._call(block, x, kv, ops, modulation)
                    modulation = None
                    if waiting:
                        x, waiting = at_site(site, x), False
                elif ops is None:
                    x = self._call(block, x, time.embed)
                else:
                    modulation = time.modulation(site, j, block)
                    if not (j + 1 < len(blocks) and isinstance(blocks[j + 1], AttnBlock)):
                        x, modulation = channels_first(modulated(pixels_last(x), modulation)), None
            if repeat < len(repeat_mappers):
                x = repeat_mappers[repeat](x)
        return x

    def _call(self, block: nn.Module, x: Tensor, *others: Any) -> Tensor:
        """A block's output, computed again in the backward pass instead of kept where that is set."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *others, use_reentrant=False)
        return block(x, *others)
