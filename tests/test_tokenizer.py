"""The tokenizer against transformers', from each kind of file."""

import copy
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import CLIPTokenizer

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


@pytest.fixture(params=["tokenizer.json", "vocab.json and merges.txt", "with a padding token and more"])
def folder(request, tmp_path) -> Path:
    """The embedded family's tokenizer, in each kind of file."""
    whole = TINY / "tokenizer.json"
    if request.param == "tokenizer.json":
        shutil.copy(whole, tmp_path)
        shutil.copy(whole.with_name("tokenizer_config.json"), tmp_path)
        return tmp_path
    model = json.loads(whole.read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    if request.param.startswith("with"):
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "special"), False)
        more = {str(len(model["vocab"])): {"content": "<cat>", "normalized": True, **flags}}
        stored = {
            "pad_token": {"__type": "AddedToken", "content": "!"},
            "bos_token": START,
            "added_tokens_decoder": more,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(stored))
    return tmp_path


def test_ids_places_and_text_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), CLIPTokenizer.from_pretrained(folder)
    ends = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert (ours.start_id, ours.end_id, ours.padded([], 1)[0][0]) == ends and len(ours) == len(theirs)
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


def test_what_is_stored_beside_the_vocabulary_does_not_cut_or_pad(folder: Path) -> None:
    if not (folder / "tokenizer.json").exists():
        pytest.skip("there alone it can be stored")
    held = json.loads((folder / "tokenizer.json").read_text())
    held["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    before = Tokenizer.load(folder).encode(TEXTS[2]).ids
    (folder / "tokenizer.json").write_text(json.dumps(held))
    assert Tokenizer.load(folder).encode(TEXTS[2]).ids == before and len(before) > 4


def test_a_text_is_encoded_without_transformers() -> None:
    code = (
        "import sys, torch; from core.weights.clip import TextEncoder\n"
        f"TextEncoder.load({str(TINY.parent)!r}, torch.float32).encode(['a red house'], 'cpu')\n"
        "print('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("absent", [START, END])
def test_a_vocabulary_without_start_or_end_is_told(folder: Path, absent: str) -> None:
    if (folder / "tokenizer.json").exists():
        pytest.skip("the other kinds")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    del vocabulary[absent]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=f"the vocabulary lacks {absent.replace('|', '.')}"):
        Tokenizer.load(folder)
