"""The script that makes the embedded family's pictures in README and docs again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "figures"))
import draw_family  # noqa: E402

WRITTEN = {  # what the scripts write, by a flag
    "--lr_only": ["a_8_lr.png", "contact_sheet.png"],
    "--grid": ["a_1.png", "a_1_grid.png"],
    "canny:": ["a.png", "a_control.png", "a_control_2.png"],
    "inpainting": ["a.png", "a_control.png"],
}
SIZES = {  # of other sheets than squares
    "benchmarks/tiny_control.py": (1024, 24 + 8 * 256), "benchmarks/tiny_personalized.py": (1616, 1016),
}  # fmt: skip


def pretend(command: list[str], folder: Path) -> list[Path]:
    assert (ROOT / command[0]).is_file()
    names = next((n for flag, n in WRITTEN.items() if any(w.startswith(flag) for w in command)), ["a.png"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", SIZES.get(command[0], (512, 512))).save(folder / name)
    return [folder / name for name in names]


@pytest.mark.parametrize("name", draw_family.DRAWN)
def test_each_picture_is_made_by_its_pages_commands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw_family, "made", pretend)
    monkeypatch.setattr(draw_family, "FIGURES", tmp_path)
    (tmp_path / "example_given").symlink_to(ROOT / "figures" / "example_given")
    draw_family.main([name])
    with Image.open(tmp_path / f"{name}.jpg") as picture:
        assert min(picture.size) >= 256
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"figures/{name}.jpg" in page.read_text("utf-8") for page in pages)


def test_a_command_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--stepz.*did you mean"):
        draw_family.made(["inference/test_t2i.py", "--stepz", "3"], tmp_path)


def test_commands_come_from_the_pages() -> None:
    command = draw_family.documented("text_to_image.md", "--grid", "cfg=1,2,4")
    assert command[0] == "inference/test_t2i.py" and "a small yellow boat on the sea, at dusk" in command
    with pytest.raises(ValueError, match=r"text_to_image.md has 0 commands with --no_such_flag"):
        draw_family.documented("text_to_image.md", "--no_such_flag")


def test_a_name_that_is_no_picture_is_told() -> None:
    with pytest.raises(ValueError, match="nope is none of these pictures: tiny_family, "):
        draw_family.main(["grid", "nope"])
