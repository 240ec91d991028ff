"""CLIP's text and image towers, from a folder or a hub id, not fetched unasked.

transformers, torchvision and huggingface_hub take seconds to import: each is, once something needs it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from core.weights.checkpoint import build_empty, read_tensors
from core.weights.published import fetching, published_at
from core.weights.tokenizer import Tokenizer
from modules.clip_text import ClipText, ClipTextConfig

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]  # of the pixels CLIP was trained on, RGB
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WORDS = "words.txt"  # beside a tokenizer: the words that its text encoder knows, if it knows few
MODEL_FILES = ("config.json", WEIGHTS, INDEX, "model-*.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
PUBLISHED_TEXT = {  # what each file holds
    "text_encoder/model.safetensors": "text encoder", "text_encoder/config.json": "its sizes",
    "tokenizer/vocab.json": "tokenizer", "tokenizer/merges.txt": "its merges",
}  # fmt: skip


# How names begin that a file of all of CLIP holds besides one tower.
OF_VISION = ("vision_model.", "visual_projection.")
OF_TEXT = ("text_model.", "text_projection.")


@dataclass(frozen=True)
class TextCondition:
    """What one prompt becomes."""

    tokens: Tensor  # (1, L, D), the last layer's output before the final LayerNorm
    pooled: Tensor  # (1, 1, P), the projected embedding at the end-of-text token


# ----------------------------------------------------------------------------------------------- encoders


@dataclass
class TextEncoder:
    """CLIP's text tower with its tokenizer."""

    model: ClipText
    tokenizer: Tokenizer

    @classmethod
    def load(
        cls,
        source: str,
        dtype: torch.dtype,
        allow_download: bool = False,
        device: torch.device | str = "cpu",
    ) -> TextEncoder:
        """Load to a device from a folder, or a hub id that is in the local cache or may be downloaded.

        Either holds `text_encoder/` and `tokenizer/`, or the files of both side by side, as safetensors.
        FileNotFoundError says what is missing and how to get it, ValueError what is wrong with a file.
        """
        model_folder, tokenizer_folder = find_text_encoder(source, allow_download)
        tokenizer, model = _load_tokenizer(tokenizer_folder), _load_text_model(model_folder, dtype, device)
        if max(tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) >= model.config.vocab_size:
            raise ValueError(
                f"{tokenizer_folder}: the tokenizer does not belong to the text encoder in {model_folder}, "
                f"which has {model.config.vocab_size} tokens: take both from one place"
            )
        return cls(model, tokenizer)

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the model and return self."""
        self.model.to(device)
        return self

    def encode(
        self, prompts: Sequence[str], device: torch.device | str, together: bool = False
    ) -> dict[str, TextCondition]:
        """Encode every distinct prompt once, on `device`, where the model stays until it is moved away.

        Prompts go through one by one, so that none depends on its neighbours in the last bit; `together` is
        faster where that does not matter. A prompt that is too long is cut with a warning.
        """
        assert not isinstance(prompts, str), "prompts is a sequence of prompts"
        self.to(device)
        distinct = list(dict.fromkeys(prompts))
        groups = [distinct] if together else [[prompt] for prompt in distinct]
        with torch.no_grad():
            parts = [self.embed(group, device) for group in groups]
        rows = [TextCondition(tokens[i : i + 1], pooled[i : i + 1])
                for tokens, pooled in parts for i in range(len(tokens))]  # fmt: skip
        return dict(zip(distinct, rows, strict=True))

    def embed(self, prompts: Sequence[str], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) and pooled embeddings (B, 1, P) of prompts in one pass, with gradients.

        The model must be on `device`.
        """
        ids, mask = self.tokenize(prompts)
        return self.embed_ids(ids.to(device), mask.to(device))

    def embed_ids(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The same of token ids and their attention mask, both (B, L) on the model's device."""
        tokens = self.model(ids, mask)  # (B, L, D)
        # The first end of text: padding repeats it, and an added token may have a higher id.
        ends = (ids == self.tokenizer.end_id).int().argmax(dim=1)
        last = tokens[torch.arange(len(ids), device=ids.device), ends][:, None]  # (B, 1, D)
        return tokens, self.model.project(last)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, both (B, L), of prompts; one that is too long is cut with a warning."""
        length = self.model.config.max_position_embeddings
        rows = []
        for prompt in prompts:
            ids = self.tokenizer.encode(prompt).ids
            if len(ids) > length:
                self.warn_of_cut(ids[length - 1 : -1])  # the end-of-text token stays
            rows.append(self.tokenizer.padded(ids, length))
        ids, masks = (torch.tensor(part) for part in zip(*rows, strict=True))
        return ids, masks

    def warn_of_cut(self, cut: Sequence[int]) -> None:
        """Warn that these ids, of tokens at a prompt's end, are left out."""
        start = self.tokenizer.decode(cut[:8])
        warnings.warn(
            f"the prompt is {len(cut)} tokens too long; what follows is cut: {start!r} …", stacklevel=2
        )


@dataclass(frozen=True)
class ImageEncoder:
    """CLIP's vision tower."""

    model: CLIPVisionModelWithProjection

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, allow_download: bool = False) -> ImageEncoder:
        """Load as `TextEncoder.load` does; the files are in `image_encoder/` or at the top."""
        root = _locate(source, ("image_encoder",), "image encoder", allow_download)
        model_folder = _model_folder(root, "image_encoder", "image encoder")
        return cls(_load_image_model(model_folder, dtype))

    def to(self, device: torch.device | str) -> ImageEncoder:
        """Move the model and return self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, image: Image.Image, device: torch.device | str) -> Tensor:
        """The embedding (1, 1, I) of a picture, of which the central square counts, on `device`."""
        pixels = clip_pixels(image, self.model.config.image_size).to(device, self.model.dtype)
        return self.to(device).model(pixel_values=pixels).image_embeds[:, None]


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """What CLIP sees, (1, 3, size, size): shorter side resized (bicubic), centre-cropped, normalised."""
    from modules.torchvision_operators import torchvision

    pictures = torchvision.transforms.functional
    resized = pictures.resize(image.convert("RGB"), size, pictures.InterpolationMode.BICUBIC)
    square = pictures.to_tensor(pictures.center_crop(resized, size))
    return pictures.normalize(square, CLIP_MEAN, CLIP_STD)[None]


# ------------------------------------------------------------------------------------------------ loading


def find_text_encoder(source: str, allow_download: bool = False) -> tuple[Path, Path]:
    """The folders of the text model and of its tokenizer; FileNotFoundError says what is missing."""
    root = _locate(source, ("text_encoder", "tokenizer"), "text encoder", allow_download)
    return _model_folder(root, "text_encoder", "text encoder"), _tokenizer_folder(root)


def _locate(source: str, parts: Sequence[str], what: str, allow_download: bool) -> Path:
    """The folder `source`, or the one in which the hub's cache keeps that repository."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import constants, snapshot_download

    patterns = [f"{part}{name}" for part in ("", *(f"{part}/" for part in parts))
                for name in MODEL_FILES + TOKENIZER_FILES]  # fmt: skip
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=not allow_download))
    except (OSError, ValueError) as error:
        if not allow_download:
            reason = "it is neither a folder nor a repository in the hub's local cache"
        elif constants.HF_HUB_OFFLINE:
            reason = "it is not in the hub's local cache, and HF_HUB_OFFLINE forbids the download"
        else:
            reason = f"it is not a folder, and the hub does not give it: {_one_line(error)}"
        message = f"{source}: the {what} cannot be found ({reason}); {_way_out(what, Path(source))}"
        raise FileNotFoundError(message) from None


def absent_text_files(source: str) -> dict[str, str]:
    """What the published text encoder lacks, if it belongs in the folder `source`: contents by path."""
    try:
        find_text_encoder(source)
    except FileNotFoundError:
        return {str(path): what for path, what in _absent_published(Path(source)).items()}
    return {}


def weights_of_text_encoder(source: str) -> str:
    """The file with a text encoder's weights; the source itself where there is no such file."""
    with suppress(OSError, ValueError):
        file = find_text_encoder(source)[0] / WEIGHTS
        return str(file) if file.is_file() else source
    return source


def words_of(texts: Iterable[str]) -> list[str]:
    """The words of texts in lower case, each once, in their order."""
    return list(dict.fromkeys(word for text in texts for word in re.findall(r"[^\W_]+", text.lower())))


def unknown_words(texts: Iterable[str], source: str) -> list[str]:
    """The words of texts that a text encoder does not know, where its folder tells which it knows."""
    try:
        path = find_text_encoder(source)[1] / WORDS
        known = set(path.read_text("utf-8").split())
    except (OSError, ValueError):  # without one nothing is told here
        return []
    return [word for word in words_of(texts) if word not in known]


def _absent_published(root: Path) -> dict[Path, str]:
    paths = {root / name: what for name, what in PUBLISHED_TEXT.items()}
    return {path: what for path, what in paths.items() if not path.exists() and published_at(path)}


def _way_out(what: str, root: Path) -> str:
    if what == "image encoder":
        return "name its folder, or use the hub id openai/clip-vit-large-patch14 with --allow_download"
    absent = [published_at(path) for path in _absent_published(root)]
    first = f"run {fetching(absent)}" if absent else "name its folder"
    fetched = "which the scripts in inference/ fetch with --allow_download"
    return f"{first}, or use the hub id stabilityai/stable-cascade, {fetched}"


def _model_folder(root: Path, part: str, what: str) -> Path:
    folder = root / part if (root / part).is_dir() else root
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        missing.append(WEIGHTS)
    return _complete(root, folder, missing, what)


def _tokenizer_folder(root: Path) -> Path:
    folder = root / "tokenizer" if (root / "tokenizer").is_dir() else root
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    return _complete(root, folder, [] if (folder / "tokenizer.json").is_file() else missing, "tokenizer")


def _complete(root: Path, folder: Path, missing: Sequence[str], what: str) -> Path:
    if missing:
        names = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'}"
        raise FileNotFoundError(
            f"{folder}: the {what} is incomplete, {names} missing; {_way_out(what, root)}"
        )
    return folder


def _load_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.load(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library panics at some damaged files
        raise ValueError(f"{folder}: the tokenizer cannot be loaded ({_one_line(error)})") from None


def _load_text_model(folder: Path, dtype: torch.dtype, device: torch.device | str) -> ClipText:
    """The text model in `folder`; ValueError, of one sentence, for what is missing or does not fit."""
    with _told_of(folder, "the text encoder"):
        config = _text_config(json.loads((folder / "config.json").read_text("utf-8")))
        tensors = _read_model(folder, dtype, OF_VISION, device)
        model = build_empty(partial(ClipText, config))
        report = model.load_state_dict(tensors, strict=False, assign=True)
        _check_complete(report.missing_keys)
    return model.eval().requires_grad_(False)


def _text_config(stored: dict[str, Any]) -> ClipTextConfig:
    """The sizes in a config.json, of the text tower or of all of CLIP."""
    stored = stored.get("text_config") or stored
    return ClipTextConfig(**{f.name: stored[f.name] for f in fields(ClipTextConfig) if f.name in stored})


def _load_image_model(folder: Path, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    """The image model in `folder`; ValueError where transformers would draw missing tensors at random."""
    import modules.torchvision_operators  # noqa: F401  (before transformers)

    # isort: split
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with _told_of(folder, "the image encoder"):
        config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
        tensors = _read_model(folder, dtype, OF_TEXT)
        with _quiet_transformers():
            model, report = CLIPVisionModelWithProjection.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
        _check_complete(report["missing_keys"])
    return model.eval().requires_grad_(False)


@contextmanager
def _told_of(folder: Path, what: str) -> Iterator[None]:
    """Within it, what goes wrong becomes a ValueError of one sentence."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder}: {what} cannot be loaded ({_one_line(error)})") from None


def _check_complete(missing: Iterable[str]) -> None:
    if names := sorted(missing):
        raise ValueError(f"{len(names)} tensors are missing, {names[0]} among them")


def _read_model(
    folder: Path, dtype: torch.dtype, without: tuple[str, ...], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The tensors of a model in one file or, by its index, in several, but for those that begin so."""
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
    parts = [read_tensors(folder / file, dtype, device, without) for file in files]
    return {name: tensor for part in parts for name, tensor in part.items()}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bar, and its report of the other tower where a file holds all of CLIP."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
