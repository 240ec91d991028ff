"""Which files of a folder or a shard are pictures and captions, by their names alone."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.pictures.images import picture_suffixes

CAPTION_SUFFIXES = (".json", ".txt", ".caption")  # in the order in which they are looked at
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LISTINGS = ("metadata.jsonl", "metadata.csv")  # imagefolder: rows with file_name and a caption
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information"}
MASKS = ("-masklabel", "-condlabel")  # OneTrainer's, beside its pictures
HIDDEN = "hidden"  # what such files are counted as
UNSORTED = "the shard is not sorted"  # how the reason begins
MOST_KINDS = 10  # of files that a message counts one by one


@dataclass(frozen=True)
class Broken:
    """Something that is skipped, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Beside:
    """The files of one folder: pictures, each with the caption files that belong to it, and the rest."""

    captions: Mapping[str, tuple[str, ...]]  # of every picture, the likeliest first
    listings: tuple[str, ...]
    left_out: Mapping[str, int]  # by suffix


# --- one name -------------------------------------------------------------------------------------


def fold(name: str) -> str:
    """What names have in common that differ in letter case or Unicode normal form alone."""
    return unicodedata.normalize("NFC", name).lower()


def suffix_of(name: str) -> str:
    """The last suffix, in lower case."""
    return os.path.splitext(name)[1].lower()


def is_picture(name: str) -> bool:
    """Whether a picture can be read from a file of this name."""
    stem, suffix = os.path.splitext(name)
    return suffix.lower() in picture_suffixes() and not stem.endswith(MASKS)


def is_shard(name: str) -> bool:
    """Whether a file of this name, or a URL, is a tar shard."""
    return name.lower().endswith(SHARD_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a name with / is, or lies in, what file managers hide."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in parts)


# --- many names -----------------------------------------------------------------------------------


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder below a folder, as the prefix of its files' names, and its files; not what is hidden.

    Names are relative, with /. Links are followed, but not in circles.
    """
    visited = set()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in visited else sorted(name for name in folders if not is_hidden(name))
        if real not in visited:
            prefix = Path(parent).relative_to(folder).as_posix() + "/"
            yield prefix.removeprefix("./"), sorted(files)
        visited.add(real)


def _raise(error: OSError) -> None:
    raise error


def sort_out(files: Sequence[str]) -> Beside:
    """Tell a folder's pictures, captions and the rest apart; a.txt and a.jpg.txt belong to a.jpg."""
    visible = [name for name in files if not is_hidden(name)]
    pictures = [name for name in visible if is_picture(name)]
    stems = {os.path.splitext(name)[0] for name in pictures}
    of_stem: dict[str, list[str]] = {}
    for name in visible:
        if suffix_of(name) in CAPTION_SUFFIXES:
            of_stem.setdefault(fold(os.path.splitext(name)[0]), []).append(name)
    captions = {name: _captions_of(name, of_stem, stems) for name in pictures}
    used = {*pictures, *(name for names in captions.values() for name in names)}
    listings = tuple(name for name in visible if name.lower() in LISTINGS)
    used.update(listings)
    return Beside(captions, listings, tally(name for name in files if name not in used))


def _captions_of(picture: str, of_stem: Mapping[str, list[str]], stems: set[str]) -> tuple[str, ...]:
    own = os.path.splitext(picture)[0]
    found = []
    for wanted in (own, picture):
        for name in of_stem.get(fold(wanted), ()):
            stem, suffix = os.path.splitext(name)
            if stem == wanted or stem not in stems:  # else it belongs to a picture of just that name
                found.append((stem != wanted, CAPTION_SUFFIXES.index(suffix.lower()), name))
    return tuple(name for *_, name in sorted(found))


def tally(files: Iterable[str]) -> Counter[str]:
    """How many files there are of each suffix, hidden ones by themselves."""
    return Counter(HIDDEN if is_hidden(name) else suffix_of(name) for name in files)


def counted(counts: Mapping[str, int]) -> str:
    """Counts of files by suffix as text, most first: 3 .heic, 1 hidden."""
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{number} {kind or 'without a suffix'}" for kind, number in by_count[:MOST_KINDS]]
    rest = sum(number for _, number in by_count[MOST_KINDS:])
    return ", ".join(named + ([f"{rest} others"] if rest else []))
