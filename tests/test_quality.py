"""benchmarks/quality.py: one table of what settings cost and save, which goes on where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import quality  # noqa: E402

from core.commands.flags import run  # noqa: E402


def test_rows_are_made_once_and_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"exact": {}, "two steps": {"steps": 2}, "rounded": {"steps": 2, "fp8": "on"}}
    monkeypatch.setattr(quality, "ROWS_OF_FAST", rows)
    monkeypatch.setattr(quality, "PAIRS", 1)
    given = ["fast", "--num_image", "2", "--side", "64", "--folder", str(tmp_path)]
    assert quality.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if "%" in line] == ["| exact", "| two steps", "| rounded"]
    assert [line.split(" | ")[-1] == "|" for line in lines if "%" in line] == [False, False, True]
    assert {"fast.png", "exact.png", "two_steps.png"} <= {path.name for path in tmp_path.iterdir()}
    monkeypatch.setitem(rows, "three steps", {"steps": 3})
    monkeypatch.setattr(quality, "measure", None)  # nothing is measured again
    assert quality.main([*given, "--max_hours", "0"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert [line for line in again if "%" in line] == [line for line in lines if "%" in line]
    assert "| three steps | not measured | | | | |" in again

    (result, *_) = tmp_path.glob("*.json")
    result.write_text("{")
    with pytest.raises(ValueError, match=f"{result.name} is damaged .*: remove it, and it is made anew"):
        quality.main(given)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (("--num_image", "0"), "--num_image must be at least 1, not 0"),
        (("--side", "10"), "the height must be from 64"),
        (("--folder", "README.md"), "README.md cannot be the output folder: a file is in its place"),
        (("--max_hours", "nan"), "'nan' is no number from 0 up"),
        (("--figure", "a.txt"), "a.txt: a plot's name ends in .png"),
    ],
)
def test_a_wrong_command_line_is_told_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: tuple[str, str], part: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["quality.py", "fast", *given])
    with pytest.raises(SystemExit) as end:
        run(quality.main)
    assert end.value.code == 2 and part in capsys.readouterr().err


def test_every_row_can_be_asked_for() -> None:
    for what in ("fast", "curves"):
        for changes in quality.rows_of(what).values():
            quality.replace(quality.Settings(), **changes)
