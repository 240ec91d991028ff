"""The documentation names only what exists: links, files, imports, error messages, configuration keys."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import make_keys  # noqa: E402

PAGES = sorted([ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("models", "benchmarks")),
                *(ROOT / "docs").glob("*.md")])  # fmt: skip
README_LINES = 150
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"[\w./*-]+")
MADE_BY_RUNS = {"outputs", "runs"}
SOURCES = ("core", "train", "inference", "models")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|<|\{|…")  # FOLDER, <control>, {000..099}


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's code blocks of a language."""
    return [content for name, content in FENCE.findall(page.read_text("utf-8")) if name == language]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


# --- links ----------------------------------------------------------------------------------------


@cache
def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


# --- files ----------------------------------------------------------------------------------------


@cache
def published() -> frozenset[str]:
    """The paths of published weights, and their folders."""
    listed = (ROOT / "models/models_checklist.txt").read_text("utf-8")
    names = re.findall(r"models/[\w./-]+\w", listed)
    return frozenset(str(path) for name in names for path in (Path(name), *Path(name).parents))


def named_paths(page: Path) -> Iterator[str]:
    """What looks like a path of the repository, in code blocks and between backticks."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - MADE_BY_RUNS
    texts = re.findall(r"`([^`\n]+)`", prose(page)) + blocks(page, "sh") + blocks(page, "slurm")
    for word in " ".join(texts).replace("=", " ").split():
        name = NAME.match(word.strip("\"'(,"))
        if name and "/" in name[0] and name[0].split("/")[0] in folders and not PLACEHOLDER.search(word):
            yield name[0].rstrip(".,/")


@pages
def test_named_files_exist(page: Path) -> None:
    for name in named_paths(page):
        assert name in published() or any(ROOT.glob(name)), f"{page.name} names {name}, which does not exist"


# --- what is said ---------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


def test_the_page_of_keys_is_that_of_the_dataclasses() -> None:
    assert make_keys.PAGE.read_text("utf-8") == make_keys.page(), "run python docs/make_keys.py"


def test_the_page_of_keys_leaves_no_configuration_out() -> None:
    module = sys.modules[make_keys.RunConfig.__module__]
    listed = {cls for cls, _, _ in make_keys.SECTIONS} | set(make_keys.nested())
    own = {
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and hasattr(thing, "__dataclass_fields__")
    }
    assert {thing for thing in own if thing.__module__ == module.__name__} <= listed


@dataclass(frozen=True)
class Example:
    # a comment above, which is long,
    # has two lines
    above: str | None = None
    behind: tuple[int, ...] = (1, 2)  # a comment behind
    rows: int | tuple[tuple[str, tuple[float, ...]], ...] | None = None  # a list of lists


@dataclass(frozen=True)
class Silent:
    key: int = 1


def test_keys_take_their_meaning_from_comments() -> None:
    above, behind, _ = make_keys.keys(Example)
    assert (above.type, above.default, above.meaning) == (
        "text",
        "none",
        "a comment above, which is long, has two lines",
    )
    assert (behind.default, behind.meaning) == ("`[1, 2]`", "a comment behind")


def test_a_list_is_shown_by_an_example() -> None:
    _, behind, rows = make_keys.keys(Example)
    assert behind.type == "a list: `[8, …]`"
    assert rows.type == "a whole number, or a list: `[[text, [0.5, …]], …]`"


def test_a_key_without_a_comment_is_an_error() -> None:
    with pytest.raises(ValueError, match="Silent.key has no comment"):
        make_keys.keys(Silent)


@pages
def test_python_blocks_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_quoted_messages_are_in_the_code() -> None:
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    section = (ROOT / "docs/troubleshooting.md").read_text("utf-8").split("## Questions")[0]
    quoted = [
        message
        for heading in re.findall(r"^### (.+)$", section, re.M)
        for message in heading.split("`")[1::2]
    ]
    assert quoted
    for message in quoted:
        assert any(message in text for text in texts), message


@pages
def test_commands_name_python_alone(page: Path) -> None:
    assert ".venv/bin/python" not in page.read_text("utf-8")
