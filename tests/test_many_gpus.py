"""Pictures of several processes, as torchrun starts them: the same files, and none ends the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT
from PIL import Image
from training_lesson import start_torchrun, torchrun

from core import devices
from core.commands.pictures import Gallery
from core.commands.sharing import agreed, share
from core.config.settings import Job, Settings
from core.devices import own_device
from core.pictures import images
from core.pictures.files import FORMATS
from core.pipeline.made import Picture, Record, WeightHashes

sys.path.insert(0, str(ROOT / "inference"))
import test_t2i as script  # noqa: E402

T2I = str(ROOT / "inference" / "test_t2i.py")
SMALL = "--preset tiny --height 128 --width 128 --steps 2 --steps_b 2 --seed 5".split()
PROMPTS = "a red house\n\na boat on the sea\n\na tree by a lake\n"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


def alone(*words: object) -> None:
    """One process, in this one."""
    with mock.patch.object(sys, "argv", ["test_t2i.py"]):
        assert script.main([*SMALL, *map(str, words)]) == 0


def contents(folder: Path) -> dict[str, tuple[bytes, dict]]:
    """Pixels and settings of all pictures by name; hidden files too."""
    found = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            found[path.name] = (np.asarray(image).tobytes(), dict(image.info))
    return found


def test_two_processes_make_the_files_of_one_and_again_what_is_missing(prompts: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    threads = torch.get_num_threads()
    torch.set_num_threads(devices.cores())  # as for a user; the tests' own processes have one each
    alone("--prompt_file", prompts, "--output_dir", one)
    torch.set_num_threads(threads)
    words = (T2I, *SMALL, "--prompt_file", str(prompts), "--output_dir", str(two))
    done = torchrun(*words, "--preview")
    assert done.returncode == 0, done.stderr
    assert sum(done.stdout.count(f"seed {seed}: ") for seed in (5, 6, 7)) == 3
    assert done.stderr.count("peak memory") == 1
    previews = [path for path in two.iterdir() if "preview" in path.name]
    assert len(previews) == 6
    for path in previews:
        path.unlink()
    made = contents(two)
    assert made == contents(one)
    lost = sorted(two.iterdir())[0]
    lost.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in two.iterdir()}
    done = torchrun(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"2 of 3 pictures are there already: {two}\n") == 1
    assert contents(two) == made
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_killed_process_costs_its_own_pictures_alone(prompts: Path, tmp_path: Path) -> None:
    flags = ["--prompt_file", str(prompts), "--num_image", "2", "--output_dir", str(tmp_path)]
    with start_torchrun(T2I, *SMALL, *flags) as launcher:
        deadline = time.monotonic() + 200
        while not any(tmp_path.glob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = psutil.Process(launcher.pid).children()
        victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
        victim.kill()
        _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode != 0
    made = {int(path.stem.rpartition("_")[2]) for path in tmp_path.glob("*.png")}
    assert {5, 7, 9} <= made != {5, 6, 7, 8, 9, 10}, errors
    alone(*flags, "--skip_existing")
    assert len(contents(tmp_path)) == 6
    assert not any("_2.png" in path.name for path in tmp_path.iterdir())


def test_a_plan_and_a_drawn_seed_are_those_of_all_and_told_once(prompts: Path) -> None:
    done = torchrun(T2I, *SMALL, "--seed=-1", "--prompt_file", str(prompts), "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures: 3 of 128 x 128 px") == 1
    assert done.stderr.count("was drawn") == 1


def test_an_error_of_all_is_told_once(tmp_path: Path) -> None:
    done = torchrun(T2I, *SMALL, "--promt", "a house")
    assert done.returncode != 0 and done.stderr.count("error: ") == 1
    assert "did you mean --prompt?" in done.stderr and "Traceback" not in done.stderr


# --- an error of one alone ------------------------------------------------------------------------

WORKER = """
import sys, time
from pathlib import Path
from core import launch
from core.commands.flags import run, told
from core.commands.sharing import agreed, on_its_own, share

def main():
    number = agreed("number", lambda: launch.rank() + 40)
    with on_its_own(told):
        for item in share(list(range(4))):
            time.sleep(0.5)
            if launch.rank() == int(sys.argv[2]):
                raise {"mistake": ValueError("broken"), "crash": KeyError("lost")}[sys.argv[3]]
            Path(sys.argv[1], f"{item}_{number}").touch()

run(main)
"""
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda *words: torchrun(str(tmp_path / "worker.py"), str(tmp_path / "out"), *words)


@pytest.mark.parametrize(("rank", "kind"), [("0", "mistake"), ("1", "crash")])
def test_an_error_of_one_ends_no_other(launched: Launch, tmp_path: Path, rank: str, kind: str) -> None:
    done = launched(rank, kind)
    other = 1 - int(rank)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{other}_40", f"{other + 2}_40"}
    sentence = {"mistake": "error: broken", "crash": "KeyError: 'lost'"}[kind]
    assert f"{sentence} (process {int(rank) + 1} of 2)\n" in done.stderr
    assert done.stderr.count("Traceback") == (kind == "crash")
    assert done.returncode != 0 and "exitcode" not in done.stderr


# --- which pictures are there ---------------------------------------------------------------------

JOB = Job("a fox, 狐", 64, 64, 3)


def gallery(folder: Path, format: str = "png", **settings: object) -> Gallery:
    return Gallery(str(folder), format, Record(Settings(**settings), {"dtype": None}, "c", WeightHashes({})))


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_is_there_if_its_settings_are(tmp_path: Path, format: str) -> None:
    if format == "jxl":
        pytest.importorskip("pillow_jxl")
    assert not gallery(tmp_path, format).has(JOB)
    gallery(tmp_path, format, steps=3).add(Picture(JOB, torch.zeros(3, 64, 64)))
    assert not gallery(tmp_path, format).has(JOB)
    path = gallery(tmp_path, format).add(Picture(JOB, torch.zeros(3, 64, 64)))
    assert path.stem.endswith("_2") and gallery(tmp_path, format).has(JOB)
    assert gallery(tmp_path, format, steps=3).has(JOB)


@pytest.mark.parametrize("left", [b"", b"no picture"])
def test_what_is_no_picture_is_not_there(tmp_path: Path, left: bytes) -> None:
    path = gallery(tmp_path).add(Picture(JOB, torch.zeros(3, 64, 64)))
    path.write_bytes(left)
    assert not gallery(tmp_path).has(JOB)


def test_other_weights_or_another_version_of_a_package(tmp_path: Path) -> None:
    made = Gallery(str(tmp_path), "png", mock.Mock(wraps=gallery(tmp_path).record))
    facts = {**gallery(tmp_path).record.metadata(JOB), "weights": {"old/place.st": "abc"}}
    made.record.metadata = lambda *_: facts
    made.add(Picture(JOB, torch.zeros(3, 64, 64)))
    facts = {**facts, "weights": {"new/place.st": "abc"}, "versions": {"torch": "9"}}
    assert made.has(JOB)
    facts = {**facts, "weights": {"new/place.st": "xyz"}}
    assert not made.has(JOB)


def test_without_a_launcher_running_twice_makes_new_files(tmp_path: Path) -> None:
    flags = ("--prompt", "a tree", "--steps", 1, "--steps_b", 1, "--output_dir", tmp_path)
    for more in ((), (), ("--skip_existing",)):
        alone(*flags, *more)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "a_tree_128x128_5.png", "a_tree_128x128_5_2.png"
    ]  # fmt: skip


def test_a_new_picture_is_never_seen_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed at any point leaves whole pictures alone."""
    monkeypatch.setattr(images, "take_path", mock.Mock(side_effect=AssertionError))
    for name in ("a.png", "a_2.png"):
        path = images.save_new_image(Image.new("RGB", (8, 8)), tmp_path, "a", "png", {})
        assert path.name == name and Image.open(path).size == (8, 8)
    assert len(list(tmp_path.iterdir())) == 2


def test_where_files_cannot_have_two_names_they_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=PermissionError))
    names = [images.save_new_image(Image.new("RGB", (8, 8)), tmp_path, "a", "png", {}).name for _ in "ab"]
    assert names == ["a.png", "a_2.png"] == sorted(path.name for path in tmp_path.iterdir())


# --- which process does what ----------------------------------------------------------------------


def environment(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
    }.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_item_belongs_to_one_process(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    shares = []
    for rank in range(count):
        environment(monkeypatch, rank, count)
        shares += share("abcdefg")
    assert sorted(shares) == list("abcdefg")


def test_processes_that_do_not_know_their_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes, but not of RANK: start them with torchrun"):
        share([1])


def test_one_process_agrees_with_itself() -> None:
    assert agreed("x", lambda: (1, 2)) == (1, 2)


@pytest.mark.parametrize(
    ("device", "found"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_each_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, device: str | None, found: str
) -> None:
    environment(monkeypatch, 1, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", mock.Mock())
    assert str(own_device(device)) == found


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, 1, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes .* with 2 GPUs: start 2"):
        own_device(None)
