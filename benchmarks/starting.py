"""From the command to the file: python benchmarks/starting.py [-- FLAGS OF inference/test_t2i.py]

Makes one picture in a new process, cold and warm, and prints what each part takes. Cold: the weights and
torch's libraries are not in the file cache, as far as the system lets them be dropped, and no hash is known.
Without flags it is the picture of the preset tiny at 128 x 128. Parts overlap: stages load during the passes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ("--preset", "tiny", "--prompt", "a red house by the sea", "--height", "128", "--width", "128")
PARTS = {
    "start": "Python, until the script's first line",
    "imports": "torch and this project",
    "load": "weights, from files to where they rest",
    "passes": "computing, with what is loaded in between",
    "hashes": "waited for, once the picture is there",
    "saving": "the file",
}


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
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "inference", check=True)
    *weights, libraries = (ROOT / line for line in done.stdout.splitlines())
    folders = [path for path in weights if path.is_dir()]
    found = [path for path in weights if path.is_file()]
    found += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return found + list(libraries.rglob("*.so"))


def measure(flags: Sequence[str]) -> None:
    """Make the picture in this process, and print the seconds of its parts on the last line."""
    spent: Counter[str] = Counter(start=time.time() - psutil.Process().create_time())
    begin = time.perf_counter()
    sys.path.insert(0, str(ROOT / "inference"))
    from test_t2i import main

    import core.commands.pictures as pictures
    import core.pipeline.made as made
    import core.pipeline.pipeline as pipeline

    spent["imports"] = time.perf_counter() - begin

    def timed(owner: object, name: str, part: str) -> None:
        setattr(owner, name, _timed(getattr(owner, name), part, spent))

    timed(pipeline, "load_module", "load")
    timed(pipeline.TextEncoder, "load", "load")
    timed(made.WeightHashes, "result", "hashes")
    timed(pictures, "save_new_image", "saving")
    timed(pipeline.UltraPixelPipeline, "_pictures", "passes")
    main([*flags])
    print(*(f"{spent[part]:.3f}" for part in PARTS))


def _timed(function: Callable, part: str, spent: Counter[str]) -> Callable:
    def called(*args: object, **named: object) -> object:
        begin = time.perf_counter()
        made = function(*args, **named)
        made = iter([*made]) if part == "passes" else made
        spent[part] += time.perf_counter() - begin
        return made

    return called


def run(flags: Sequence[str], cache: str) -> tuple[float, list[float]]:
    """Seconds of a whole process, and of its parts."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--measure", "--", *flags, "--output_dir", out]
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        whole = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return whole, [float(text) for text in done.stdout.splitlines()[-1].split()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("flags", nargs="*", default=DEFAULT, help="those of the picture, behind --")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    flags = options.flags
    if options.measure:
        measure(flags)
        return
    with tempfile.TemporaryDirectory() as cache:
        print(forget(cold_files(flags)))
        cold = run(flags, cache)
        warm = run(flags, cache)
    print(f"{'seconds':<10}{'cold':>8}{'warm':>8}")
    for (part, told), *seconds in zip(PARTS.items(), cold[1], warm[1], strict=True):
        print(f"{part:<10}" + "".join(f"{value:>8.2f}" for value in seconds) + f"  {told}")
    print(f"{'all':<10}{cold[0]:>8.2f}{warm[0]:>8.2f}")


if __name__ == "__main__":
    main()
