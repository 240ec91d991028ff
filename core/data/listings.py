"""metadata.jsonl and metadata.csv: captions by the pictures' names, as Windows and Macs write them too."""

from __future__ import annotations

import csv
import io
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from core.data.captions import CAPTION_KEYS, parse_object, text_of
from core.data.files import Broken, fold

DELIMITERS = ",;\t"
FILE_NAME = "file_name"

Entry = tuple[str, dict[str, Any]]  # what messages call a row, and the row


def read_listings(
    folder: Path, listings: Iterable[str], pictures: Iterable[str]
) -> tuple[dict[str, list[Entry]], list[Broken]]:
    """The rows by picture of all listings, and those that belong to none or give a second caption."""
    entries: dict[str, list[Entry]] = {}
    broken, names = [], _Names(folder, pictures)
    for listing in sorted(listings):
        for where, row in _rows(listing, (folder / listing).read_bytes()):
            try:
                if isinstance(row, ValueError):
                    raise row
                picture = names.find(posixpath.dirname(listing), _file_name(row))
                _add(entries.setdefault(picture, []), where, row)
            except ValueError as error:
                broken.append(Broken(where, str(error)))
    return entries, broken


def _add(rows: list[Entry], where: str, row: dict[str, Any]) -> None:
    for earlier, other in rows:
        if any(row.get(key) != other.get(key) for key in CAPTION_KEYS):
            raise ValueError(f"{row[FILE_NAME]} has another caption in {earlier}")
    rows.append((where, row))


def _file_name(row: dict[str, Any]) -> str:
    if not isinstance(name := row.get(FILE_NAME), str) or not name.strip():
        raise ValueError(f"the line has no {FILE_NAME}")
    return name


# --- rows -----------------------------------------------------------------------------------------


def _rows(listing: str, content: bytes) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """The rows of a listing, or what is wrong with them, each with its place."""
    try:
        text = text_of(content)
    except ValueError as error:
        yield listing, error
        return
    yield from (_csv_rows if listing.lower().endswith(".csv") else _json_rows)(listing, text)


def _json_rows(listing: str, text: str) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            yield f"{listing}:{number}", parse_object(line)
        except ValueError as error:
            yield f"{listing}:{number}", error


def _csv_rows(listing: str, text: str) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    try:
        for delimiter in DELIMITERS:
            reader = csv.DictReader(
                io.StringIO(text, newline=""), delimiter=delimiter, restkey="", skipinitialspace=True
            )
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if FILE_NAME in reader.fieldnames:
                yield from ((f"{listing}:{reader.line_num}", row) for row in reader)
                return
        yield f"{listing}:1", ValueError(f"its first line names no column {FILE_NAME}")
    except csv.Error as error:
        yield listing, ValueError(f"the table cannot be read ({error})")


# --- names ----------------------------------------------------------------------------------------


class _Names:
    """The pictures of a folder, to be found by names that other systems gave them."""

    def __init__(self, folder: Path, pictures: Iterable[str]) -> None:
        self._folder, self._pictures = folder, set(pictures)
        self._folded: dict[str, list[str]] = {}
        for picture in self._pictures:
            self._folded.setdefault(fold(picture), []).append(picture)

    def find(self, parent: str, name: str) -> str:
        """The picture that a listing in folder `parent` means; ValueError if that is none, or several."""
        for place in self._places(parent, name):
            if place in self._pictures:
                return place
            if alike := self._folded.get(fold(place)):
                return _one_of(alike, place)
        place = posixpath.join(parent, name)
        exists = (self._folder / place).is_file()
        raise ValueError(f"{place} is no picture" if exists else f"{place} does not exist")

    def _places(self, parent: str, name: str) -> Iterator[str]:
        """Where the picture may be, relative to the folder, the likeliest first."""
        slashed = name.strip().replace("\\", "/").removeprefix("file://")
        for path in dict.fromkeys((name, slashed, unquote(slashed))):
            if re.match("/|[A-Za-z]:/", path):
                yield from self._inside(parent, path)
            else:
                yield posixpath.normpath(posixpath.join(parent, path))
                yield posixpath.normpath(path)

    def _inside(self, parent: str, path: str) -> Iterator[str]:
        """An absolute path as it would be here: the folder may have moved since."""
        for root in (self._folder.absolute(), self._folder.resolve()):
            if path.startswith(f"{root.as_posix()}/"):
                yield posixpath.normpath(path.removeprefix(f"{root.as_posix()}/"))
        parts = path.split("/")
        for start in range(1, len(parts)):
            tail = posixpath.join(*parts[start:])
            yield tail
            yield posixpath.join(parent, tail)


def _one_of(alike: list[str], wanted: str) -> str:
    """The one of several names that has the wanted letters; ValueError if that is not one."""
    same = [name for name in alike if _composed(name) == _composed(wanted)]
    if len(same or alike) > 1:
        raise ValueError(f"{wanted} may be {' or '.join(sorted(same or alike))}")
    return (same or alike)[0]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
