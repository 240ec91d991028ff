"""inference/test_personalized.py as its users run it, and benchmarks/tiny_personalized.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_loras import make_lora, new_token

from core.commands.flags import run
from core.config.sizes import STAGE_C_VERSIONS
from core.config.yaml import load_stage_c
from core.pictures.images import read_image_metadata
from core.weights.lora.files import LoraFile, LoraTokens, write_lora
from modules.lora import LoraUpdate


@dataclass(frozen=True)
class Done:
    """How a script ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


def load(path: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(
    family_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a script of inference/ on the random family; keywords add or replace flags, None removes one."""

    def start(*flags: object, name: str = "test_personalized", **named: object) -> Done:
        values = {
            "config_c": family_folder / "stage_c.yaml", "config_b": family_folder / "stage_b.yaml",
            "pretrained_path": family_folder / "ultrapixel_t2i.safetensors", "prompt": "a [x] fox",
            "height": 96, "width": 96, "steps": 1, "steps_b": 1, "output_dir": tmp_path / "out", **named,
        }  # fmt: skip
        parts = [part for key, value in values.items() if value is not None for part in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, [*parts, *flags])])
        with pytest.raises(SystemExit) as ended:
            run(load(f"inference/{name}.py").main)
        return Done(ended.value.code, *capsys.readouterr())

    return start


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    write_lora(tmp_path / "lora.safetensors", make_lora(1, new_token()), "own")
    return tmp_path / "lora.safetensors"


def picture(done: Done) -> Path:
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return Path(line.partition(": ")[2])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_zeros_change_nothing_and_others_do(script: Run, lora: Path, tmp_path: Path) -> None:
    plain = picture(script(name="test_t2i", prompt="a fox"))
    zeros = LoraFile(
        {name: replace(u, up=torch.zeros_like(u.up)) for name, u in make_lora(1).updates.items()},
        make_lora(1).sizes,
    )
    write_lora(tmp_path / "zeros.safetensors", zeros, "own")
    same = picture(script(prompt="a fox", pretrained_path_lora=tmp_path / "zeros.safetensors"))
    assert np.array_equal(pixels(plain), pixels(same))
    done = script(prompt="a fox", pretrained_path_lora=lora)
    assert not np.array_equal(pixels(plain), pixels(picture(done)))
    warning = next(line for line in done.stderr.splitlines() if line.startswith("warning:"))
    assert all(part in warning for part in ("[x]", "'a fox'", str(lora)))


def test_a_picture_is_repeated_with_its_loras(script: Run, lora: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.safetensors"
    write_lora(second, make_lora(2), "published")
    done = script("--lora", f"{second}:-0.5", pretrained_path_lora=f"{lora}:0.8", seed=4)
    first = picture(done)
    assert "warning" not in done.stderr
    stored = read_image_metadata(first)
    assert stored["lora"] == [f"{lora}:0.8", f"{second}:-0.5"]
    assert {str(lora), str(second)} <= stored["weights"].keys()
    none = dict.fromkeys(
        ("config_c", "config_b", "pretrained_path", "prompt", "height", "width", "steps", "steps_b")
    )
    again = picture(script(from_image=first, **none))
    assert np.array_equal(pixels(first), pixels(again))
    other = picture(script("--lora", lora, from_image=first, **none))
    assert read_image_metadata(other)["lora"] == [str(lora)]  # flags win
    assert not np.array_equal(pixels(first), pixels(other))
    by_the_other = picture(script(name="test_t2i", from_image=first, **none))
    assert np.array_equal(pixels(first), pixels(by_the_other))
    refused = script(name="test_controlnet", from_image=first, canny_source_url=first, **none)
    assert refused.returncode == 2
    assert "was made with --lora" in refused.stderr


def test_a_dry_run_lists_the_lora(script: Run, lora: Path, tmp_path: Path) -> None:
    done = script("--dry_run", lora=f"{lora}:0.8")
    assert done.returncode == 0, done.stderr
    assert f"LoRA 1 (x 0.8): {lora}" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_published_lora_needs_no_other_flag() -> None:
    parse = load("inference/test_personalized.py").parse
    for preset in ([], ["--preset", "small-big"], ["--preset", "big-big"]):
        found = parse([*preset, "--pretrained_path_lora", "lora_cat.safetensors"])
        assert load_stage_c(ROOT / found.config_c).train_tokens == (("[roubaobao]", "^cat</w>"),)
        assert found.lora == ["lora_cat.safetensors"]
    tiny = parse(["--preset", "tiny"])
    assert (tiny.config_c, len(tiny.lora)) == ("configs/tiny/stage_c.yaml", 1)
    assert parse(["--preset", "tiny", "--lora", "a", "--lora", "b:2"]).lora == ["a", "b:2"]


def test_a_process_of_its_own_ends_with_code_2() -> None:
    command = [sys.executable, "inference/test_personalized.py", "--preset", "tiny", "--prompt", "x"]
    done = subprocess.run(
        [*command, "--lora", "no.safetensors"], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no.safetensors")


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ({}, ["no LoRA was given", "--pretrained_path_lora", "--lora"]),
        ({"lora": "nowhere.safetensors"}, ["nowhere.safetensors", "does not exist"]),
        ({"lora": "lora.safetensors:much"}, ["'much'", "FILE:0.8"]),
        ({"lora": "WIDER"}, ["wider.safetensors", "Stage C tiny"]),
        ({"lora": "NAMELESS"}, ["names", "'train_tokens'"]),
        ({"lora": "x", "prompt": None}, ["no prompt was given", "--prompt"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    script: Run, tmp_path: Path, named: dict, parts: list[str]
) -> None:
    paths = {"WIDER": tmp_path / "wider.safetensors", "NAMELESS": tmp_path / "nameless.safetensors"}
    write_lora(paths["WIDER"], make_lora(1, sizes=STAGE_C_VERSIONS["tiny"]), "own")
    write_lora(paths["NAMELESS"], make_lora(1, new_token(None)), "published")
    done = script(**{key: paths.get(value, value) for key, value in named.items()})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert all(part in last for part in parts)


# --- benchmarks/tiny_personalized.py --------------------------------------------------------------


def test_the_benchmark_measures_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = load("benchmarks/tiny_personalized.py")
    sizes = STAGE_C_VERSIONS["tiny"]
    tokens = LoraTokens(torch.zeros(1, sizes.c_clip_text), (777,), ("[stripes]",), ("^red</w>",))
    weight = next(iter(make_lora(1, sizes=sizes).updates))
    c = sizes.c_hidden[0]
    still = LoraFile({weight: LoraUpdate(torch.zeros(1, c), torch.ones(c, 1))}, sizes, tokens=tokens)
    write_lora(tmp_path / "lora.safetensors", still, "own")
    flags = ["--lora", tmp_path / "lora.safetensors", "--num_image", 2, "--height", 128, "--width", 128,
             "--output_dir", tmp_path / "out", "--steps", 2, "--steps_b", 2]  # fmt: skip
    bench.main([str(flag) for flag in flags])
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    for name in ("with the token", "without the token", "ordinary prompts", "without the LoRA"):
        assert float(rows[name][-1]) <= 1
    assert rows["ordinary prompts"][-1] == rows["without the LoRA"][-1]  # this one changes nothing
    sheet = Image.open(tmp_path / "out" / "personalized_128x128.png")
    assert read_image_metadata(tmp_path / "out" / "personalized_128x128.png")["prompts"][0].count("[stripes]")
    assert sheet.width > 4 * 128
    (case,) = bench.cases_of_subject(1, 5, "[stripes] balloon")
    assert "[stripes] balloon" in case.prompt
    assert not any(word in case.prompt.replace("[stripes]", "") for word in ("striped", case.scene.colour))
