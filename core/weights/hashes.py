"""SHA-256 of weight files, each read once: what was found is kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

from core.paths import user_cache

KNOWN_FILE = "sha256.json"  # {path: [bytes, times of change in ns, number of the file, hash]}
HASHED_BYTES = 1 << 22  # read at once
ENTRY, HASH = 5, "[0-9a-f]{64}"

Known = dict[str, list]
Stamp = tuple[int, int, int, int]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file in hexadecimal, computed once for its size, times of change and number."""
    path = Path(path).resolve()
    return _sha256(path, _stamp(path))


@lru_cache
def _sha256(path: Path, stamp: Stamp) -> str:
    known = _read_known().get(str(path))
    if known is not None and known[:-1] == [*stamp]:
        return known[-1]
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASHED_BYTES):
            digest.update(block)
    if _stamp(path) == stamp:  # nobody wrote meanwhile
        _remember(str(path), [*stamp, digest.hexdigest()])
    return digest.hexdigest()


def _stamp(path: Path) -> Stamp:
    """What changes with a file's content, also where an archive gives back its time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read_known() -> Known:
    """What the cache holds; nothing where it is damaged or cannot be read."""
    try:
        found = json.loads((user_cache() / KNOWN_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {path: entry for path, entry in entries if _is_entry(entry)}


def _exists(path: str) -> bool:
    with suppress(ValueError):  # of a name that no file can have
        return os.path.exists(path)
    return False


def _is_entry(entry: object) -> bool:
    whole = isinstance(entry, list) and len(entry) == ENTRY
    return whole and isinstance(entry[-1], str) and re.fullmatch(HASH, entry[-1]) is not None


def _remember(path: str, entry: list) -> None:
    """Add to the cache, whole or not at all, and drop files that are gone; it may be impossible."""
    temporary = None
    with suppress(OSError, ValueError):
        folder = user_cache()
        folder.mkdir(parents=True, exist_ok=True)
        kept = {other: old for other, old in _read_known().items() if _exists(other)}
        temporary = folder / f".{uuid4().hex}"
        temporary.write_text(json.dumps({**kept, path: entry}), "utf-8")
        os.replace(temporary, folder / KNOWN_FILE)
    if temporary is not None:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
