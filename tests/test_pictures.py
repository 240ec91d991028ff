"""A picture that was computed is never lost: where it goes, what it says, and what may fail around it."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_pipeline
from PIL import Image
from torch import Tensor

import core.commands.pictures
import core.pictures.images
import core.pipeline.batches
import core.pipeline.made
import core.pipeline.stages
from core.commands.flags import make_jobs
from core.commands.pictures import Gallery, make_pictures, save_beside
from core.commands.prompts import read_lines
from core.config.settings import Job, Settings
from core.family import evaluation_run
from core.pictures.images import read_image_metadata, take_path
from core.pipeline.control import Control
from core.pipeline.made import Picture, Record, WeightHashes, infotext, picture_metadata
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.progress import Progress, counting
from core.printable import printable, say

sys.path.insert(0, str(ROOT / "inference"))
import evaluate  # noqa: E402
import test_t2i as script  # noqa: E402

QUICK = Settings(steps=1, steps_b=1, cfg=1.0)
JOBS = [Job("a fox, 狐", 64, 64, seed) for seed in range(3)]
SEEDS = re.compile(r"_64x64_(\d+)\.png$")


@pytest.fixture(scope="module")
def loaded(family_folder: Path) -> UltraPixelPipeline:
    return random_pipeline(family_folder)


@pytest.fixture
def pipeline(loaded: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch) -> UltraPixelPipeline:
    """The random family; all its pictures go through the stages together, as on a GPU."""
    monkeypatch.setattr(UltraPixelPipeline, "group", 8)
    return loaded


def arguments(folder: Path, **changed: object) -> argparse.Namespace:
    values = {"height": 64, "width": 64, "dry_run": False, "preset": None, "output_dir": str(folder),
              "format": "png", "preview": False, "skip_existing": None, **changed}  # fmt: skip
    return argparse.Namespace(**values)


def make(pipeline: UltraPixelPipeline, folder: Path, **changed: object) -> int:
    return make_pictures(arguments(folder, **changed), pipeline, JOBS, QUICK, ())


def seeds(folder: Path) -> list[int]:
    return sorted(int(SEEDS.search(path.name)[1]) for path in folder.iterdir())


def gallery(folder: Path, format: str = "png") -> Gallery:
    return Gallery(str(folder), format, Record(QUICK, {}, "stage_c", WeightHashes({})))


def picture(seed: int = 3, value: float = 0.5) -> Picture:
    return Picture(Job("a fox, 狐", 64, 64, seed), torch.full((3, 64, 64), value))


# --- the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("decode_picture", KeyboardInterrupt()),
        ("stage_b_pass", KeyboardInterrupt()),
        ("stage_b_pass", torch.OutOfMemoryError("full")),
    ],
)
def test_what_is_done_before_the_run_breaks_off_is_kept(
    pipeline: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error
) -> None:
    where = core.pipeline.batches if stage == "stage_b_pass" else core.pipeline.stages
    work, calls = getattr(where, stage), []

    def breaks_off(*args: object, **named: object) -> object:
        calls.append(1)
        if len(calls) >= 3:
            raise error
        return work(*args, **named)

    monkeypatch.setattr(where, stage, breaks_off)
    monkeypatch.setattr(pipeline, "_shrink", lambda _: False)  # no mode that takes less is left
    with pytest.raises(type(error)):
        make(pipeline, tmp_path)
    assert seeds(tmp_path) == [0, 1]


def test_a_picture_is_saved_while_the_next_one_is_made_and_one_waits_at_most(
    pipeline: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, there = core.pipeline.stages.decode_picture, []

    def watched(*args: object) -> Tensor:
        there.append(len(list(tmp_path.iterdir())))
        return decode(*args)

    monkeypatch.setattr(core.pipeline.stages, "decode_picture", watched)
    assert make(pipeline, tmp_path) == 0
    assert there[0] == 0 and there[2] >= 1 and seeds(tmp_path) == [0, 1, 2]


def test_only_the_first_thread_uses_the_bars(
    pipeline: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    says, names = core.commands.pictures.ProgressBars.say, []

    def said(self: object, text: str) -> None:
        names.append(threading.current_thread())
        says(self, text)

    monkeypatch.setattr(core.commands.pictures.ProgressBars, "say", said)
    assert make(pipeline, tmp_path) == 0
    assert set(names) == {threading.main_thread()}
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed")]
    assert [line.split(":")[0] for line in told] == ["seed 0", "seed 1", "seed 2"]


def test_pictures_are_encoded_in_a_thread_of_its_own(
    pipeline: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, names = core.commands.pictures.save_new_image, []

    def watched(*args: object) -> Path:
        names.append(threading.current_thread().name)
        return save(*args)

    monkeypatch.setattr(core.commands.pictures, "save_new_image", watched)
    assert make(pipeline, tmp_path) == 0
    assert len(names) == 3 and all(name.startswith("saving") for name in names)


def test_where_stages_stay_in_place_each_picture_is_finished_first(loaded: UltraPixelPipeline) -> None:
    assert loaded.group == 1


def test_a_broken_picture_does_not_cost_the_others(
    pipeline: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = core.pipeline.stages.decode_picture, []

    def broken(*args: object) -> Tensor:
        calls.append(1)
        return decode(*args) * (torch.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(core.pipeline.stages, "decode_picture", broken)
    with pytest.raises(ValueError, match="NaN"):
        make(pipeline, tmp_path)
    assert seeds(tmp_path) == [0, 2]


@pytest.mark.parametrize("what", ["preview", "bars"])
def test_what_shows_the_progress_may_fail(
    pipeline: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    class Fails:
        def __init__(self, *_: object) -> None: ...
        def say(self, *_: object) -> None: ...
        def close(self, *_: object) -> None: ...
        def __call__(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(core.commands.pictures, {"preview": "Previews", "bars": "ProgressBars"}[what], Fails)
    with pytest.warns(UserWarning, match="Fails failed .*No space left.*the run goes on") as caught:
        assert make(pipeline, tmp_path, preview=True) == 0
    assert len(caught) == 1
    assert [seed for seed in range(3) if (tmp_path / f"a_fox_狐_64x64_{seed}.png").is_file()] == [0, 1, 2]


def test_previews_replace_nothing_but_themselves(
    pipeline: UltraPixelPipeline, tmp_path: Path, family_folder: Path
) -> None:
    mine = tmp_path / "a_fox_狐_64x64_0_preview_hr.png"
    mine.write_text("mine")
    many = Settings(steps=5, steps_b=1, cfg=1.0)
    make_pictures(arguments(tmp_path, preview=True), pipeline, JOBS[:1], many, ())
    names = sorted(path.name.removeprefix("a_fox_狐_64x64_0") for path in tmp_path.iterdir())
    assert names == [".png", "_preview_hr.png", "_preview_hr_2.png", "_preview_lr.png"]
    assert mine.read_text() == "mine"


def test_an_observer_of_the_python_interface_may_fail(pipeline: UltraPixelPipeline) -> None:
    def notebook_bar(_: object) -> None:
        raise RuntimeError("no display")

    with pytest.warns(UserWarning, match=r"notebook_bar failed \(no display\)"):
        (made,) = pipeline.run(JOBS[:1], QUICK, notebook_bar)
    assert made.pixels.shape == (3, 64, 64)


@pytest.mark.parametrize("folder", ["file", "file/below", "x" * 300])
def test_the_output_folder_is_checked_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(script, "make_pipeline", lambda _: pytest.fail("something was loaded"))
    monkeypatch.setattr(evaluation_run, "load_recogniser", lambda *_: pytest.fail("something was loaded"))
    monkeypatch.chdir(ROOT)
    for main, flags in ((script.main, ["--prompt", "a fox"]), (evaluate.main, [])):
        with pytest.raises(ValueError, match="output folder"):
            main([*flags, "--output_dir", str(tmp_path / folder)])


# --- saving ---------------------------------------------------------------------------------------


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[Path], bool]], None]:
    """Lets saving fail where a function of the wanted path says so; the temporary folder is "tmp"."""
    save = core.commands.pictures.save_new_image
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def refuse_where(told: Callable[[Path], bool]) -> None:
        def saved(image: Image.Image, folder: str, stem: str, format: str, *rest: object) -> Path:
            if told(Path(folder, f"{stem}.{format}")):
                raise OSError(28, "No space left on device")
            return save(image, folder, stem, format, *rest)

        monkeypatch.setattr(core.commands.pictures, "save_new_image", saved)

    return refuse_where


@pytest.mark.parametrize(
    ("told", "place"),
    [
        (lambda wanted: "狐" in wanted.name, "out/picture_64x64_3.webp"),  # letters, or length
        (lambda wanted: wanted.suffix == ".webp", "out/picture_64x64_3.png"),  # too complex for it
        (lambda wanted: wanted.parent.name == "out", "tmp/a_fox_狐_64x64_3.webp"),  # full, or gone
    ],
)
def test_a_picture_that_cannot_be_saved_as_asked_is_saved_elsewhere(refuse, tmp_path, told, place) -> None:
    refuse(told)
    with pytest.warns(UserWarning, match=f"{place}: the picture lies here .*No space left"):
        path = gallery(tmp_path / "out", "webp").add(picture())
    assert path == tmp_path / place and read_image_metadata(path)["seed"] == 3


def test_a_picture_that_can_be_saved_nowhere_is_told(refuse, tmp_path: Path) -> None:
    refuse(lambda _: True)
    with pytest.raises(OSError, match="seed 3 cannot be saved anywhere .*No space left"):
        gallery(tmp_path / "out").add(picture())


def test_a_folder_that_is_gone_is_made_again(tmp_path: Path) -> None:
    held = gallery(tmp_path / "out")
    held.add(picture())
    shutil.rmtree(tmp_path / "out")
    assert held.add(picture()) == tmp_path / "out" / "a_fox_狐_64x64_3.png"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_what_is_being_saved_when_the_run_ends_is_saved_without_waiting_for_hashes(
    pipeline: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(core.pipeline.made, "file_sha256", lambda _: let_go.wait(60) and "")
    monkeypatch.setattr(pipeline, "_hashes", None)
    decode, calls = core.pipeline.stages.decode_picture, []

    def breaks_off(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return decode(*args)

    monkeypatch.setattr(core.pipeline.stages, "decode_picture", breaks_off)
    with pytest.raises(type(error)):
        make(pipeline, tmp_path)
    let_go.set()
    assert seeds(tmp_path) == [0]
    assert read_image_metadata(next(tmp_path.iterdir()))["weights"] == {}


def test_ctrl_c_while_the_last_picture_is_saved_does_not_cost_it(
    pipeline: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, calls = futures.wait, []

    def interrupted(waited: Sequence[Future], **named: object) -> object:
        calls.append(len(waited))
        if len(waited) == len(JOBS):  # at the end
            monkeypatch.setattr(futures, "wait", wait)
            raise KeyboardInterrupt
        return wait(waited, **named)

    monkeypatch.setattr(futures, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(pipeline, tmp_path)
    assert seeds(tmp_path) == [0, 1, 2]


def test_what_a_controlnet_saw_replaces_nothing_and_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control(torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8))
    for _ in range(2):
        save_beside(tmp_path / "a.png", control)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_control.png", "a_control_2.png"]
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="not saved beside it"):
        save_beside(tmp_path / "file" / "a.png", control)


# --- what is written into it ----------------------------------------------------------------------


def test_packages_without_metadata_cost_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str | None:
        if package == "ultrapixel":
            raise PackageNotFoundError(package)
        return None if package == "torch" else "5.0"  # None: damaged

    monkeypatch.setattr(core.pipeline.made, "version", version)
    with pytest.warns(UserWarning, match="version of (ultrapixel|torch) is not known") as caught:
        metadata = picture_metadata(JOBS[0], QUICK, {}, {})
    assert len(caught) == 2 and metadata["versions"] == {"transformers": "5.0"}


def test_a_weight_file_that_is_gone_costs_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)

    def sha256(path: str) -> str:
        return Path(path if path.endswith("a") else "gone").read_text()

    monkeypatch.setattr(core.pipeline.made, "file_sha256", sha256)
    hashes = WeightHashes({"Stage C": str(tmp_path / "a"), "Stage B": str(tmp_path / "b")})
    with pytest.warns(UserWarning, match="hash of .*b is left out"):
        assert hashes.result() == {str(tmp_path / "a"): "a"}


def read_as_a1111(text: str) -> dict[str, str]:
    """Prompts and values, found as A1111 and those that follow it find them."""
    *lines, last = text.strip().split("\n")
    values = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    values = {name: json.loads(value) if value[:1] == '"' else value for name, value in values.items()}
    start = next((n for n, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    return {"prompt": "\n".join(lines[:start]), "negative": negative, **values}


@pytest.mark.parametrize("negative", ["", 'dark, "old"\nand foggy 🌫'])
@pytest.mark.parametrize(
    "prompt", ["a red house", 'a "red" house: big,\n\nby the sea 🦊\nSteps: many', "Seed"]
)
@pytest.mark.parametrize("model", ["stage_c", 'mine, "v2": best'])
def test_others_find_prompts_and_values(prompt: str, negative: str, model: str) -> None:
    text = infotext(Job(prompt, 64, 96, 7, negative), Settings(steps=12, cfg=2.5, sampler="ddim"), model)
    assert read_as_a1111(text) == {
        "prompt": prompt, "negative": negative, "Steps": "12", "Sampler": "ddim", "CFG scale": "2.5",
        "Seed": "7", "Size": "96x64", "Model": model,
    }  # fmt: skip
    assert ("Negative prompt" in text) == bool(negative)


def test_the_infotext_is_exactly_this() -> None:
    text = infotext(Job("a red house", 64, 96, 7, "night"), Settings(), "ultrapixel_t2i")
    assert text == (
        "a red house\nNegative prompt: night\n"
        "Steps: 20, Sampler: ddpm, CFG scale: 4.0, Seed: 7, Size: 96x64, Model: ultrapixel_t2i"
    )


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_a_picture_is_repeated_and_read_by_others(tmp_path: Path, format: str) -> None:
    job = Job('a "red" house,\n狐 🦊', 64, 64, 7, "night, fog")
    path = gallery(tmp_path, format).add(Picture(job, torch.rand(3, 64, 64)))
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769).get(0x9286, b"UNICODE\0")
        text = image.info.get("parameters") or comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert read_as_a1111(text)["prompt"] == job.prompt and read_as_a1111(text)["Model"] == "stage_c"
    (repeated,) = make_jobs(script.parse(["--from_image", str(path), "--dry_run"]))
    assert repeated == job


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_pictures_of_before_are_repeated(format: str) -> None:
    old = ROOT / "tests" / "pictures" / f"settings_before_infotext.{format}"
    parsed = script.parse(["--from_image", str(old), "--dry_run"])
    (job,) = make_jobs(parsed)
    prompt = 'a red house, "old" (left); 風車 🦁\nby the sea'
    assert job == Job(prompt, 64, 64, 7, "night, fog")
    assert (parsed.steps, parsed.cfg, parsed.config_c) == (2, 2.5, "configs/tiny/stage_c.yaml")


# --- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "\\xe9\\u72d0"), ("cp1252", "é\\u72d0"), ("utf-8", "é狐"), ("utf-16", "é狐"), (None, "é狐")],
)
def test_what_an_encoding_lacks_is_escaped(encoding: str | None, shown: str) -> None:
    assert printable("é狐", encoding) == shown
    assert "\\udcff" in printable("a\udcff", encoding)
    assert printable("\x1b[31m\tred\n\x9b", encoding) == "\\x1b[31m\tred\n\\x9b"


def test_text_goes_to_any_stream() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    say("狐", stream)
    assert stream.buffer.getvalue() == b"\\u72d0\n"
    say("nobody hears this", None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stream_that_is_closed_or_full_costs_a_warning() -> None:
    with open("/dev/full", "w") as full, pytest.warns(UserWarning, match="/dev/full cannot be written to"):
        say("text", full)
    with warnings.catch_warnings():  # what was left in it is gone: closing it again raised nothing
        warnings.simplefilter("error")
        stream = io.StringIO()
        stream.close()
        with pytest.raises(UserWarning, match="closed"):
            say("text", stream)


COMMAND = """
set -o pipefail
{python} inference/test_t2i.py --config_c {family}/stage_c.yaml --config_b {family}/stage_b.yaml \
    --pretrained_path none --prompt 狐 --height 64 --width 64 --steps 1 --steps_b 1 --num_image 3 \
    --output_dir {folder} | head -1
"""


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_pictures_are_made_whoever_listens(family_folder: Path, tmp_path: Path) -> None:
    command = COMMAND.format(python=sys.executable, family=family_folder, folder=tmp_path)
    environment = {"PATH": os.environ["PATH"], "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"seed 123: {tmp_path}/\\u72d0_64x64_123.png\n"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert "warning: <stdout> cannot be written to any more" in done.stderr
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.filterwarnings("ignore:ProgressBars failed")
def test_pictures_are_made_without_any_streams(
    pipeline: UltraPixelPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert make(pipeline, tmp_path) == 0
    assert seeds(tmp_path) == [0, 1, 2]


# --- prompts --------------------------------------------------------------------------------------


def test_a_line_of_blanks_separates_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a red\nhouse\n \t\na blue house\r\n\u3000\r\n\r\n  a fox\n\n \n".encode())
    assert [line.prompt for line in read_lines(path)] == ["a red house", "a blue house", "a fox"]


def test_a_taken_name_is_taken_at_once(tmp_path: Path) -> None:
    assert [take_path(tmp_path, "a", "png").name for _ in range(2)] == ["a.png", "a_2.png"]


def test_a_bar_that_counts_ends_no_run() -> None:
    class Bar:
        counted = 0

        def update(self, steps: int) -> bool:  # as tqdm, which returns True where it was drawn
            self.counted += steps
            return True

    bar = Bar()
    observer = counting(bar, "stage A")
    assert [observer(Progress(stage, JOBS[0], 1, 1)) for stage in ("stage A", "stage B")] == [None, None]
    assert bar.counted == 1
