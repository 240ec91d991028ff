"""Runs whose folder a full disk or a broken copy damaged, and an environment that speaks to accelerate."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import toy_training
from conftest import ROOT
from toy_training import read_weights
from training_lesson import exit_code, figures, losses, train

sys.path.insert(0, str(ROOT / "train"))
import train_t2i  # noqa: E402

from core.training.trainer import checkpoints  # noqa: E402

SETTINGS = ("save_every=1", "keep=9")

Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "empty": lambda _: b"",
    "cut": lambda whole: whole[: len(whole) * 2 // 3],
    "cut at its last bytes": lambda whole: whole[:-30],
    "zeros in its middle": lambda whole: whole[: len(whole) // 2] + bytes(64) + whole[len(whole) // 2 + 64 :],
    "zeros": lambda whole: bytes(len(whole)),
    "garbage": lambda whole: random.Random(0).randbytes(len(whole)),
    "text": lambda _: b"<!doctype html><p>Not found",
}


def damage(path: Path, how: str) -> None:
    path.write_bytes(DAMAGES[how](path.read_bytes()))


def damaged_toy(folder: Path, how: str, count: int = 1) -> None:
    """A toy run of 6 updates, whose last checkpoints are damaged."""
    toy_training.train(folder, updates=6, save_every=2, keep=9)
    for path in checkpoints(folder)[-count:]:
        damage(path, how)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    toy_training.train(tmp_path / "whole", updates=8)
    damaged_toy(tmp_path / "run", how)
    with caplog.at_level(logging.INFO):
        toy_training.train(tmp_path / "run", updates=8)
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "step_00000006.pt is damaged (it is" in warning and "\n" not in warning
    assert f"resumed from {tmp_path / 'run' / 'step_00000004.pt'}" in caplog.messages
    whole, resumed = read_weights(tmp_path / "whole"), read_weights(tmp_path / "run")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_damaged_checkpoints_cost_no_good_one_its_place(tmp_path: Path) -> None:
    damaged_toy(tmp_path, "cut", count=2)
    toy_training.train(tmp_path, updates=3, save_every=100, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003.pt"]
    assert len(list(tmp_path.glob("*.damaged"))) == 2


def test_another_archive_is_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_training.train(tmp_path, updates=6)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "step_00000007.pt")
    torch.save({}, tmp_path / "step_copy.pt")
    toy_training.train(tmp_path, updates=8)
    assert "step_00000007.pt is damaged (it holds no state of a training)" in caplog.text


@pytest.mark.parametrize("how", DAMAGES)
def test_where_all_are_damaged_a_sentence_says_what_to_do_and_all_stay(tmp_path: Path, how: str) -> None:
    damaged_toy(tmp_path, how, count=3)
    with pytest.raises(ValueError, match=r"step_00000006.pt is damaged .*remove all.*or choose another exp"):
        toy_training.train(tmp_path, updates=8)
    assert len(checkpoints(tmp_path)) == 3 and len(losses(tmp_path)) == 6


# --- log and temporary files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail", [b'{"loss": 0.1, "st', b"\0" * 50, b"\xff\xfe\x9c", b'{"step": "six"}', b"[]\n"]
)
def test_a_damaged_log_loses_its_damaged_lines_alone(tmp_path: Path, tail: bytes) -> None:
    toy_training.train(tmp_path / "whole", updates=8)
    toy_training.train(tmp_path / "run", updates=4)
    with (tmp_path / "run" / "log.jsonl").open("ab") as stream:
        stream.write(tail)
    toy_training.train(tmp_path / "run", updates=8)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_log_cut_within_what_is_done_goes_on(tmp_path: Path) -> None:
    toy_training.train(tmp_path, updates=4)
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    toy_training.train(tmp_path, updates=8)
    assert [line["step"] for line in figures(tmp_path)] == [1, 2, 3, 5, 6, 7, 8]


def test_half_written_files_are_removed(tmp_path: Path) -> None:
    toy_training.train(tmp_path, updates=2)
    for name in (".step_00000003.pt.17.part", ".config.yaml.4.part", ".log.jsonl.12.part"):
        (tmp_path / name).write_bytes(b"half")
    toy_training.train(tmp_path, updates=3)
    assert not list(tmp_path.glob(".*"))


# --- the configuration, and the whole script ------------------------------------------------------


@pytest.fixture(scope="module")
def base(lesson: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two updates, to be copied."""
    folder = tmp_path_factory.mktemp("base")
    train(train_t2i.main, lesson / "t2i.yaml", folder, *SETTINGS, "updates=2")
    return folder


def cut_at(share: float) -> Damage:
    return lambda whole: whole[: int(len(whole) * share)]


CONFIG_DAMAGES = {**DAMAGES, "cut in the middle": cut_at(0.4), "cut near its end": cut_at(0.95)}


@pytest.mark.parametrize("how", ["empty", "garbage", "cut in the middle", "cut near its end", "removed"])
def test_the_run_goes_on_without_its_configuration(
    lesson: Path, base: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(base, tmp_path, dirs_exist_ok=True) / "checkpoints" / "run"
    path = folder / "config.yaml"
    whole = path.read_bytes()
    path.unlink() if how == "removed" else path.write_bytes(CONFIG_DAMAGES[how](whole))
    train(train_t2i.main, lesson / "t2i.yaml", tmp_path, *SETTINGS, "updates=3")
    assert path.read_bytes().startswith(whole[:20]) and len(path.read_bytes()) > 0.9 * len(whole)
    assert [line["step"] for line in figures(folder)] == [1, 2, 3]
    assert ("config.yaml is damaged" in caplog.text) == (how != "removed")


def test_the_configuration_is_written_whole_or_not_at_all(lesson: Path, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path, dirs_exist_ok=True) / "checkpoints" / "run"
    before, write = (folder / "config.yaml").read_bytes(), Path.write_text

    def full_disk(path: Path, text: str, *options: str) -> int:
        if "config.yaml" not in path.name:
            return write(path, text, *options)
        write(path, text[:100])
        raise OSError(28, "No space left on device", str(path))

    with mock.patch.object(Path, "write_text", full_disk):
        assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, *SETTINGS, "updates=3") == 2
    assert (folder / "config.yaml").read_bytes() == before


def test_the_script_names_a_damaged_checkpoint(
    lesson: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(base, tmp_path, dirs_exist_ok=True) / "checkpoints" / "run"
    for path in checkpoints(folder):
        damage(path, "cut")
    assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, *SETTINGS, "updates=3") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {checkpoints(folder)[-1]} is")


VARIABLES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8", "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "ACCELERATE_DEBUG_MODE": "maybe",
    "ACCELERATE_TORCH_DEVICE": "meta",
}  # fmt: skip


def test_what_the_environment_says_to_accelerate_changes_nothing(
    lesson: Path, base: Path, tmp_path: Path
) -> None:
    with mock.patch.dict(os.environ, VARIABLES):
        folder = train(train_t2i.main, lesson / "t2i.yaml", tmp_path, *SETTINGS, "updates=2")
    for name in ("loss", "grad_norm"):
        expected = [line[name] for line in figures(base / "checkpoints" / "run")]
        assert [line[name] for line in figures(folder)] == expected


# --- two trainings in one folder ------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
from core.training.run import hold
held = hold(Path(sys.argv[1]))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_a_second_training_in_a_folder_is_refused_until_the_first_one_ends(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(train_t2i.main, lesson / "t2i.yaml", tmp_path, "updates=1", *SETTINGS)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    words = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        worker = int(first.stdout.readline())
        try:
            assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, "updates=2", *SETTINGS) == 2
            assert f"another training runs in {folder}: wait until it ends" in capsys.readouterr().err
            assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
            first.kill()  # while its data worker still lives
            first.wait()
            assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, "updates=2", *SETTINGS) == 0
        finally:
            first.kill()
            os.kill(worker, signal.SIGKILL)
