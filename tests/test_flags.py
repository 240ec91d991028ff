"""The command lines of all scripts: answered without torch, explained flag by flag, checked at once."""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import random_family
import torch
from conftest import ROOT
from PIL import Image

from core.commands.flags import (
    home_path,
    make_jobs,
    parse_with_preset,
    picture_parser,
    run,
    settings_of,
    usage_table,
)  # fmt: skip
from core.commands.prompts import read_lines
from core.config.presets import PRESETS
from core.config.schema import PersonalizedTrainConfig
from core.config.settings import FP8_NAMES, Job, Settings
from core.config.sizes import Upsampling
from core.pictures.images import read_image_metadata, save_image
from core.pipeline.prompts import doubts, taken_as_words, unknown
from core.pipeline.stages import StageUse
from core.weights.lora.layouts import LAYOUTS
from gdf.loss_weights import WEIGHTS
from gdf.names import LOSS_WEIGHT_NAMES, SAMPLER_NAMES
from gdf.samplers import SAMPLERS
from modules.fp8 import Fp8
from modules.guidance import UPSAMPLINGS

SCRIPTS = sorted([*(ROOT / "inference").glob("*.py"), *(ROOT / "train").glob("*.py")])
HEAVY = ("torch", "torchvision", "transformers", "accelerate", "matplotlib", "skia", "numpy", "cv2")
ANSWERS = """
import runpy, sys
path = sys.argv[1]
for flags in (["--help"], ["x", "--no_such_flag"]):
    sys.argv = [path, *flags]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print("code", end.code)
print("loaded", [name for name in {heavy} if name in sys.modules])
"""


def script_named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- --help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=script_named)
def test_help_and_a_wrong_flag_are_answered_without_torch(path: Path) -> None:
    command = [sys.executable, "-c", ANSWERS.replace("{heavy}", str(HEAVY)), path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert re.findall(r"^code (.*)$", done.stdout, re.M) == ["0", "2"]
    assert done.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize("path", SCRIPTS, ids=script_named)
def test_every_flag_has_a_text_a_group_and_its_default(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(parser)
        raise SystemExit

    for name in ("parse_known_args", "parse_known_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, keep)
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    (parser,) = parsers
    own, formatter = {"cfg"} if "controlnet" in path.name else set(), parser._get_formatter()
    (plain,) = [group for group in parser._action_groups if group.title == "options"]
    assert [action.dest for action in plain._group_actions] == ["help"]
    for action in parser._actions:
        text = formatter._expand_help(action) if action.help else ""
        assert len(text) > 4, action.dest
        if not action.option_strings or action.required or action.dest == "help":
            continue
        assert re.search(r"\(default: .+\)$", text), text
        assert not re.search(r"None|\(\)|False", text), text
        if path.parent.name == "inference" and action.dest in {*asdict(PRESETS["tiny"])} - own:
            assert "preset" in text, text
        if action.dest == "cfg" and own:
            assert text.endswith("(default: 1.0)")


def test_the_names_that_flags_and_keys_know_are_those_of_the_tables() -> None:
    assert SAMPLER_NAMES == tuple(SAMPLERS)
    assert LOSS_WEIGHT_NAMES == tuple(WEIGHTS)
    assert FP8_NAMES == get_args(Fp8)
    assert get_args(Upsampling) == tuple(UPSAMPLINGS)
    assert get_args(get_type_hints(PersonalizedTrainConfig)["lora_layout"]) == LAYOUTS


# --- what is refused ------------------------------------------------------------------------------


def parse(*arguments: object) -> argparse.Namespace:
    return parse_with_preset(picture_parser(""), list(map(str, arguments)))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence with which flags are refused."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: settings_of(parse(*arguments)) and None)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_prompt_and_a_file_of_prompts_are_not_given_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a boat\n")
    assert "--prompt" in refused(capsys, "--prompt", "a", "--prompt_file", tmp_path / "prompts.txt")
    save_image(Image.new("RGB", (64, 64)), tmp_path / "a.png", "png", {"prompt": "a", "seed": 4})
    again = parse("--from_image", tmp_path / "a.png", "--prompt_file", tmp_path / "prompts.txt")
    assert [job.prompt for job in make_jobs(again)] == ["a boat"]  # a stored prompt is only a default


@pytest.mark.parametrize("flag", ["cfg", "cfg_end", "cfg_b"])
@pytest.mark.parametrize("value", ["-1", "-0.01", "nan", "inf"])
def test_a_guidance_weight_below_0_is_refused(
    capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    assert f"error: {flag} must be a number from 0 up" in refused(capsys, f"--{flag}", value)
    assert getattr(settings_of(parse(f"--{flag}", "0")), flag) == 0


# --- what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cfg": 1}, "as cfg is 1"),
        ({"cfg": 1, "cfg_end": 1}, "as cfg is 1"),
        ({"cfg": 4, "cfg_interval": (0, 0)}, "cfg_interval 0 to 0"),
        ({"cfg": 1, "cfg_end": 4, "cfg_interval": (1, 1)}, "cfg_interval 1 to 1"),
        ({"cfg": 1, "cfg_end": 4}, None),
        ({"cfg": 4, "cfg_end": 1, "steps": 1}, None),
        ({"cfg": 0}, None),
        ({}, None),
    ],
)
def test_a_negative_prompt_without_effect_is_told(settings: dict, told: str | None) -> None:
    jobs = [Job("a", 64, 64, 0), Job("a", 64, 64, 1, "fog")]
    sentences = doubts(jobs, Settings(**settings))
    assert len(sentences) == (told is not None)
    assert told is None or (told in sentences[0] and "negative prompt" in sentences[0])
    assert doubts(jobs[:1], Settings(**settings)) == []
    (sentence, *others) = doubts(jobs[:1], Settings(**settings, guidance_unconditional=0.0)) or [None]
    assert not others and (sentence is None) == (told is None)
    assert told is None or (told in sentence and sentence.startswith("guidance_unconditional has no effect"))


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("(a house:1.3) by the sea", ["(a house:1.3)"]),
        ("((big, red) house:.9), ( sea : -2 )", ["((big, red) house:.9)"]),
        ("a <lora:cat_v2:0.8> cat, <LyCO:x:1>", ["<lora:cat_v2:0.8>"]),
        ("a house BREAK the sea BREAK night", ["BREAK"]),
        ("(x:1) <lora:a> BREAK", ["(x:1)", "<lora:a>", "BREAK"]),
        ("a clock (at 10:30), breakfast, a [stripes] balloon (large): 3 < 4 > 2", []),
    ],
)
def test_what_other_programs_act_on_is_told_once(prompt: str, found: list[str]) -> None:
    sentences = taken_as_words([prompt, f"{prompt} again"])
    assert [sentence.partition(" is taken as words")[0] for sentence in sentences] == found


def test_words_that_the_family_does_not_know_are_told_once() -> None:
    texts = ["A Cyberpunk samurai, a red house, 4k", "cyberpunk [Stripes] balloon", ""]
    tiny = str(ROOT / "models" / "tiny")
    assert unknown(texts, ["[stripes]"], tiny) == ["unknown to this family: cyberpunk, samurai, 4k"]
    assert unknown(["a red house, on green hills."], [], tiny) == []
    many = unknown([" ".join(f"w{i}" for i in range(15))], [], tiny)[0]
    assert many.endswith("w11 and 3 more")
    assert unknown(texts, [], "no/such/folder") == []  # another error tells that


def test_a_drawn_seed_is_printed_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [parse("--seed", "-1", "--preset", "tiny", "--prompt", "a", "--num_image", 2) for _ in range(2)]
    printed = [int(seed) for seed in re.findall(r"seed (\d+) was drawn", capsys.readouterr().err)]
    assert [found.seed for found in drawn] == printed and printed[0] != printed[1]
    assert [job.seed for job in make_jobs(drawn[0])] == [printed[0], printed[0] + 1]


# --- where paths lead -----------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is not the project's, and a home folder beside it."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(ROOT / "inference"))
    return tmp_path / "work"


def test_a_tilde_in_any_path_flag_is_the_home_folder(elsewhere: Path) -> None:
    home = str(elsewhere.parent / "home")
    flags = ("config_c", "config_b", "pretrained_path", "output_dir", "prompt_file")
    found = vars(parse(*(f"--{name}=~/{name}" for name in flags)))
    assert [found[name] for name in flags] == [f"{home}/{name}" for name in flags]
    import test_controlnet
    import test_personalized

    flags = ("control_source", "mask", "control_image", "control_file")
    controlled = vars(test_controlnet.parse([f"--{name}=~/{name}" for name in flags]))
    assert [controlled[name] for name in ("canny_source_url", *flags[1:])] == [f"{home}/{n}" for n in flags]
    assert test_controlnet.parse(["--canny_source_url=~/a.png"]).canny_source_url == f"{home}/a.png"
    assert test_personalized.parse(["--lora=~/a.safetensors:0.8"]).lora == [f"{home}/a.safetensors:0.8"]
    assert random_family.parse(["~/family"]).folder == f"{home}/family"
    with pytest.raises(argparse.ArgumentTypeError, match="no user's home folder is ~no_such_user_"):
        home_path("~no_such_user_/pictures")
    (elsewhere / "~old.yaml").touch()
    assert home_path("~old.yaml") == "~old.yaml"


def test_a_preset_works_from_any_folder(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import test_controlnet
    import test_personalized
    import test_t2i

    small = [*"--preset tiny --prompt a --height 64 --width 64 --steps 1 --steps_b 1".split()]
    picture = ["--control_source", str(ROOT / "figures/example_control/lighthouse.png")]
    for script, flags in ((test_t2i, []), (test_personalized, []), (test_controlnet, picture)):
        folder = elsewhere / script.__name__
        assert script.main([*small, *flags, "--dry_run"]) == 0
        assert "not there" not in capsys.readouterr().out
        assert script.main([*small, *flags, "--output_dir", folder.name]) == 0
        (made,) = (path for path in folder.iterdir() if not path.stem.endswith("_control"))
        stored = read_image_metadata(made)
        assert stored["config_c"] == PRESETS["tiny"].config_c  # so that it can be repeated from any folder


def test_a_file_of_prompts_that_is_not_there_is_named_with_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: read_lines(tmp_path / "nope.txt") and None)
    assert ended.value.code == 2
    assert f"--prompt_file {tmp_path / 'nope.txt'} cannot be read" in capsys.readouterr().err


def test_a_package_that_is_missing_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(lambda: __import__("no_such_package") and None)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: the package no_such_package is missing: pip install -r requirements.txt\n"
    )
    with pytest.raises(ImportError, match="no_such_module"):  # an error of the project itself
        run(lambda: __import__("core.no_such_module") and None)


@pytest.mark.parametrize(
    ("wrong", "near"), [("--promt", "--prompt"), ("--seeds", "--seed"), ("--zzzz", None)]
)
def test_an_unknown_flag_names_the_nearest(
    capsys: pytest.CaptureFixture[str], wrong: str, near: str | None
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(wrong, "x")
    told = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"unrecognized arguments: {wrong}" in told
    assert (f"(did you mean {near}" in told) if near else ("did you mean" not in told)


def test_the_closing_table_tells_the_hosts_memory_where_it_is_another() -> None:
    on_cpu = usage_table([StageUse("stage C", 1.0, 2**30, 2**30)])
    assert "host" not in on_cpu and "1.00 GiB" in on_cpu
    on_gpu = usage_table([StageUse("stage C", 1.0, 2**31, 2**30)]).splitlines()
    assert on_gpu[0].split()[-2:] == ["host", "memory"]
    assert on_gpu[1].split()[-4:] == ["2.00", "GiB", "1.00", "GiB"]


def test_a_prompt_that_is_no_text_is_told() -> None:
    for flags in (("--prompt", "a \udcff boat"), ("--prompt", "a", "--negative_prompt", "\udcff")):
        with pytest.raises(ValueError, match="prompt holds bytes that are not UTF-8"):
            make_jobs(parse(*flags, "--dry_run"))


def test_a_full_memory_of_the_cpu_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        torch.empty(2**55)

    with pytest.raises(SystemExit) as end:
        run(main)
    (told,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and told.startswith("error: the device's memory is full (")
    assert "make a smaller picture; for a training" in told and "--device cpu" not in told
