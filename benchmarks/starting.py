"""From the command to the file: python benchmarks/starting.py [-- FLAGS OF inference/test_t2i.py]

Makes a picture in a new process, cold and warm, then two in one process, and prints what each part takes.
Cold: the weights and torch's libraries are not in the file cache, as far as the system lets them be dropped,
and no hash is known, nor any compiled kernel. Parts overlap: stages load during the passes.

Without flags it is the picture of the preset tiny at 128 x 128. With --random_weights it is one of 4096 x
4096 by networks of the published sizes, whose weights need no download; 10 GB are written for them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

STARTED = time.time()  # before what takes long to import

from core.commands.flags import home_path
from core.config.offloading import OFFLOAD_NAMES

ROOT = Path(__file__).resolve().parents[1]
PROMPT = ("--prompt", "a red house by the sea")
SMALL = ("--height", "128", "--width", "128")
DEFAULT = ("--preset", "tiny", *PROMPT, *SMALL)
PARTS = {
    "start": "Python, until the script's first line",
    "imports": "torch and this project",
    "load": "weights, from files to where they rest",
    "passes": "computing, with what is loaded in between",
    "hashes": "waited for, once the picture is there",
    "saving": "the file",
}
ROWS = {
    **PARTS,
    "file": "from the command to the file",
    "second": "from that file to the next one of the same process",
    "its passes": "where pictures are made one by one",
    "process": "from the command to its end",
    "text": "as the script prints it, with waiting for weights",
    "stage C": "",
    "stage B": "",
    "stage A": "",
    "all": "",
    "device GiB": "of memory at the peak, as the script prints it",
    "host GiB": "",
}
# Lines of the script: what a stage took, and its peaks of memory, the host's alone on a CPU.
USE = re.compile(r"^(text|stage [CBA]|all) +([\d.]+)(?: +([\d.]+) GiB)?(?: +([\d.]+) GiB)?$", re.MULTILINE)
OFFLOAD = re.compile(r"^offload: (\w+)", re.MULTILINE)


def forget(files: Sequence[Path]) -> str:
    """Drop files from the system's cache of files; a sentence that says whether that was possible."""
    if not hasattr(os, "posix_fadvise"):
        return "this system does not let files be dropped from its cache: cold is as warm"
    for path in files:
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return f"cold: {len(files)} files were dropped from the cache, those that others use excepted"


def cold_files(flags: Sequence[str]) -> list[Path]:
    """The weights that the flags name, and torch's libraries."""
    code = "import sys, torch\nfrom core.commands.flags import make_pipeline\nfrom test_t2i import parse\n"
    code += "print(*make_pipeline(parse(sys.argv[1:])).files().values(), torch.__path__[0], sep='\\n')"
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "inference")
    if done.returncode:
        failed(done)
    *weights, libraries = (ROOT / line for line in done.stdout.splitlines())
    folders = [path for path in weights if path.is_dir()]
    found = [path for path in weights if path.is_file()]
    found += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    nvidia = libraries.parent / "nvidia"  # CUDA's own, in packages beside torch
    return found + [path for folder in (libraries, nvidia) for path in folder.rglob("*.so*")]


def measure(command: float, flags: Sequence[str]) -> None:
    """Make the pictures in this process, and print its device and the seconds of all calls of its parts.

    `command` is when it was started.
    """
    spent: dict[str, list[float]] = defaultdict(list)
    spent["start"].append(STARTED - command)
    sys.path.insert(0, str(ROOT / "inference"))
    import torch
    from test_t2i import main

    import core.commands.pictures as pictures
    import core.pipeline.made as made
    from core.pipeline import networks, stages
    from core.pipeline.pipeline import UltraPixelPipeline

    spent["imports"].append(time.time() - STARTED)

    def timed(owner: object, name: str, part: str) -> None:
        setattr(owner, name, _timed(getattr(owner, name), part, spent))

    for module in (networks, stages):
        timed(module, "load_module", "load")
    timed(stages.TextEncoder, "load", "load")
    timed(made.WeightHashes, "result", "hashes")
    timed(pictures, "save_new_image", "saving")
    timed(UltraPixelPipeline, "_pictures", "passes")
    main([*flags])
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({"device": f"{name}, torch {torch.__version__}", "calls": spent}))


def _timed(function: Callable, part: str, spent: dict[str, list[float]]) -> Callable:
    def called(*args: object, **named: object) -> object:
        begin = time.perf_counter()
        made = function(*args, **named)
        made = iter([*made]) if part == "passes" else made
        spent[part].append(time.perf_counter() - begin)
        return made

    return called


def run(flags: Sequence[str], cache: str) -> dict[str, Any]:
    """What one process took: `device`, `offload`, the seconds of all `calls`, and the values of `ROWS`."""
    with tempfile.TemporaryDirectory() as out:
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        begin = time.time()
        command = [sys.executable, __file__, "--measure", str(begin), "--", *flags, "--output_dir", out]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        process = time.time() - begin
        files = sorted(path.stat().st_mtime for path in Path(out).iterdir())
    if done.returncode:
        failed(done)
    told = json.loads(done.stdout.splitlines()[-1])
    values = {part: sum(told["calls"].get(part, [])) for part in PARTS}
    values |= {"file": files[0] - begin, "process": process, **printed(done.stderr)}
    if len(files) > 1:
        values["second"] = files[1] - files[0]
    if len(passes := told["calls"]["passes"]) > 1:
        values["its passes"] = passes[1]
    return {**told, "offload": OFFLOAD.search(done.stderr)[1], "values": values}


def printed(text: str) -> dict[str, float]:
    """Seconds of the stages, and the peaks of memory, from the table that the script prints."""
    uses = USE.findall(text)
    found = {name: float(seconds) for name, seconds, *_ in uses}
    host = [float(second or first) for *_, first, second in uses if first]
    device = [float(first) for *_, first, second in uses if second]
    peaks = {"device GiB": device, "host GiB": host}
    return found | {name: max(values) for name, values in peaks.items() if values}


def random_weights(folder: str, small: bool) -> list[str]:
    """The flags of a picture by random weights, which are written unless they lie in the folder."""
    script = Path(__file__).with_name("random_weights.py")  # in its own process: this one holds no libraries
    command = [sys.executable, str(script), str(Path(folder).absolute()), *(["--small"] if small else [])]
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)
    print(f"weights: {time.perf_counter() - begin:.0f} s until they lay in {folder}", flush=True)
    size = (*SMALL, "--steps", "2", "--steps_b", "2") if small else ("--height", "4096", "--width", "4096")
    return [*shlex.split(done.stdout), *PROMPT, *size]


def torch_finds_a_gpu() -> bool:
    """As a new process tells: this one imports nothing that takes long."""
    code = "import sys, torch\nsys.exit(not torch.cuda.is_available())"
    return not subprocess.run([sys.executable, "-c", code]).returncode


def failed(done: subprocess.CompletedProcess[str]) -> NoReturn:
    """End with what a process told last."""
    last = (done.stderr.strip().splitlines() or ["error: a process failed"])[-1]
    sys.stderr.write(re.sub(r"^\w+Error: ", "error: ", last) + "\n")
    raise SystemExit(2)


def show(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a column for each run."""
    print(f"{'seconds':<12}" + "".join(f"{name:>9}" for name in runs))
    for row, told in ROWS.items():
        values = [one["values"].get(row) for one in runs.values()]
        cells = ("-" if value is None else f"{value:.2f}" for value in values)
        print(f"{row:<12}" + "".join(f"{cell:>9}" for cell in cells) + f"  {told}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("flags", nargs="*", help="those of the picture, behind --; the last of two counts")
    parser.add_argument(
        "--random_weights", type=home_path, metavar="FOLDER",
        help="measure with these; what is not there yet is written, and stays (10 GB)",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="random weights of tiny networks, on a CPU too")
    parser.add_argument("--offload", nargs="+", choices=OFFLOAD_NAMES, default=[], help="also these, warm")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures there, as JSON")
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure, options.flags)
        return
    if options.small and options.random_weights is None:
        parser.error("--small is for --random_weights")
    asked = any(flag.split("=")[0] in ("--prompt", "--prompt_file") for flag in options.flags)
    flags = [*options.flags, *(() if asked else PROMPT)] if options.flags else DEFAULT
    if options.random_weights is not None:
        if not options.small and not torch_finds_a_gpu():
            parser.error("--random_weights takes a GPU, and torch finds none: --small shows that it runs")
        flags = [*random_weights(options.random_weights, options.small), *options.flags]
    variants = {"cold": (), "warm": (), "two": ("--num_image", "2")}
    variants |= {mode: ("--offload", mode) for mode in options.offload}
    runs: dict[str, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory() as cache:
            print(forget(cold_files(flags)), flush=True)
            for name, added in variants.items():
                runs[name] = run([*flags, *added], cache)
                if options.out is not None:  # after each, as the next one may fail
                    text = json.dumps({"flags": flags, "runs": runs}, indent=2) + "\n"
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(text, "utf-8")
    finally:
        if runs:
            print(f"{runs['cold']['device']}, offload {runs['cold']['offload']}")
            show(runs)


if __name__ == "__main__":
    main()
