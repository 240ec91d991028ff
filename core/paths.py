"""Where a written path leads: ~ is the home folder, and files of the project are found from everywhere."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[1]
_INSTALLED = Path(sys.prefix, "share", "ultrapixel")  # where a wheel puts them
# the folder that holds configs/ and models/
PROJECT = _REPOSITORY if (_REPOSITORY / "configs").is_dir() else _INSTALLED
MARKS = (".git", "pyproject.toml")  # in the uppermost folder of a repository
_SPECIAL = re.compile(r"[*?{\[]")  # begins what changes in a pattern such as data/{000..099}.tar


def at_home(path: str) -> str:
    """The path with the home folder for a leading ~ or ~user; ValueError for a user who is not known."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        user = expanded.partition("/")[0]
        raise ValueError(f"{path}: no user's home folder is {user}; write ./{path} for a name that begins so")
    return expanded


def located(path: str, root: Path | None = PROJECT) -> str:
    """The path or, where it leads nowhere from the working directory but does from `root`, that below `root`.

    Of a pattern the folder before its first special character counts. ValueError as in `at_home`.
    """
    path = at_home(path)
    if root is None or os.path.isabs(path) or _is_there(path) or not _is_there(below := str(root / path)):
        return path
    return below


def repository_of(file: str | Path) -> Path | None:
    """The folder of the repository that a file lies in: it has a mark, or the configs/ around the file."""
    parents = Path(file).resolve().parents
    for parent in parents:
        if any((parent / mark).exists() for mark in MARKS) or parent / "configs" in parents:
            return parent
    return None


def user_cache() -> Path:
    """This project's folder among the caches of the user, which may not exist yet."""
    home = os.path.expanduser("~")
    places = {"darwin": f"{home}/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", home)}
    named = os.environ.get("XDG_CACHE_HOME", "")
    folder = named if os.path.isabs(named) else places.get(sys.platform, f"{home}/.cache")
    return Path(folder, "ultrapixel")


def _is_there(path: str) -> bool:
    special = _SPECIAL.search(path)
    folder = os.path.dirname(path[: special.start()]) if special else None
    return os.path.exists(path) or (folder is not None and os.path.exists(folder or os.curdir))
