"""Personalised training: LoRA of Stage C and new tokens from a few pictures (paper Appendix D)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config.schema import PersonalizedTrainConfig, phases, stage_c_sizes
from core.config.sizes import StageCSizes
from core.data.buckets import make_buckets
from core.data.folder import FolderIndex
from core.data.loader import Batch, FolderData
from core.data.sources import Data, open_data, stream
from core.pipeline.conditioning import Conditions
from core.training.guidance import NoisyLatents, SampleNoise, drop_conditions
from core.training.run import Run, plain_positions
from core.weights.clip import TextEncoder
from core.weights.lora.files import LoraFile, LoraTokens, write_lora
from core.weights.lora.layouts import KOHYA
from core.weights.lora.names import stage_c_weights
from core.weights.lora.tokens import add_tokens, base_rows, mentions, whole_rows
from modules.guidance import Guidance
from modules.lora import LoraUpdate, TrainedTokens, train_lora
from modules.stage_c import StageC

LORA, TOKENS = "lora.", "tokens.offsets"  # of the trained module's tensors


# --- the module -----------------------------------------------------------------------------------


class PersonalizedStageC(nn.Module):
    """LoRA and token offsets with all that is frozen around them: only the former belong to this module.

    `rows` are those of the new tokens in the text encoder's embedding. Everything lies on one device.
    """

    def __init__(
        self,
        stage_c: StageC,
        guidance: Guidance | None,
        text: TextEncoder,
        weights: Sequence[str],
        rank: int,
        rows: Sequence[int] = (),
    ) -> None:
        super().__init__()
        for network in (stage_c, guidance, text.model):
            if network is not None:
                network.requires_grad_(False).eval()
        updates = train_lora(stage_c, weights, rank)
        self.lora = nn.ModuleDict({name.replace(".", "/"): update for name, update in updates.items()})
        self.tokens = TrainedTokens(text.model.get_input_embeddings(), rows) if rows else None
        self._frozen = (stage_c, guidance, text)  # in a tuple: not submodules, not parameters

    @property
    def stage_c(self) -> StageC:
        """The base, with the LoRA applied."""
        return self._frozen[0]

    @property
    def guidance(self) -> Guidance | None:
        """The frozen guidance."""
        return self._frozen[1]

    def conditions(self, captions: Sequence[str], clip_img: Tensor) -> Conditions:
        """The conditions of captions with new tokens and of image embeddings (B, 1, I)."""
        with torch.autocast(clip_img.device.type, enabled=False):  # as in inference
            tokens, pooled = self._frozen[2].embed(captions, clip_img.device)
        return Conditions(tokens, pooled, clip_img.to(pooled))

    @torch.no_grad()
    def start_from(self, lora: LoraFile, names: Sequence[str]) -> None:
        """Take up a trained LoRA, and the offsets of those of the new tokens that it has by name.

        ValueError where its updates are not of these weights or of another rank.
        """
        for name, update in self.lora.items():
            given = lora.updates.get(name.replace("/", "."))
            if given is None or given.rank != update.update.rank:
                found = "none" if given is None else f"one of rank {given.rank}"
                raise ValueError(
                    f"the LoRA to start from has {found} of {name.replace('/', '.')}, but 'module_filters' "
                    f"and 'lora_rank' ask for one of rank {update.update.rank}"
                )
            update.down.copy_(given.down)
            update.up.copy_(given.up * given.alpha)
        if self.tokens is not None and lora.tokens is not None and not lora.tokens.absolute:
            for name, value in zip(lora.tokens.names or (), lora.tokens.values, strict=False):
                if name in names:
                    self.tokens.offsets[list(names).index(name)] = value

    def forward(
        self, latents: NoisyLatents, captions: Sequence[str], clip_img: Tensor, noise: SampleNoise
    ) -> Tensor:
        """The prediction (B, 16, H, W), guided where the latent is larger than the low-resolution one.

        The features that guide come from Stage C with the LoRA, and carry no gradient. Run it under autocast
        where Stage C is in bfloat16.
        """
        both = self.conditions([*captions, ""], F.pad(clip_img, (0, 0, 0, 0, 0, 1)))
        full = Conditions(*(value[:-1] for value in vars(both).values()))
        seen = drop_conditions(full, both.only(len(captions)), noise)
        held = self.stage_c.prepare(seen.clip_text, seen.clip_text_pooled, seen.clip_img)
        dtype = self.stage_c.clf[1].weight.dtype
        size, size_lr = latents.x.shape[-2:], latents.x_lr.shape[-2:]
        guidance = None
        if self.guidance is not None and size.numel() > size_lr.numel():
            with torch.no_grad():
                _, features = self.stage_c.predict_with_features(latents.x_lr.to(dtype), latents.r_lr, held)
                guidance = self.guidance.prepare(features, self.stage_c.site_sizes(tuple(size)))
        return self.stage_c.predict(latents.x.to(dtype), latents.r, held, guidance=guidance)


def chosen_weights(sizes: StageCSizes, filters: Sequence[str]) -> list[str]:
    """Stage C's weights in modules whose names contain one of the filters; ValueError where none does."""
    weights = list(stage_c_weights(sizes))
    chosen = [name for name in weights if any(part in name.rpartition(".")[0] for part in filters)]
    if not chosen:
        raise ValueError(f"'module_filters' {list(filters)} are in no name of Stage C's modules: use '.attn'")
    return chosen


# --- new tokens -----------------------------------------------------------------------------------


def add_new_tokens(text: TextEncoder, config: PersonalizedTrainConfig) -> list[int]:
    """Add the configured tokens to a text encoder, each at the mean that it starts from: their rows.

    ValueError where an expression matches nothing, or a name cannot be a token.
    """
    if not config.train_tokens:
        return []
    names, expressions = zip(*config.train_tokens, strict=True)
    rows = add_tokens(text, names)
    embedding = text.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[rows] = base_rows(text, expressions, rows).to(embedding)
    return rows


def check_captions(index: FolderIndex, config: PersonalizedTrainConfig) -> None:
    """ValueError where a token that is to be trained stands in no caption."""
    captions = {sample.caption for sample in index.samples}
    for name, _ in config.train_tokens:
        if not any(mentions(caption, name) for caption in captions):
            where = "'tmp_prompt'" if config.tmp_prompt is not None else f"a caption in {index.folder}"
            raise ValueError(f"the token {name!r} of 'train_tokens' is not in {where}: put it there")


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What a step sees: pictures of the subject and, with prior preservation, of what should stay."""

    subject: Batch
    prior: Batch | None


def at_every_size(index: FolderIndex, sizes: Sequence[int], ratios: Sequence[str]) -> FolderData:
    """Pictures in buckets of each of the sizes; none is enlarged, but to the smallest size."""
    members: dict[tuple[int, int], list[int]] = {}
    for side in sizes:
        buckets = make_buckets(side, ratios)
        for number, sample in enumerate(index.samples):
            if side == min(sizes) or side * side <= sample.height * sample.width:
                members.setdefault(buckets.nearest(sample.height, sample.width), []).append(number)
    return FolderData(index, {size: np.array(members[size]) for size in sorted(members)})


def open_prior(config: PersonalizedTrainConfig, sizes: Sequence[int]) -> Data | None:
    """The pictures of what should stay, at these sizes; None without prior preservation."""
    if config.prior_path is None and config.prior_scenes is None:
        return None
    return open_data(
        replace(
            config, webdataset_path=config.prior_path, scenes=config.prior_scenes,
            tmp_prompt=config.prior_prompt, image_size=tuple(sizes),
        )
    )  # fmt: skip


def phase_batches(
    run: Run, sizes: Sequence[int], position: Mapping[str, Any] | None = None
) -> Iterator[tuple[Shown, dict[str, Any]]]:
    """Endless batches at these sizes from a position on, each with the position after it."""
    position = position or {"subject": None, "prior": None}

    def batches(data: Data, key: str) -> Iterator[tuple[Batch, dict[str, int]]]:
        return plain_positions(partial(stream, data), run.loader_settings, position[key])

    subject = batches(at_every_size(run.data.index, sizes, run.config.multi_aspect_ratio), "subject")
    prior = open_prior(run.config, sizes)
    others = repeat((None, None)) if prior is None else batches(prior, "prior")
    for (batch, after), (other, other_after) in zip(subject, others, strict=False):
        yield Shown(batch, other), {"subject": after, "prior": other_after}


def scheduled_batches(run: Run, position: Mapping[str, Any] | None) -> Iterator[tuple[Shown, dict[str, Any]]]:
    """The run's batches from a position on, endlessly; each part of the schedule begins its data anew.

    A position counts batches, of which an update has `steps`: another number of processes may change that.
    """
    schedule, steps = phases(run.config), run.config.grad_accum_steps
    starts = [start * steps for start, _ in schedule]
    count, inner = 0, None
    if position is not None:
        count = position["count"] * steps // position.get("steps", steps)  # without: of an older checkpoint
        inner = position["inner"]
    while True:
        number = bisect_right(starts, count) - 1
        end = starts[number + 1] if number + 1 < len(starts) else math.inf
        start = None if count == starts[number] else inner
        with closing(phase_batches(run, schedule[number][1], start)) as batches:
            for batch, inner in batches:
                count += 1
                yield batch, {"count": count, "inner": inner, "steps": steps}
                if count == end:
                    break


# --- files ----------------------------------------------------------------------------------------


def lora_file(
    tensors: Mapping[str, Tensor], config: PersonalizedTrainConfig, rows: Sequence[int]
) -> LoraFile:
    """The LoRA of the trained module's tensors, with the tokens' names and what they start from."""
    names = [name.removesuffix(".down") for name in tensors if name.endswith(".down")]
    updates = {
        name.removeprefix(LORA).replace("/", "."): LoraUpdate(tensors[f"{name}.down"], tensors[f"{name}.up"])
        for name in names
    }
    return LoraFile(updates, stage_c_sizes(config), tokens=_named_tokens(tensors.get(TOKENS), config, rows))


def _named_tokens(
    offsets: Tensor | None, config: PersonalizedTrainConfig, rows: Sequence[int]
) -> LoraTokens | None:
    if offsets is None:
        return None
    names, expressions = zip(*config.train_tokens, strict=True)
    return LoraTokens(offsets, tuple(rows), names, expressions)


def write_trained(path: Path, lora: LoraFile, layout: str, text: TextEncoder) -> None:
    """Write a LoRA in a layout; kohya's holds whole token rows, which the text encoder gives."""
    if layout == KOHYA and lora.tokens is not None:
        lora = replace(lora, tokens=whole_rows(text, lora.tokens))
    write_lora(path, lora, layout)


def check_layout(config: PersonalizedTrainConfig) -> None:
    """ValueError where the configured layout cannot hold what would be trained: one like it is written."""
    sizes, count = stage_c_sizes(config), len(config.train_tokens)
    shapes = {name: stage_c_weights(sizes)[name] for name in chosen_weights(sizes, config.module_filters)}
    updates = {n: LoraUpdate(torch.ones(1, shape[1]), torch.ones(shape[0], 1)) for n, shape in shapes.items()}
    tokens = _named_tokens(torch.zeros(count, sizes.c_clip_text) if count else None, config, range(count))
    if config.lora_layout == KOHYA and tokens is not None:
        tokens = replace(tokens, initialise_from=None, absolute=True)
    with TemporaryDirectory() as folder:
        try:
            write_lora(Path(folder, "lora"), LoraFile(updates, sizes, tokens=tokens), config.lora_layout)
        except ValueError as error:
            raise ValueError(f"'lora_layout' cannot be {config.lora_layout}: {error}") from None
