"""Hashes of weight files: each file is read once, and a cache that is damaged or locked breaks nothing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from core.paths import user_cache
from core.weights import hashes
from core.weights.hashes import KNOWN_FILE, file_sha256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ultrapixel" / KNOWN_FILE


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "w"
    path.write_bytes(b"one")
    return path


def in_another_process() -> None:
    hashes._sha256.cache_clear()


def never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes.hashlib, "sha256", lambda: pytest.fail("the file was read again"))


ONE, TWO = (hashlib.sha256(content).hexdigest() for content in (b"one", b"two"))


def test_a_file_is_read_once(weights: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file_sha256(weights) == ONE
    never_read(monkeypatch)
    assert file_sha256(str(weights)) == ONE
    in_another_process()
    assert file_sha256(weights) == ONE
    assert user_cache() == cache.parent and [path.name for path in cache.parent.iterdir()] == [KNOWN_FILE]


def test_a_file_that_changed_is_read_again(weights: Path) -> None:
    file_sha256(weights)
    weights.write_bytes(b"two")
    os.utime(weights, ns=(1, 1))
    assert file_sha256(weights) == TWO


def test_a_file_of_the_same_size_and_time_is_read_again(weights: Path) -> None:
    before = weights.stat().st_mtime_ns
    file_sha256(weights)
    weights.write_bytes(b"two")
    os.utime(weights, ns=(before, before))  # as archives do
    assert file_sha256(weights) == TWO


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[[[", '{"w": 3}', '{"w": [1, 2]}', '{"w": [1, 2, 3]}', "\0", "null"]
)
def test_a_damaged_cache_is_written_anew(weights: Path, cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace("w", str(weights)))
    in_another_process()
    assert file_sha256(weights) == ONE
    assert json.loads(cache.read_text())[str(weights.resolve())][-1] == ONE


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_written_breaks_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    in_another_process()
    assert file_sha256(weights) == ONE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "w"]


def test_files_that_are_gone_are_forgotten(weights: Path, tmp_path: Path, cache: Path) -> None:
    file_sha256(weights)
    weights.rename(tmp_path / "other")
    file_sha256(tmp_path / "other")
    assert list(json.loads(cache.read_text())) == [str((tmp_path / "other").resolve())]


def test_a_file_that_is_written_meanwhile_is_not_remembered(
    weights: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = iter([(3, 1), (3, 2)])
    monkeypatch.setattr(hashes, "_stamp", lambda _: next(stamps))
    assert file_sha256(weights) == ONE and not cache.exists()
