"""Fetch the published weights into models/, and check what is there.

python models/download.py                      what the preset small-big needs
python models/download.py --preset lite        smaller models
python models/download.py lora_cat.safetensors single files by name
python models/download.py --check              sizes and hashes of what is there, without network
python models/download.py --list               every file, its size and its repository
"""

import argparse
from collections.abc import Sequence

from core.commands.flags import Parser
from core.weights.published import FILES, PRESETS, ModelFile, show_size


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="single files, in place of a preset's")
    parser.add_argument("--preset", choices=PRESETS, default="small-big", help="whose files")
    parser.add_argument("--list", action="store_true", help="print every file, its size and where it is from")
    parser.add_argument("--check", action="store_true", help="check sizes and hashes, without network")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before what follows loads the hub's library

import hashlib
import json
import shutil
import sys
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

MISSING = "is missing"
SIZE_TOLERANCE = 0.01  # sizes are known to three digits


def select(names: Sequence[str], preset: str) -> tuple[ModelFile, ...]:
    """The files of these names, or of the preset if there are none; ValueError for an unknown name."""
    listed = {file.name: file for file in FILES}
    for name in names:
        if name not in listed:
            raise ValueError(f"{name!r} is not a published file; listed are {', '.join(listed)}")
    return tuple(listed[name] for name in names) or tuple(file for file in FILES if preset in file.presets)


def find_problem(file: ModelFile, folder: Path) -> str | None:
    """What is wrong with the copy of `file` in `folder`, as the rest of a sentence, or None."""
    path = folder / file.name
    if not path.is_file():
        return MISSING
    size = path.stat().st_size
    if file.size is not None and abs(size - file.size) > SIZE_TOLERANCE * file.size:
        return f"has {size} bytes, not about {file.size} (a broken download, a web page, a Git LFS pointer?)"
    if not file.sha256:
        return find_structure_problem(path)
    digest = hash_file(path)
    return None if digest in file.sha256 else f"has the sha256 {digest}, not {' or '.join(file.sha256)}"


def hash_file(path: Path) -> str:
    """The sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def find_structure_problem(path: Path) -> str | None:
    """Whether a file is whole and what its suffix says, for files without a known hash."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "numpy"):  # compares the sizes in the header with the file's
                return None
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            json.loads(text)
        elif not text.startswith("#version"):
            return "is not a list of merges (a web page, a Git LFS pointer?)"
    except (SafetensorError, ValueError) as error:
        return f"is not a whole {path.suffix[1:]} file ({error})"
    return None


def check(files: Sequence[ModelFile], folder: Path) -> list[str]:
    """Compare what is in `folder` with the list, without network; a sentence for each wrong file."""
    failures = []
    for file in files:
        problem = find_problem(file, folder)
        state = "ok" if problem is None else "missing" if problem == MISSING else "wrong"
        print(f"{state:8}{show_size(file.size):>10}  {file.name}", flush=True)
        if problem:
            failures.append(f"{file.name} {problem}.")
    return failures


def download(files: Sequence[ModelFile], folder: Path) -> list[str]:
    """Fetch the files that are not in `folder`; a sentence for each that is not right in the end.

    A file that is there with other contents is left alone: it may be somebody's own.
    """
    absent = [file for file in files if not (folder / file.name).exists()]
    print_plan(files, absent, folder)
    present = [(file, find_problem(file, folder)) for file in files if file not in absent]
    failures = [f"{file.name} {problem}; move it away to fetch it." for file, problem in present if problem]
    needed, free = sum(file.size or 0 for file in absent), shutil.disk_usage(folder).free
    if needed > free:
        return [*failures, f"{show_size(needed)} are to be fetched, but {folder} has {show_size(free)} free."]
    return failures + fetch(absent, folder)


def print_plan(files: Sequence[ModelFile], absent: Sequence[ModelFile], folder: Path) -> None:
    for file in files:
        state = "fetch" if file in absent else "check"
        print(f"{state:7}{show_size(file.size):>10}  {file.name}  from {file.repository}")
    total = show_size(sum(file.size or 0 for file in absent))
    print(f"{len(absent)} of {len(files)} files are to be fetched, {total}, into {folder}", flush=True)


def fetch(files: Sequence[ModelFile], folder: Path) -> list[str]:
    """Download through huggingface_hub, which resumes a lost connection; a sentence for each failure."""
    if files and constants.HF_HUB_OFFLINE:
        names = ", ".join(file.name for file in files)
        return [f"HF_HUB_OFFLINE is set, so these were not fetched: {names}."]
    failures = []
    for file in files:
        try:
            hf_hub_download(file.repository, file.name, local_dir=folder)
            problem = find_problem(file, folder)
        except LocalEntryNotFoundError as error:  # the hub is out of reach: the other files would fail alike
            reason = f"could not be fetched from {constants.ENDPOINT}: {say(error.__cause__)}"
            return [*failures, f"{file.name} and what follows it {reason}"]
        except Exception as error:  # of the hub's HTTP library, which differs from release to release
            problem = f"could not be fetched from {file.repository}: {say(error)}"
        if problem:
            failures.append(f"{file.name} {problem}")
    return failures


def say(error: BaseException | None) -> str:
    """An error on one line."""
    return " ".join(str(error).split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if all the files wanted are there and right, else 2."""
    options = parse(arguments)
    if options.list:
        for file in FILES:
            presets = ", ".join(file.presets) or "by name"
            print(f"{show_size(file.size):>10}  {file.name:42}  {file.repository:26}  {presets}")
        return 0
    try:
        files = select(options.names, options.preset)
        failures = (check if options.check else download)(files, Path(__file__).resolve().parent)
    except (ValueError, OSError) as error:
        failures = [str(error)]
    except KeyboardInterrupt:
        failures = ["stopped; run the same command again to go on: files that are whole are kept."]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
