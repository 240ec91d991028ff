"""The benchmarks of GPUs run with tiny sizes on a CPU: what they write, and what is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import random_weights  # noqa: E402

from core.weights.published import FILES  # noqa: E402


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "figures" / "gpu.json"
    path.parent.mkdir()
    path.write_text("an earlier run's")
    done = script("gpu.py", "--small", "--out", path)
    assert done.returncode == 0, done.stderr
    return path


def test_all_parts_are_measured(measured: Path) -> None:
    known = json.loads(measured.read_text())
    assert "left_out" not in known and known["about"]["networks"] == "tiny networks"
    found = {(step["side"], step["way"], step["stage"]) for step in known["steps"]}
    full = {
        (side, way, stage)
        for side in gpu.SMALL_SIDES
        for way in (gpu.OURS, gpu.PLAIN)
        for stage in gpu.STAGES
    }
    assert full <= found and (gpu.SMALL_SIDES[0], gpu.DIFFUSERS, "Stage C, high") in found
    assert all(step["seconds"] > 0 and step["times_floor"] > 0 for step in known["steps"])
    assert len(known["pictures"]) == 2 * len(gpu.STAGES)
    assert {line["name"] for line in known["operators"]} >= {"depthwise_norm", "hidden", "attention"}
    assert all(line["error"] < 1e-5 for line in known["operators"])
    assert len([*measured.parent.iterdir()]) == 2
    (earlier,) = measured.parent.glob("gpu_20??-*.json")
    assert earlier.read_text() == "an earlier run's"


def test_the_plot_is_drawn_from_the_file_alone(measured: Path, tmp_path: Path) -> None:
    done = script("gpu.py", "--out", measured, "--plot", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def parts_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Sequence[gpu.Part], minutes: float
) -> dict:
    figures = gpu.Figures(tmp_path / "f.json")
    monkeypatch.setattr(gpu, "parts", lambda _: parts)
    monkeypatch.setattr(gpu, "measure_ceiling", mock.Mock())
    gpu.measure(gpu.Run(None, figures, None, {}), (), minutes)
    return figures.known


def test_what_time_does_not_suffice_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(next(clock)))

    def full(run: gpu.Run) -> None:
        raise torch.OutOfMemoryError("no memory\nmore")

    def done(run: gpu.Run) -> None:
        run.figures.add("done", x=1)

    known = parts_within(tmp_path, monkeypatch, [("a", done), ("b", full), ("c", done)], 4)
    assert known["done"] == [{"x": 1}]
    full_memory = {"what": "b", "why": "OutOfMemoryError: no memory"}
    assert known["left_out"] == [full_memory, {"what": "c", "why": "no time was left"}]
    assert json.loads((tmp_path / "f.json").read_text()) == known


def test_a_failed_part_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(_: gpu.Run) -> None:
        raise NotImplementedError

    def done(run: gpu.Run) -> None:
        run.figures.add("done", x=1)

    known = parts_within(tmp_path, monkeypatch, [("a", failed), ("b", done)], 4)
    assert known == {"left_out": [{"what": "a", "why": "NotImplementedError: "}], "done": [{"x": 1}]}


def test_operations_are_those_that_were_counted_on_the_published_networks() -> None:
    """In TFLOP at 2048 x 2048, from a count on the published code's networks."""
    found = gpu.counted(gpu.Sizes(), 2048)
    wanted = dict(zip(gpu.STAGES, (8.2, 36.3, 22.7, 8.7), strict=True))
    assert {stage: value / 1e12 for stage, value in found.items()} == pytest.approx(wanted, rel=0.05)


def test_training_speed_prints_a_line_for_each_way() -> None:
    done = script("training_speed.py", "--sides", 64)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| 64²")]
    assert [line[2].strip() for line in lines] == ["with", "without"]
    for line in lines:
        assert float(line[3]) > 0 and float(line[9]) > 0.5
        assert 50 < sum(float(share.strip(" %")) for share in line[5:9]) <= 101


def test_starting_is_measured_with_random_weights(tmp_path: Path) -> None:
    folder, out = tmp_path / "weights", tmp_path / "figures" / "starting.json"
    done = script("starting.py", "--random_weights", folder, "--small", "--offload", "stage", "--out", out)
    assert done.returncode == 0, done.stderr
    known = json.loads(out.read_text())
    assert known["flags"][:2] == ["--config_c", str(folder / "random_c.yaml")]
    assert [*known["runs"]] == ["cold", "warm", "two", "stage"]
    for name, run in known["runs"].items():
        values = run["values"]
        assert 0 < values["start"] < values["imports"] < values["file"] < values["process"], name
        assert values["passes"] > values["stage C"] > 0 and values["host GiB"] > 0.1, name
        assert ("second" in values) == ("its passes" in values) == (name == "two")
    assert 0 < known["runs"]["two"]["values"]["second"] < known["runs"]["two"]["values"]["file"]
    rows = [line.split()[0] for line in done.stdout.splitlines()]
    assert rows[-3:] == ["all", "device", "host"] and "second" in rows


@pytest.mark.parametrize(("words", "part"), [
    (("gpu.py", "--plot", "a.png", "--out", "nowhere.json"), "nowhere.json does not exist: measure first"),
    (("gpu.py", "--plot", "a.png", "--out", "empty.json"), "empty.json has no step's figures to draw"),
    (("gpu.py", "--plot", "a.png", "--out", "damaged.json"), "damaged.json holds no figures of this script"),
    (("gpu.py", "--plot", "a.png", "--out", "other.json"), "other.json holds no figures of this script"),
    (("gpu.py", "--plot", "nowhere/a.png", "--out", "full.json"), "nowhere"),
    (("gpu.py", "--small", "--out", "folder.json"), "folder.json is a folder: name a file"),
    (("gpu.py", "--small", "--minutes", "0"), "--minutes must be above 0, and --sides at least 64"),
    (("gpu.py", "--small", "--sides", "10"), "--minutes must be above 0, and --sides at least 64"),
    (("training_speed.py", "--sides", "0"), "--sides must be at least 64, not 0"),
    (("starting.py", "--", "--preset", "huge"), "huge"),
])  # fmt: skip
def test_what_cannot_be_measured_is_one_sentence(tmp_path: Path, words: tuple[str, ...], part: str) -> None:
    (tmp_path / "folder.json").mkdir()
    contents = {
        "empty": '{"about": {"device": "a card"}}',
        "damaged": '{"steps": [',
        "other": '{"steps": [1]}',
    }
    about = {"device": "a card", "torch": "2", "date": "today", "networks": "tiny"}
    step = {"side": 64, "way": gpu.OURS, "stage": "Stage B", "of_picture": 1.0, "floor": 0.5}
    contents["full"] = json.dumps({"about": about, "steps": [step]})
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    own = (tmp_path / word if word.endswith((".json", ".png")) else word for word in words[1:])
    done = script(words[0], *own)
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "error: " in done.stderr.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_large_random_weights_are_not_written_for_a_cpu(tmp_path: Path) -> None:
    done = script("starting.py", "--random_weights", tmp_path / "weights")
    assert done.returncode == 2 and "takes a GPU, and torch finds none" in done.stderr, done.stderr
    assert not (tmp_path / "weights").exists()


def test_random_weights_have_the_published_sizes(tmp_path: Path) -> None:
    found = random_weights.networks(*random_weights.configured(tmp_path, small=False))
    published = {str(tmp_path / file.name): file.size for file in FILES}
    for path, tensors in found.items():
        assert sum(tensor.nbytes for tensor in tensors.values()) == pytest.approx(published[path], rel=2e-3)


def test_random_weights_that_are_there_stay(tmp_path: Path) -> None:
    flags = random_weights.write_all(tmp_path, small=True)
    files = [*tmp_path.rglob("*.safetensors")]
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    assert random_weights.write_all(tmp_path, small=True) == flags
    changed = [path for path in files if path.stat().st_mtime_ns != stamps[path]]
    assert len(files) == 5 and changed == files[:1]
    with pytest.raises(ValueError, match="of other sizes: name another folder"):
        random_weights.write_all(tmp_path, small=False)
    assert {*tmp_path.rglob("*.safetensors")} == {*files}
