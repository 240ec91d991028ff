"""A run replaces no weight file that it did not write, and says at its end where its own are."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from training_lesson import exit_code, figures, state, train

sys.path.insert(0, str(ROOT / "train"))
import make_tiny  # noqa: E402
import train_t2i  # noqa: E402

from core.training.exports import Exports  # noqa: E402
from core.training.run import outcome  # noqa: E402
from core.weights.checkpoint import read_tensors, save_tensors  # noqa: E402

WEIGHTS = {"x": torch.ones(2)}
NO_SHEETS = "previewer_checkpoint_path="
T2I = "ultrapixel_t2i.safetensors"


@pytest.fixture
def exports(tmp_path: Path) -> Exports:
    """Of a run that has not begun."""
    (tmp_path / "run").mkdir()
    return Exports(tmp_path / "run")


def write(exports: Exports, value: float) -> None:
    """Export to all claimed files."""
    weights = {"x": torch.full((2,), value)}
    exports.recorded(lambda tensors, _: [save_tensors(path, tensors, {}) for path in exports.files])(
        weights, 1
    )


# --- whose a file is ------------------------------------------------------------------------------


def test_a_file_that_was_there_is_named_with_the_flag(exports: Exports, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_tensors(path, WEIGHTS, {})
    with pytest.raises(ValueError, match=f"{path} .*'export_path'.*overwrite_export=true"):
        exports.claim(path, "export_path")
    assert Exports(exports.folder, overwrite=True).claim(path, "export_path") == path


def test_a_run_replaces_its_own_file_until_another_takes_its_place(exports: Exports, tmp_path: Path) -> None:
    path = exports.claim(tmp_path / "new" / "own.safetensors", "export_path")
    write(exports, 1.0)
    Exports(exports.folder).claim(path, "export_path")
    save_tensors(path, {"x": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="not written by this run"):
        Exports(exports.folder).claim(path, "export_path")


def test_another_run_does_not_replace_it(exports: Exports, tmp_path: Path) -> None:
    path = exports.claim(tmp_path / "own.safetensors", "export_path")
    write(exports, 1.0)
    with pytest.raises(ValueError, match="not written by this run"):
        Exports(tmp_path / "other").claim(path, "export_path")


def test_a_kill_while_a_file_is_written_is_no_obstacle(exports: Exports, tmp_path: Path) -> None:
    path = exports.claim(tmp_path / "own.safetensors", "export_path")

    def killed(*_: object) -> None:
        save_tensors(path, WEIGHTS, {})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exports.recorded(killed)({}, 1)
    Exports(exports.folder).claim(path, "export_path")


def test_in_its_own_folder_a_run_goes_on_and_in_a_folder_of_weights_none_begins(exports: Exports) -> None:
    path = exports.folder / "own.safetensors"
    save_tensors(path, WEIGHTS, {})
    with pytest.raises(ValueError, match="not written by this run"):
        exports.claim(path, "export_path")
    (exports.folder / "step_00000001.pt").touch()  # as checkpoints of today lie, without a record
    exports.claim(path, "export_path")
    write(exports, 1.0)
    assert {entry.name for entry in exports.folder.iterdir()} == {"own.safetensors", "step_00000001.pt"}


def test_where_no_file_can_be_written_is_told(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, part in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "cannot be written")):
        with pytest.raises(ValueError, match=part):
            exports.claim(path, "export_path")


# --- by the scripts -------------------------------------------------------------------------------


def test_a_training_refuses_to_replace_weights_before_it_begins(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shipped.safetensors"
    save_tensors(path, WEIGHTS, {})
    before, flag = path.read_bytes(), f"export_path={path}"
    assert exit_code(train_t2i.main, lesson / "t2i.yaml", tmp_path, flag) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: {path} ") and "overwrite_export=true" in message
    assert path.read_bytes() == before and not list(tmp_path.rglob("step_*.pt"))
    replacing = (flag, "updates=1", "overwrite_export=true")
    train(train_t2i.main, lesson / "t2i.yaml", tmp_path, *replacing, NO_SHEETS)
    written = path.read_bytes()
    assert written != before
    train(train_t2i.main, lesson / "t2i.yaml", tmp_path, flag, "updates=2", NO_SHEETS)
    assert path.read_bytes() != written


def test_what_is_done_and_what_can_be_done_is_told(
    lesson: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "core.training.run")
    folder = train(train_t2i.main, lesson / "t2i.yaml", tmp_path, "updates=2", NO_SHEETS)
    weights = folder / T2I
    command = f"--config_c {folder / 'config.yaml'} --pretrained_path {weights}"
    expected = ["update 2 of 2 is done", f"the weights lie in {weights}", command, "updates above 2"]
    assert all(part in line for part, line in zip(expected, caplog.messages[-4:], strict=True))
    weights.unlink()  # as if it was killed before they were written
    train(train_t2i.main, lesson / "t2i.yaml", tmp_path, "updates=1", NO_SHEETS)
    assert "nothing was left to do: updates is 1, and 2 are done" in caplog.messages
    assert len(figures(folder)) == 2
    trained = state(folder, 2)
    for name, value in read_tensors(weights).items():
        assert torch.equal(value, trained[f"guidance.{name}"])


def test_what_a_stopped_training_tells(tmp_path: Path) -> None:
    assert outcome(9, 0, 0, [tmp_path / "none"], "it") == [
        "stopped after update 0 of 9",
        "to go on: the same command again",
    ]


# --- the embedded family --------------------------------------------------------------------------


def test_no_shipped_file_writes_outside_its_runs_folder() -> None:
    for path in ROOT.glob("configs/t*/*.yaml"):
        values = yaml.safe_load(path.read_text("utf-8"))
        assert not {"export_path", "export_effnet_path", "output_path"} & values.keys(), path


def test_each_training_of_the_family_finds_what_those_before_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From nothing, with trainings that write their files alone; again, it copies the same."""
    monkeypatch.setattr(make_tiny, "ROOT", tmp_path)
    monkeypatch.setattr(make_tiny, "MODELS", tmp_path / "models" / "tiny")
    ran = []

    def pretend(script: str, config: Path) -> int:
        values = yaml.safe_load(config.read_text("utf-8"))
        read = [value for key, value in values.items() if key.endswith("_path") and key not in OTHERS]
        assert all((tmp_path / path).exists() for path in read), (config, read)
        folder = tmp_path / values["checkpoint_path"] / values["experiment_id"]
        for part in make_tiny.PARTS:
            if part.config == config.stem:
                for source in {source for source, _ in part.results} | AS_START.get(part.config, set()):
                    save_tensors(folder / source, WEIGHTS, {"name": config.stem})
        (folder / f"step_{values['updates']:08d}.pt").touch()
        ran.append(config.stem)
        return 0

    monkeypatch.setattr(make_tiny, "train", pretend)
    monkeypatch.setattr(sys, "argv", ["make_tiny.py"])
    for _ in range(2):
        assert make_tiny.main() == 0
    assert ran == 2 * [part.config for part in make_tiny.PARTS]
    told = capsys.readouterr().out
    assert re.findall(r"^(\w+): [\d.]+ minutes$", told, re.MULTILINE) == ran
    assert told.count("git checkout models/tiny brings back") == 2 and "1 of 16: train_text_encoder" in told
    shipped = {path.relative_to(ROOT / "models" / "tiny") for path in (ROOT / "models" / "tiny").rglob("*.*")}
    made = {path.relative_to(make_tiny.MODELS) for path in make_tiny.MODELS.rglob("*.*")}
    assert made == shipped


OTHERS = {"checkpoint_path", "webdataset_path", "cache_path"}  # are made, or lie in the repository
AS_START = {
    "train_stage_a": {"stage_a.safetensors"}, "train_stage_c": {"stage_c.safetensors"},
    "train_encoder": {"effnet_encoder.safetensors", "previewer.safetensors"},
    "train_stage_b": {"stage_b.safetensors"},
}  # fmt: skip


def test_damaged_times_begin_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "times.json"
    path.write_text("{")
    assert [make_tiny.add_time(path, "a", 2.0), make_tiny.add_time(path, "a", 1.0)] == [2.0, 3.0]
    assert f"warning: {path} is damaged" in capsys.readouterr().err


def test_a_training_that_stopped_ends_the_making_of_the_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_tiny, "ROOT", tmp_path)
    monkeypatch.setattr(make_tiny, "train", lambda *_: 0)  # as after Ctrl-C: saved, and no error
    with pytest.raises(ValueError, match="train_text_encoder.yaml is not trained to its end"):
        make_tiny.make(make_tiny.PARTS[0])
