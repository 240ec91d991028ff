"""The tokenizer against transformers', from each kind of file."""

import copy
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import CLIPTokenizer

from core.weights.clip import TextEncoder
from core.weights.tokenizer import END, START, Tokenizer

TINY = Path(__file__).parents[1] / "models" / "tiny" / "tokenizer"
LENGTH = 20
TEXTS = [
    "", " ", "a red fox in deep snow, morning light", "Don't  SHOUT!!\tit's\n3am…",
    "ünïcode 日本 \U0001f98a é", "<|startoftext|>a<|endoftext|>b <|ENDOFTEXT|>", "<cat> and [dog]",
    "a" * 60, "!" * 5, "</w> x</w>y", "\u00a0half\u2009spaces\u200b",
]  # fmt: skip


def texts() -> list[str]:
    """The above, and random characters of several scripts."""
    draw = random.Random(0)
    letters = "abcxyz  ABC019.,'!<|>/[]ÄßéжЖ漢字\u0301\U0001f98a\t\u3000"
    return [*TEXTS, *("".join(draw.choices(letters, k=draw.randint(1, 50))) for _ in range(300))]


def token(content: str, **flags: bool) -> dict[str, Any]:
    """As configurations hold a token."""
    none = dict.fromkeys(("lstrip", "rstrip", "single_word", "special"), False)
    return {"content": content, "normalized": True, **none, **flags}


ENDS = {"bos_token": token(START), "eos_token": token(END), "pad_token": END, "unk_token": token(END)}
ROWS = {"775": token(START, special=True), "776": token(END, special=True)}
CAT = {"777": token("<cat>")}
LAYOUTS: dict[str, dict[str, Any]] = {  # what lies beside vocab.json and merges.txt
    "alone": {},
    "of transformers 4": {
        "tokenizer_config.json": {"pad_token": "!", "added_tokens_decoder": {"0": token("!"), **ROWS}},
        "special_tokens_map.json": ENDS,
    },
    "before that": {"special_tokens_map.json": ENDS, "tokenizer_config.json": {"pad_token": "!"}},
    "of another padding": {"special_tokens_map.json": {**ENDS, "pad_token": "!"}},
    "with a token": {"tokenizer_config.json": {"added_tokens_decoder": {**ROWS, **CAT}}},
    "with a token, older": {"added_tokens.json": {"<cat>": 777}, "special_tokens_map.json": ENDS},
    "with a special token": {"tokenizer_config.json": {"additional_special_tokens": ["<cat>"]}},
}


@pytest.fixture(params=["of transformers 5", "tokenizer.json, changed", *LAYOUTS])
def folder(request, tmp_path) -> Path:
    """The embedded family's tokenizer, in every layout of files."""
    whole = json.loads((TINY / "tokenizer.json").read_text())
    if request.param in LAYOUTS:
        (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
        merges = "".join(f"{' '.join(pair)}\n" for pair in whole["model"]["merges"])
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    elif request.param == "of transformers 5":
        shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    else:  # of which transformers takes the vocabulary alone
        truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        changed = {**whole, "normalizer": None, "post_processor": None, "truncation": truncation}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    for name, held in LAYOUTS.get(request.param, {}).items():
        (tmp_path / name).write_text(json.dumps(held))
    return tmp_path


def test_ids_places_and_text_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), CLIPTokenizer.from_pretrained(folder)
    ends = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert (ours.start_id, ours.end_id, ours.pad_id) == ends and len(ours) == len(theirs)
    for text in texts():
        whole = theirs(text, return_offsets_mapping=True, verbose=False)
        found = ours.encode(text)
        assert (found.ids, found.offsets) == (whole["input_ids"], whole["offset_mapping"]), text
        assert ours.encode(text, ends=False).ids == found.ids[1:-1]
        assert ours.decode(found.ids) == theirs.decode(found.ids), text
        padded = theirs(text, padding="max_length", max_length=LENGTH, truncation=True)
        assert ours.padded(found.ids, LENGTH) == (padded["input_ids"], padded["attention_mask"]), text


def test_tokens_that_are_added_go_into_a_copy_alone(folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), CLIPTokenizer.from_pretrained(folder)
    before = ours.vocabulary(), ours.added()
    with_more = copy.deepcopy(ours)
    for tokenizer in (with_more.backend, theirs):
        tokenizer.add_tokens([AddedToken("[dog]"), AddedToken("blip", single_word=True)])
    assert with_more.added() == {
        n: i for n, i in theirs.added_tokens_encoder.items() if n not in (START, END, "!")
    }
    for text in ("<cat> and [dog]", "BLIP blips", "[DOG]blip"):
        assert with_more.encode(text).ids == theirs(text)["input_ids"], text
    assert (ours.vocabulary(), ours.added()) == before
    assert with_more.vocabulary() == before[0] and not {START, END} & before[0].keys()


def test_layouts_of_clip_s_own_files_need_no_transformers(
    folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    if "with a" in request.node.name:
        with pytest.raises(ImportError):
            Tokenizer.load(folder)
    else:
        assert len(Tokenizer.load(folder)) == 777


def test_a_text_is_encoded_without_transformers() -> None:
    code = (
        "import sys, torch; from core.weights.clip import TextEncoder\n"
        f"TextEncoder.load({str(TINY.parent)!r}, torch.float32).encode(['a red house'], 'cpu')\n"
        "print('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("kind", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize(
    ("held", "said"), [("<other>", "which has 777 tokens: take both"), (None, "cannot be loaded"), ("", "")]
)
def test_a_start_or_end_that_the_text_encoder_does_not_know_is_told(
    tmp_path: Path, kind: str, held: str | None, said: str
) -> None:
    shutil.copytree(TINY.parent / "text_encoder", tmp_path / "text_encoder")
    shutil.copytree(TINY, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({kind: held}))
    with pytest.raises(ValueError, match=f"^{tmp_path / 'tokenizer'}: .*{said}"):
        TextEncoder.load(str(tmp_path), torch.float32)


def test_merges_at_which_the_library_panics_are_told(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({START: 0, END: 1, "a": 2}))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{END} {START}\n")
    shutil.copytree(TINY.parent / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(ValueError, match=f"^{tmp_path}: the tokenizer cannot be loaded"):
        TextEncoder.load(str(tmp_path), torch.float32)
