"""Prompts with weights, long ones, from files, with wildcards, over grids, and in a loop."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_pipeline
from PIL import Image

import core.pipeline.stages
from core.commands.flags import make_jobs, parse_with_preset, picture_parser
from core.commands.grid import axes_of, bases_of, cells_of
from core.commands.pictures import made_alike
from core.commands.prompts import read_lines
from core.config.settings import Job, Settings
from core.config.weighted import weighted_text
from core.config.wildcards import Wildcards
from core.pictures.images import read_image_metadata
from core.pictures.sheets import SIDE, grid_sheet
from core.pipeline.made import Record, WeightHashes
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Progress, ProgressBars
from core.pipeline.prompts import doubts
from core.weights.clip import TextEncoder
from core.weights.prompting import Reading, encode_prompts

sys.path.insert(0, str(ROOT / "inference"))
import test_t2i as script  # noqa: E402

TINY = str(ROOT / "models" / "tiny")
PROMPT = "a big pink windmill on the right, in a field of wheat"
QUICK = Settings(steps=1, steps_b=1)


# --- weights --------------------------------------------------------------------------------------


def spans(prompt: str, *names: str) -> list[tuple[str, float]]:
    """The text of a prompt in pieces of one weight."""
    read, found = weighted_text(prompt, names), []
    for letter, weight in zip(read.text, read.weights, strict=True):
        if found and found[-1][1] == weight:
            found[-1] = (found[-1][0] + letter, weight)
        else:
            found.append((letter, weight))
    return [(text, round(weight, 3)) for text, weight in found]


@pytest.mark.parametrize(
    ("prompt", "names", "found"),
    [
        ("a (red house:1.3) by [the sea]", (),
         [("a ", 1), ("red house", 1.3), (" by ", 1), ("the sea", 0.909)]),
        ("((a house: .5) hill:1.5)", (), [("a house", 0.75), (" hill", 1.5)]),
        ("(more) (less:-1)", (), [("more", 1.1), (" ", 1), ("less", -1)]),
        (r"\(a\) \[b\] c\d", (), [(r"(a) [b] c\d", 1)]),
        ("[Stripes] ([stripes] ball:1.4) [[stripes]]", ("[stripes]",),
         [("[Stripes] ", 1), ("[stripes] ball", 1.4), (" ", 1), ("[stripes]", 0.909)]),
        ("(at 10:30)", (), [("at 10:30", 1.1)]),
        (":) (: [a (b] c", (), [(":) (: ", 1), ("a (b", 0.909), (" c", 1)]),
        ("sun(ny:2)day", (), [("sun ", 1), ("ny", 2), (" day", 1)]),
        ("", (), []),
    ],
)  # fmt: skip
def test_brackets_are_weights_unless_literal(prompt: str, names: tuple, found: list) -> None:
    assert spans(prompt, *names) == found


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.load(TINY, torch.float32)


def encoded(encoder: TextEncoder, prompt: str, **reading: object):
    return encode_prompts(encoder, [prompt], "cpu", Reading(**reading))[prompt]


def test_a_weight_scales_tokens_around_the_empty_prompts(encoder: TextEncoder) -> None:
    plain, empty = encoded(encoder, PROMPT).tokens, encoded(encoder, "").tokens
    made = encoded(encoder, PROMPT.replace("pink windmill", "(pink windmill:1.5)"), weighted=True)
    same = encoded(encoder, PROMPT, weighted=True, long=True)
    assert torch.equal(same.tokens, plain)  # bit for bit, where there are none
    places = [3, 4]  # behind the start, a and big
    wanted = plain.clone()
    wanted[:, places] = empty[:, places] + 1.5 * (plain - empty)[:, places]
    torch.testing.assert_close(made.tokens, wanted)
    assert torch.equal(made.pooled, encoded(encoder, PROMPT).pooled)


def test_long_prompts_are_chunks_side_by_side(encoder: TextEncoder) -> None:
    length = encoder.model.config.max_position_embeddings
    words = ["house"] * (length - 2) + ["boat"] * 3
    made = encoded(encoder, " ".join(words), long=True)
    first, rest = (encoded(encoder, " ".join(part)) for part in (words[: length - 2], words[length - 2 :]))
    assert torch.equal(made.tokens, torch.cat([first.tokens, rest.tokens], dim=1))
    assert torch.equal(made.pooled, first.pooled)
    with pytest.warns(UserWarning, match="3 tokens too long"):
        assert encoded(encoder, " ".join(words), weighted=True).tokens.shape[1] == length
    late = encoded(encoder, " ".join([*words[:-1], "(boat:2)"]), long=True, weighted=True)
    changed = (late.tokens != made.tokens).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [length + 3]


@pytest.fixture(scope="module")
def pipeline(family_folder: Path) -> UltraPixelPipeline:
    return random_pipeline(family_folder)


def test_a_long_prompt_changes_no_other_picture(pipeline: UltraPixelPipeline) -> None:
    long, settings = " ".join(["house"] * 100), Settings(steps=1, steps_b=1, long_prompts=True)
    jobs = [Job("a fox", 64, 64, 0), Job(long, 64, 64, 0), Job("a fox", 64, 64, 0, long)]
    made = pipeline.run(jobs, settings)
    assert torch.equal(made[0].pixels, pipeline.run(jobs[:1], QUICK)[0].pixels)
    assert len({picture.pixels.sum().item() for picture in made}) == 3


def test_what_a_weight_would_be_is_told_where_it_is_none() -> None:
    jobs = [Job("(a house:1.3), [a:b:0.5]", 64, 64, 0)]
    assert "--weighted_prompts" in doubts(jobs, Settings())[0]
    (sentence,) = doubts(jobs, Settings(weighted_prompts=True))
    assert sentence.startswith("[a:b:0.5] is only weighted")


# --- files ----------------------------------------------------------------------------------------


def flags(*words: object):
    return parse_with_preset(picture_parser(""), ["--dry_run", *map(str, words)])


TABLE = "prompt|width|height|seed|number|cfg|negative_prompt\n'a; b, c'|128|192|5|2|1.5|fog\n\nc||||||\n"
OBJECT = {"prompt": "a; b, c", "width": 128, "height": 192, "seed": 5, "number": 2, "cfg": 1.5}
JSON = json.dumps({**OBJECT, "negative_prompt": "fog"}) + '\n\n"c"\n'


def table(delimiter: str) -> str:
    return TABLE.replace("|", delimiter).replace("'", '"')


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table(",")),
        ("a.csv", table(";")),
        ("a.tsv", table("\t")),
        ("a.jsonl", JSON),
        ("A.JSON", "\ufeff" + JSON),
    ],
)
def test_lines_of_a_file_have_settings_of_their_own(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    first, second, third = make_jobs(
        flags("--prompt_file", tmp_path / name, "--height", 256, "--seed", 9, "--negative_prompt", "rain")
    )
    assert (first.prompt, first.width, first.height, first.negative_prompt) == ("a; b, c", 128, 192, "fog")
    assert (first.seed, second.seed, third.seed) == (5, 6, 11)
    assert first.settings.cfg == 1.5 and first.settings.steps == 20 and third.settings is None
    assert (third.prompt, third.height, third.negative_prompt) == ("c", 256, "rain")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "prompt,hight\na,3\n", "line 1: there is no column 'hight' (did you mean height?)"),
        ("a.csv", "a house\n", "line 1: there is no column 'a house'"),
        ("a.csv", "seed\n3\n", "prompt must be one of them"),
        ("a.csv", "prompt,seed\na,3\nb,x\n", "line 3: seed must be a whole number, not 'x'"),
        ("a.csv", "prompt,seed\na,b,3\n", "a value with a comma needs quotes"),
        ("a.csv", "prompt,seed\n,3\n", "line 2: there is no prompt"),
        ("a.csv", "prompt,prompt\na,b\n", "line 1: prompt comes twice"),
        ("a.csv", "prompt,number\na,1000000000\n", "line 2: number must be at most 100000"),
        ("a.jsonl", "[" * 100_000, "line 1: this is no line of JSON"),
        ("a.csv", 'prompt\n"a\n', "this is no CSV"),
        ("a.csv", "prompt\n", "holds no prompt"),
        ("a.jsonl", '{"prompt": "a", "Negative": "b"}', "(did you mean negative_prompt?)"),
        ("a.jsonl", '{"prompt": "a", "seed": 1.5}', "line 1: seed must be a whole number, not 1.5"),
        ("a.jsonl", '{"prompt": "a", "number": 0}', "number must be at least 1"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2: this is no line of JSON"),
        ("a.jsonl", '["a"]', "line 1: write an object a line"),
        ("a.jsonl", '{"prompt": 3}', "line 1: prompt must be text"),
        ("a.jsonl", '{"prompt": "a", "cfg": -1}', "line 1: cfg must be a number from 0 up"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_told_with_its_place(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(told)):
        make_jobs(flags("--prompt_file", tmp_path / name))


def test_a_text_file_may_hold_what_looks_like_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"a"|b} house,\nold\n\nc, d\n')
    assert [line.prompt for line in read_lines(tmp_path / "a.txt")] == ['{"a"|b} house, old', "c, d"]


@pytest.fixture
def make(family_folder: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the script with the random family; pictures go to tmp_path / out."""

    def run(*words: object) -> int:
        named = {"config_c": "stage_c.yaml", "config_b": "stage_b.yaml",
                 "pretrained_path": "ultrapixel_t2i.safetensors"}  # fmt: skip
        family = [part for name, file in named.items() for part in (f"--{name}", family_folder / file)]
        size = "--height 64 --width 64 --steps 1 --steps_b 1".split()
        return script.main(list(map(str, [*family, *size, "--output_dir", tmp_path / "out", *words])))

    return run


def made(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out").glob("*"))


def test_pictures_of_a_file_are_made_skipped_and_repeated(
    make: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("prompt,height,cfg,seed\na fox,128,1,3\na fox,128,3,3\na boat,,,\n")
    assert make("--prompt_file", tmp_path / "a.csv") == 0
    names = ["a_boat_64x64_125.png", "a_fox_128x64_3.png", "a_fox_128x64_3_2.png"]
    assert [path.name for path in made(tmp_path)] == names
    assert sorted(read_image_metadata(path)["cfg"] for path in made(tmp_path)) == [1, 3, 4]
    capsys.readouterr()
    assert make("--prompt_file", tmp_path / "a.csv", "--skip_existing") == 0
    said = capsys.readouterr().err
    assert len(made(tmp_path)) == 3 and "3 of 3 pictures are there" in said and "seconds" not in said
    last = tmp_path / "out" / names[2]
    assert script.main(["--from_image", str(last), "--output_dir", str(last.parent)]) == 0
    again = tmp_path / "out" / "a_fox_128x64_3_3.png"
    assert Image.open(again).tobytes() == Image.open(last).tobytes()
    assert make("--prompt_file", tmp_path / "a.csv", "--dry_run") == 0
    plan = capsys.readouterr().out
    assert "pictures: 1 of 128 x 64 px on cpu, cfg 1.0" in plan and "of the largest, 128 x 64 px" in plan


def test_a_picture_from_before_a_setting_came_is_the_same_picture() -> None:
    record = Record(QUICK, {}, "stage_c", WeightHashes({}))
    wanted = json.loads(json.dumps(record.metadata(Job("a fox", 64, 64, 1, template="a {fox}"))))
    new = ("template", "negative_template", "weighted_prompts", "long_prompts")
    assert made_alike({name: value for name, value in wanted.items() if name not in new}, wanted)
    assert not made_alike({**wanted, "weighted_prompts": True}, wanted)


def test_bars_count_jobs_of_different_steps() -> None:
    class Bar:
        def __init__(self, total: int, **_: object) -> None:
            self.n, self.total, self._time = 0, total, float

        def update(self) -> None:
            self.n += 1

    bars, jobs = ProgressBars([None] * 3, Bar), (2, 3, 1)
    for steps in jobs:
        for step in range(1, steps + 1):
            bars(Progress("stage B", None, step, steps))
    (bar,) = bars._bars.values()
    assert (bar.n, bar.total) == (6, 6)


# --- wildcards ------------------------------------------------------------------------------------


@pytest.fixture
def wildcards(tmp_path: Path) -> Path:
    pytest.importorskip("dynamicprompts")
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "colour.txt").write_text("red\nblue\ngreen\n")
    (tmp_path / "cards" / "empty.txt").write_text("")
    (tmp_path / "cards" / "self.txt").write_text("__self__ again\n")
    return tmp_path / "cards"


def test_lines_of_json_end_where_json_lets_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b\u0085c"}\r\n"d"', "utf-8")
    jobs = make_jobs(flags("--prompt_file", tmp_path / "a.jsonl"))
    assert [job.prompt for job in jobs] == ["a\u2028b\u0085c", "d"]


def test_too_many_pictures_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="--num_image must be at most 100000, not 1000000000"):
        make_jobs(flags("--prompt", "a", "--num_image", 10**9))


def test_a_template_is_filled_by_the_seed_alone_and_remembered(
    make: Callable[..., int], wildcards: Path, tmp_path: Path
) -> None:
    template = "a __colour__ {fox|owl}"
    assert make("--prompt", template, "--num_image", 3, "--wildcards", wildcards) == 0
    stored = [read_image_metadata(path) for path in made(tmp_path)]
    results = {each["seed"]: each["prompt"] for each in stored}
    assert all(each["template"] == template for each in stored)
    assert all(re.fullmatch("a (red|blue|green) (fox|owl)", prompt) for prompt in results.values())
    alone = Wildcards(wildcards).fill(Job(template, 64, 64, 125, "{a|b}"))
    assert alone.prompt == results[125] and alone.negative_prompt in "ab"
    first = made(tmp_path)[0]
    assert make("--from_image", first) == 0
    again = next(path for path in made(tmp_path) if path.stem == f"{first.stem}_2")
    assert read_image_metadata(again) == read_image_metadata(first)
    assert make("--from_image", first, "--prompt", "a {fox}", "--seed", 1) == 0
    assert read_image_metadata(tmp_path / "out" / "a_fox_64x64_1.png")["template"] == ""


def test_a_call_takes_wildcards(pipeline: UltraPixelPipeline, wildcards: Path) -> None:
    (picture,) = pipeline("a {fox|owl}", 64, 64, steps=1, steps_b=1, wildcards=wildcards, progress=False)
    assert picture.job.template == "a {fox|owl}" and picture.job.prompt in ("a fox", "a owl")


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a __color__ fox", "the wildcard color has no values"),
        ("a {fox", "cannot be filled as a template"),
        ("${x}", "Variable x"),
        ("__self__", "leads back to it"),
        ("__empty__", "its file is empty"),
        ("__../other__", "lies outside of"),
    ],
)
def test_a_wrong_template_is_one_sentence(
    wildcards: Path, prompt: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        make_jobs(flags("--prompt", prompt, "--wildcards", wildcards))
    assert "Traceback" not in caplog.text


def test_without_the_package_or_the_folder_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        make_jobs(flags("--prompt", "a", "--wildcards", tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "dynamicprompts.wildcards", None)
    with pytest.raises(ValueError, match="pip install dynamicprompts"):
        make_jobs(flags("--prompt", "a", "--wildcards", tmp_path))
    assert make_jobs(flags("--prompt", "a {b|c}"))[0].prompt == "a {b|c}"


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (["sed=1,2"], "(did you mean seed?)"),
        (["seed"], "as in seed=A,B,C"),
        (["seed=1,,2"], "as in seed=A,B,C"),
        (["seed=1,1"], "1 comes twice"),
        (["seed=1", "seed=2"], "names seed twice"),
        (["seed=1", "cfg=2", "steps=3"], "one setting or two"),
    ],
)
def test_a_grid_of_no_two_settings_is_refused(grid: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        make_jobs(flags("--prompt", "a", "--grid", *grid))


def test_cells_have_every_pair_of_values() -> None:
    axes = axes_of(["sampler=ddpm,ddmp", "cfg_interval=0:1,0.1:0.9"])
    jobs = [Job("a", 64, 64, seed) for seed in (1, 2)]
    assert bases_of(jobs, axes) == jobs and len(bases_of(jobs, axes_of(["seed=4,5"]))) == 1
    cells = cells_of(jobs[0], axes, Settings())
    assert [(cell.row, cell.column, cell.job is None) for cell in cells] == [
        (0, 0, False), (0, 1, True), (1, 0, False), (1, 1, True)
    ]  # fmt: skip
    assert cells[2].job.settings.cfg_interval == (0.1, 0.9) and "ddmp" in cells[1].error


def test_a_grid_goes_on_after_errors_and_makes_a_sheet(
    make: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    decode, calls = core.pipeline.stages.decode_picture, []

    def broken(*args: object) -> torch.Tensor:
        calls.append(1)
        return decode(*args) * (torch.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(core.pipeline.stages, "decode_picture", broken)
    assert make("--prompt", "a fox", "--grid", "seed=1,2", "steps=1,2,0") == 1
    names = ["a_fox_64x64_1_grid.png", "a_fox_64x64_1.png", "a_fox_64x64_1_2.png", "a_fox_64x64_2.png"]
    assert [path.name for path in made(tmp_path)] == sorted(names)
    told = capsys.readouterr()
    assert "warning: steps must be at least 1, not 0" in told.err and "NaN" in told.err
    assert "grid: " in told.out
    stored = read_image_metadata(tmp_path / "out" / names[0])
    assert stored["grid"] == ["seed=1,2", "steps=1,2,0"] and stored["prompt"] == "a fox"
    assert {read_image_metadata(path)["steps"] for path in made(tmp_path) if "grid" not in path.name} == {
        1,
        2,
    }
    with pytest.raises(ValueError, match="steps must be at least 1"):
        make("--prompt", "a fox", "--grid", "steps=0,-1")


def test_a_sheet_has_room_for_pictures_of_all_sizes_and_for_words() -> None:
    large, small = Image.new("RGB", (4 * SIDE, 2 * SIDE), "red"), Image.new("RGB", (8, 16), "blue")
    sheet = grid_sheet([[large, "it broke " * 20], [small, large]], ["a", "b"], ["c 1", ""], "title " * 99)
    colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert {(255, 0, 0), (0, 0, 255), (221, 221, 221), (255, 255, 255)} <= colours
    assert sheet.width > 2 * SIDE and sheet.height < 3 * SIDE


# --- the loop -------------------------------------------------------------------------------------


def test_prompts_are_read_line_by_line_and_a_bad_one_costs_a_sentence(
    make: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    lines = ["a fox", "", json.dumps({"prompt": "an owl", "height": 128}), '{"prompt"', "{a|b} boat",
             '{"prompt": "x", "hight": 1}', '{"prompt": "x", "height": 7}']  # fmt: skip
    content = "\n".join(lines).encode() + b"\n\xff\nlast"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    loads, load = [], TextEncoder.load
    monkeypatch.setattr(TextEncoder, "load", lambda *args: loads.append(1) or load(*args))
    assert make("--loop") == 0
    assert {path.name for path in made(tmp_path)} == {
        "a_fox_64x64_123.png", "an_owl_128x64_124.png", "a_b_boat_64x64_125.png", "last_64x64_127.png"
    }  # fmt: skip
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [re.search(r"line \d|height", line)[0] for line in told] == [
        "line 4",
        "line 6",
        "height",
        "line 8",
    ]
    assert len(loads) == 1  # models stay loaded


def test_a_loop_is_for_one_process_and_no_other_prompts(monkeypatch: pytest.MonkeyPatch, make) -> None:
    with pytest.raises(SystemExit):
        make("--loop", "--prompt", "a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="--loop is for one process"):
        make("--loop")
