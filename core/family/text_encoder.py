"""Training of the embedded family's text encoder: a scene's attributes from its captions."""

from __future__ import annotations

import modules.torchvision_operators  # noqa: F401  (before transformers)

# isort: split
import json
import logging
from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from core.config.schema import SceneData, TextTrainConfig
from core.config.sizes import TextSizes
from core.scenes.captions import SUBJECTS
from core.scenes.labelled import Captions, caption_batches, read_captions
from core.scenes.scene import ATTRIBUTES, EXTRA_SUBJECTS
from core.training.run import Run, as_keys, train
from core.training.trainer import Recipe, StepLoss
from core.weights.checkpoint import save_tensors, save_text
from core.weights.clip import WORDS, words_of
from modules.recogniser import AttributeHeads, accuracies, attribute_losses

log = logging.getLogger(__name__)

EXPORT = "text"  # a folder
FILES = (
    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", f"tokenizer/{WORDS}",
    "text_encoder/config.json", "text_encoder/model.safetensors",
)  # fmt: skip
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
READ_CAPTIONS = 4000  # whose words become tokens
MAX_VOCABULARY = 2000  # tokens; never reached, as merging ends at whole words
CHECKED = 256  # held-out captions
NO_LOGSNR = 0.0


# --- tokenizer ------------------------------------------------------------------------------------


def make_tokenizer(scenes: SceneData, seed: int) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with a token for every word of the captions, and for every byte."""
    merges = learn_merges(texts_of(scenes, seed))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges), *SPECIAL]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def texts_of(scenes: SceneData, seed: int) -> list[str]:
    """Texts with every word that captions have."""
    extra = [words for subject in EXTRA_SUBJECTS for words in SUBJECTS[subject]]
    # twice: words are joined in the order of their counts
    return [*read_captions(scenes, range(READ_CAPTIONS), seed).texts, *extra, *extra]


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding joins, in order, until every word is one token."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    clip = CLIPTokenizer().backend_tokenizer
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=MAX_VOCABULARY, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


# --- network --------------------------------------------------------------------------------------


def make_text_model(sizes: TextSizes, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModelWithProjection:
    """A text encoder with new weights for a tokenizer."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=sizes.width, projection_dim=sizes.width,
        intermediate_size=sizes.hidden, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


@dataclass(frozen=True)
class TextAnswers:
    """Logits of every attribute from the pooled embedding and from the mean token, and how far from 1
    the mean squares of the two are, as one number."""

    pooled: list[Tensor]
    tokens: list[Tensor]
    scale: Tensor


class TextTraining(nn.Module):
    """A text encoder, and classifiers on what the stages read of it, which are thrown away."""

    def __init__(self, model: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.model = model
        classes = [len(values) for values in ATTRIBUTES.values()]
        self.pooled_heads = AttributeHeads(model.config.projection_dim, classes)
        self.token_heads = AttributeHeads(model.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> TextAnswers:
        """Answers to captions, as token numbers and mask (B, L)."""
        captured: list[Tensor] = []
        norm = self.model.text_model.final_layer_norm
        with norm.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0])):
            pooled = self.model(input_ids=ids, attention_mask=mask).text_embeds  # (B, D)
        (tokens,) = captured  # (B, L, D)
        squares = torch.stack([pooled.square().mean(), tokens.square().mean()])
        scale = squares.log().square().sum()
        return TextAnswers(self.pooled_heads(pooled), self.token_heads(tokens.mean(dim=1)), scale)


# --- recipe ---------------------------------------------------------------------------------------


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token numbers and mask (B, length), padded with the end of text."""
    found = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def make_loss(run: Run, read: Callable[[list[str]], tuple[Tensor, Tensor]]) -> Callable[..., StepLoss]:
    """Cross entropy of all attributes, from the pooled embedding and from the tokens."""

    def loss(module: nn.Module, batch: Captions, _keys: list[tuple[int, ...]]) -> StepLoss:
        ids, mask = read(batch.texts)
        answers = module(ids.to(run.device), mask.to(run.device))
        labels = batch.labels.to(run.device)
        each = attribute_losses(answers.pooled, labels) + attribute_losses(answers.tokens, labels)
        return StepLoss(each, torch.full_like(each, NO_LOGSNR), run.config.scale_weight * answers.scale)

    return loss


def make_check(
    run: Run, module: TextTraining, read: Callable[[list[str]], tuple[Tensor, Tensor]]
) -> Callable[[int], None]:
    """Tells the accuracy on held-out captions."""
    scenes = replace(run.config.scenes, split="held_out")
    plain = read_captions(scenes, range(CHECKED), run.config.seed)
    loose = read_captions(scenes, range(CHECKED), run.config.seed, loosened=1.0)

    def check(step: int) -> None:
        for name, captions in (("captions", plain), ("loosened captions", loose)):
            ids, mask = read(captions.texts)
            answers = module(ids.to(run.device), mask.to(run.device))
            for part in ("pooled", "tokens"):
                shares = accuracies(getattr(answers, part), captions.labels.to(run.device))
                listed = ", ".join(f"{a} {s:.3f}" for a, s in zip(ATTRIBUTES, shares, strict=True))
                log.info("update %d, held-out %s, %s: %s", step, name, part, listed)

    return check


def build(run: Run) -> Recipe:
    """The text encoder's recipe."""
    config = run.config
    if config.scenes is None:
        raise ValueError("the text encoder learns from captions of 'scenes', not from webdataset_path")
    folder = run.export_folder(EXPORT, FILES)
    tokenizer = make_tokenizer(config.scenes, config.seed)
    module = TextTraining(make_text_model(config.text_encoder, tokenizer, config.seed)).to(run.device)
    read = partial(tokenize, tokenizer, length=config.text_encoder.length)
    batches = partial(caption_batches, config.scenes, run.loader_settings, loosened=config.loosened_share)
    words = words_of(texts_of(config.scenes, config.seed))
    export = partial(write_text_encoder, module.model, tokenizer, words, folder)
    check, use = make_check(run, module, read), as_keys(clip_text_path=folder)
    return Recipe(module, batches, make_loss(run, read), check, export, use)


def write_text_encoder(
    model: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    words: Collection[str],
    folder: Path,
    tensors: Mapping[str, Tensor],
    _step: int,
) -> None:
    """The encoder's weights in bfloat16, without the classifiers, the tokenizer, and the words it knows."""
    tokenizer.save_pretrained(folder / "tokenizer")
    save_text(folder / "tokenizer" / WORDS, "".join(f"{word}\n" for word in sorted(words)))
    named = {name: tensors[f"model.{name}"].bfloat16() for name in model.state_dict()}
    config = copy(model.config)
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    config.save_pretrained(folder / "text_encoder")
    save_tensors(folder / "text_encoder" / "model.safetensors", named, {"format": "pt"})


def train_text_encoder(config: TextTrainConfig) -> int:
    """Run this training, or go on with it; return the exit code."""
    return train(config, [], build)
