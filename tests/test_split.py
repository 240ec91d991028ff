"""One picture on several processes is that of one: halves of cfg, rows of maps, attention by heads."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from random_family import Family, write_family
from test_many_gpus import SMALL, T2I, alone
from training_lesson import torchrun

from core.commands.flags import run
from core.pipeline.split import row_bounds
from modules.stage_b import StageB
from modules.stage_c import StageC

sys.path.insert(0, str(ROOT / "inference"))
import test_t2i as script  # noqa: E402

# Heads enough for three processes, and not the same number for each.
FAMILY = Family(
    stage_c=replace(Family().stage_c, c_hidden=(80, 80), nhead=(5, 5)),
    guidance=replace(Family().guidance, ind=80),
)

WORKER = """
import sys, warnings
from dataclasses import replace
from pathlib import Path
import torch
from torch.distributed import TCPStore
from core.config.settings import Job, Settings
from core.launch import leave, part
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.resolution import plan
from core.pipeline.split import Split

folder, (rank, count, port) = Path(sys.argv[1]), map(int, sys.argv[2:])
torch.set_num_threads(1)
torch.set_grad_enabled(False)
warnings.simplefilter("ignore")
names = "stage_c.yaml", "stage_b.yaml", "ultrapixel_t2i.safetensors"
pipeline = UltraPixelPipeline.from_config(*(folder / name for name in names), "cpu", "float32")
jobs = [Job("a fox", 448, 384, 3)]
sizes = [plan(448, 384, pipeline.config_c.geometry)]
texts = pipeline.encode_text(jobs)

def latents(settings):
    made = pipeline.run_stage_c(jobs, sizes, texts, settings)
    return made[0], next(pipeline.run_stage_b(jobs, sizes, texts, made, settings))

some = {"cfg_interval": (0, 0.8), "guidance_unconditional": -2.0}
cases = {"both": {}, "one": {"cfg": 1.0, "cfg_b": 1.0}, "some": some}
for name, values in cases.items():
    settings = Settings(steps=2, steps_b=2, **values)
    pipeline.split = None
    alone = latents(settings)
    if name == "both":
        split = Split(torch.device("cpu"), TCPStore("127.0.0.1", port, count, rank == 0), rank, count)
        heights = sizes[0].hr_latent[0], sizes[0].stage_b_latent[0]
        for stage, height in zip((pipeline.stage_c, pipeline.stage_b), heights):
            shares = split.shares(stage.module, height)
            print(*(share.half is not None and f"half {share.half}" for share in shares.values()),
                  *(share.bounds for share in shares.values()))
    pipeline.split = split
    for one, several in zip(alone, latents(replace(settings, fp8="on"))):  # which is left out
        assert (one - several).abs().max() <= 1e-5 * one.abs().max(), (name, one - several)
        assert several.std() > 0.1
part()
leave(0)
"""


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    write_family(folder, FAMILY)
    return folder


@pytest.mark.parametrize("count", [3, 4])
def test_latents_are_those_of_one_process(folder: Path, count: int) -> None:
    port = free_port()
    command = [sys.executable, "-c", WORKER, str(folder)]
    started = [
        subprocess.Popen([*command, str(rank), str(count), port], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(count)
    ]  # fmt: skip
    for rank, process in enumerate(started):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-3000:]
        for line in output.splitlines()[:2]:
            assert ("half" in line) == (count % 2 == 0), output
            assert line.count("(0, ") == 2, output  # rows are shared out, too
            assert count % 2 or f"half {rank // (count // 2)}" in line


def test_the_script_makes_one_file_of_all(tmp_path: Path) -> None:
    flags = ("--prompt", "a red house")
    alone(*flags, "--output_dir", tmp_path / "one")
    done = torchrun(T2I, *SMALL, *flags, "--split", "--preview", "--output_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 5: ") == 1 and done.stderr.count("peak memory") == 1
    (one,) = (tmp_path / "one").iterdir()
    made = sorted((tmp_path / "two").iterdir())
    assert [path.name for path in made if "preview" not in path.name] == [one.name] and len(made) == 3
    a, b = (
        np.asarray(Image.open(folder / one.name)).astype(int)
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert np.abs(a - b).max() <= 1


# --- where maps are cut ---------------------------------------------------------------------------


def test_rows_are_cut_where_all_levels_can_be() -> None:
    with torch.device("meta"):
        stage_c = StageC(c_hidden=(40, 40), nhead=(5, 5), blocks=((1, 1), (1, 1)))
        halved = StageC(c_hidden=(40, 40), nhead=(5, 5), blocks=((1, 1), (1, 1)), switch_level=(True,))
        stage_b = StageB(c_hidden=(8, 16, 32, 32), nhead=(-1, -1, 4, 4), blocks=((1,) * 4, (1,) * 4))
    assert row_bounds(stage_c, 10, 3) == (0, 3, 6, 10)
    assert row_bounds(stage_c, 10, 6) is None  # more processes than heads
    assert row_bounds(stage_c, 3, 4) is None  # than rows
    assert row_bounds(halved, 10, 2) is None  # interpolation reaches over any cut
    assert row_bounds(stage_b, 80, 3) == (0, 16, 48, 80)
    assert row_bounds(stage_b, 72, 3) is None  # rows of the innermost level would be cut in two


@pytest.mark.parametrize(("flags", "processes", "part"), [
    (["--split"], "1", "--split is for several processes: start them with torchrun"),
    (["--split", "--reuse", "2"], "2", "--split and --reuse 2, which --fast sets too, do not go together"),
    (["--split", "--fast", "--dry_run"], "1", "--split and --reuse 2, which --fast sets too, do not go"),
    (["--split", "--batch", "2", "--dry_run"], "1", "--split and --batch 2 do not go together"),
])  # fmt: skip
def test_what_cannot_be_split_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[str], processes: str, part: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("RANK", "0")
    words = [*SMALL, "--prompt", "a tree", "--no-skip_existing", "--output_dir", str(tmp_path), *flags]
    with pytest.raises(SystemExit, match="^2$"):
        run(lambda: script.main(words))
    assert f"error: {part}" in capsys.readouterr().err
