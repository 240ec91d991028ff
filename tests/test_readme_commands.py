"""Every command of the README's (and of docs/'s) code blocks runs, as it stands but for tiny sizes."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT
from PIL import Image
from random_family import randomise
from test_loras import make_lora

from core.config.schema import ControlTrainConfig, controlnet_sizes
from core.config.sizes import STAGE_C_VERSIONS
from core.config.yaml import load
from core.pictures.images import save_image
from core.weights.checkpoint import config_metadata, save_tensors
from core.weights.lora.files import write_lora
from modules.controlnet import ControlNet

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = ("sh", "bash", "shell", "console")
PYTHONS = ("python", "python3", ".venv/bin/python")
# By name: what builds the whole family, tests, installs, enters the environment, downloads, or needs Docker
# or ComfyUI.
EXEMPT = re.compile(
    r"make (app|demo|tiny|test|lint|venv)\b|source |docker |ln -s |\S*pip install|git clone|cd |"
    r"\S*python3? models/download\.py"
)

# --- what is added to a command of a script -------------------------------------------------------


def overrides(**values: object) -> list[str]:
    """Keys of a configuration as the command line has them; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def tiny_models() -> dict[str, object]:
    """The embedded family's networks as a training names them."""
    stored = yaml.safe_load((ROOT / "configs/tiny/stage_c.yaml").read_text("utf-8"))
    stored |= {"effnet_checkpoint_path": "models/tiny/effnet_encoder.safetensors"}
    paths = {key: str(ROOT / value) for key, value in stored.items() if key.endswith("_path")}
    return {**stored, **paths, "previewer_checkpoint_path": None}


PICTURE = [*"--height 64 --width 64 --steps 1 --steps_b 1 --num_image 1".split()]
TRAINING = overrides(
    **tiny_models(), multi_aspect_ratio=["1/1"], updates=1,
    warmup_updates=1, num_workers=0, tracker="none",
)  # fmt: skip
LORA = {
    "image_size_schedule": [[0, [64]]], "train_tokens": [["[x]", "^red</w>"]], "tmp_prompt": "a [x] house",
    "ultrapixel_path": str(ROOT / "models/tiny/ultrapixel_t2i.safetensors"),
}  # fmt: skip
ADDED = {
    "inference/test_t2i.py": PICTURE,
    "inference/test_personalized.py": PICTURE,
    "inference/test_controlnet.py": [*PICTURE, "--control_file", "{control}.safetensors"],
    "inference/upscale.py": [*"--factor 1 --steps 1 --steps_b 1".split()],
    "inference/evaluate.py": [*PICTURE, "--height", "136", "--width", "136"],
    "train/train_t2i.py": [*TRAINING, *overrides(image_size=64)],
    "train/train_personalized.py": [*TRAINING, *overrides(**LORA)],
    "train/train_ultrapixel_control.py": [*TRAINING, *overrides(image_size=64, controlnet=None)],
    "models/convert.py": ["--text_encoder", str(ROOT / "models/tiny")],
    "train/check_data.py": [],
    "docs/make_keys.py": [],
    "benchmarks/ablation.py": [
        *"--train_side 64 --side 64 --updates 1 --num_image 1 --batch_size 1 --seeds 0".split()
    ],
}

# Scripts that take long or never end, and tests that run them in full, alike.
TRIED_ELSEWHERE = {
    "inference/app.py": "tests/test_server_api.py",
    "benchmarks/gpu.py": "tests/test_benchmarks.py",
    "tests/check_reference.py": "tests/test_reference.py",
    "train/train_tiny_on_gpu.py": "tests/test_tiny_on_gpu.py",
}


# --- the commands ---------------------------------------------------------------------------------


def commands_of(text: str) -> Iterator[str]:
    """The commands of a page's code blocks, those over several lines as one."""
    for language, block in BLOCK.findall(text):
        if language in SHELLS:
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line.removeprefix("$ "), comments=True):
                    yield shlex.join(words)


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page.read_text("utf-8"))))
TRIED = [
    command
    for command in COMMANDS
    if not EXEMPT.match(command) and not any(script in command for script in TRIED_ELSEWHERE)
]


def added(script: str, words: list[str]) -> list[str]:
    """What follows a script's words: the embedded family, where they do not name it, and small sizes."""
    named = "--preset" in words and words[words.index("--preset") + 1].startswith("tiny")
    family = ["--preset", "tiny"] if script.startswith("inference/") and not named else []
    own_size = {"--region", "--outpaint"} & {*words}  # that of the picture
    return [*family, *(ADDED[script][4:] if own_size else ADDED[script])]


def split(command: str) -> tuple[list[str], str, list[str]]:
    """The words that start a script, the script, and its own; an error for a command that is not known."""
    words = shlex.split(command)
    places = [place for place, word in enumerate(words) if word in ADDED]
    assert places and (words[0] in PYTHONS or words[0] == "torchrun"), (
        f"{command}: this command is new; say in ADDED what it needs to be run at a tiny size"
    )
    return words[: places[0]], words[places[0]], words[places[0] + 1 :]


# --- running --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name and a reader would have by then: pictures, weights, what earlier ones wrote."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("example_dataset", "example_personalized", "example_control", "example_given"):
        shutil.copytree(ROOT / "figures" / name, folder / "figures" / name)
    for name in ("prompt_list.txt", "docs/make_keys.py", "models/tiny/lora_striped_balloon.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("models/tiny/text_encoder", "models/tiny/tokenizer"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "cards").mkdir()
    (folder / "cards" / "colour.txt").write_text("red\nblue\n")
    torch.manual_seed(0)
    write_lora(folder / "models/lora_cat.safetensors", make_lora(1, sizes=STAGE_C_VERSIONS["tiny"]), "own")
    for name in ("canny", "inpainting", "super_resolution"):
        write_controlnet(folder / f"{name}.safetensors", name)
    made = folder / "outputs/example/a_small_yellow_boat_on_the_sea_at_dusk_512x512_7.png"
    save_image(Image.new("RGB", (64, 64)), made, "png", {"prompt": "a small yellow boat", "seed": 7})
    small = folder / "outputs/explore/a_red_lighthouse_on_an_island_in_the_sea_at_dusk_512x512_8_lr.png"
    stored = {"prompt": "a red lighthouse", "seed": 8, "height": 512, "width": 512, "lr_only": True}
    save_image(Image.new("RGB", (128, 128)), small, "png", stored)
    return folder


def write_controlnet(path: Path, kind: str) -> None:
    """Random weights of a ControlNet for the embedded family."""
    sizes = controlnet_sizes(
        load(
            ControlTrainConfig, ROOT / "configs/tiny/train_control_canny.yaml", [f"controlnet_filter={kind}"]
        )
    )
    network = ControlNet(**asdict(sizes))
    randomise(network)
    save_tensors(path, network.state_dict(), config_metadata(asdict(sizes)))


@pytest.fixture
def reader(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with those things, for one command."""
    folder = tmp_path / "reader"
    shutil.copytree(things, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def start_here(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script in this process, as starting Python anew takes seconds."""
    AcceleratorState._reset_state(reset_partial_state=True)
    path = script if Path(script).is_file() else str(ROOT / script)  # a copy, where it writes beside itself
    monkeypatch.setattr(sys, "argv", [path, *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a red house\n")))  # for --loop
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code


def launch(launcher: list[str], script: str, words: list[str]) -> None:
    """Run a script in two processes: of one launcher, or of two where several nodes are asked for."""
    nodes = 2 if "--nnodes" in launcher else 1
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    here = ["--nproc_per_node", str(2 // nodes), "--master_addr", "localhost", "--master_port", port]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher[1:], *here, "--node_rank", str(rank),
             str(ROOT / script), *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(nodes)
    ]  # fmt: skip
    for process in started:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-3000:]


@pytest.mark.filterwarnings("ignore:the prompt is .* too long")
@pytest.mark.parametrize("command", TRIED, ids=lambda command: re.sub(r"\W+", "_", command)[:90])
def test_a_command_of_the_readme_runs(command: str, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, script, words = split(command)
    if "--pretrained_path" in words:  # what a training wrote
        trained = Path(words[words.index("--pretrained_path") + 1])
        trained.parent.mkdir(parents=True)
        shutil.copy(ROOT / "models/tiny/ultrapixel_t2i.safetensors", trained)
    if launcher[0] == "torchrun":
        launch(launcher, script, [*words, *added(script, words)])
    else:
        start_here(script, [*words, *added(script, words)], monkeypatch)


def test_every_command_is_known_or_exempt_by_name() -> None:
    assert len(TRIED) > 10 and len(TRIED) > len(COMMANDS) / 2
    for command in TRIED:
        assert (ROOT / split(command)[1]).is_file()
    assert all((ROOT / test).is_file() for test in TRIED_ELSEWHERE.values())
    with pytest.raises(AssertionError, match="this command is new"):
        split("python train/train_new.py configs/new.yaml")
