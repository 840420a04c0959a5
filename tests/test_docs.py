"""The documentation says what is there: links, modules, flags and versions."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import moespan
from moespan.cli import _parser
from moespan.front.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(moespan.__file__).parent
FOLDERS = (".github", "benchmarks", "docs", "examples", "models", "tests", "tools")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/**/*.md"))]
)

OTHER_PROGRAMS = {
    # docker
    *("--net", "--shm-size", "--ulimit", "--cap-add", "--cpus"),
    # numactl, pip, torchrun
    *("--cpunodebind", "--membind", "--nproc-per-node", "--no-deps"),
}
"""Flags that the pages name and that belong to no program of this project."""

OTHER_FILES = {"", "OUT", "results", "build"}
"""First folders of files that the pages name and that are not of this repository."""

FENCE = re.compile(r"^( *)(```|~~~)(\w*)[^\n]*\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+(?:\([^()\s]*\))?)\)")
CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])(--[a-z][\w-]*|-(?:tp|ep|pp|sp|dp|n)(?![\w-]))")
MODULE = re.compile(r"[\w/]+\.(?:py|h|cpp|sh|json)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text_of(page))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.*?) *$", prose_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (unique := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(unique)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path):
    broken = []
    for target in LINK.findall(prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        is_page = file.suffix == ".md" and file.is_file()
        if not file.exists() or (anchor and not (is_page and anchor in anchors(file))):
            broken.append(target)
    assert not broken


def test_the_architecture_names_every_module():
    modules = {
        str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if path.stem[0] != "_"
    }
    page = ROOT / "docs" / "architecture.md"
    rows = re.findall(r"^\| `([\w/.]+)` \|", prose_of(page), re.MULTILINE)
    assert len(rows) == len(set(rows)), "a file has one row"
    assert not modules - set(rows)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_file_that_is_named_exists(page: Path):
    """Names with a folder, in code, are of files below the root, the package or the page."""
    if page.name == "CHANGELOG.md":  # it names what has gone
        return
    spans = [span.strip() for _, span in CODE.findall(prose_of(page))]
    named = {span for span in spans if MODULE.fullmatch(span) and "/" in span.strip("/")}
    bases = (ROOT, SOURCE, SOURCE.parent, page.parent)
    missing = [name for name in named if not any((base / name).exists() for base in bases)]
    assert not [name for name in missing if name.partition("/")[0] not in OTHER_FILES]


# Flags.


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


@cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (
        action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(subparsers.choices)


@cache
def verbs() -> dict[str, set[str]]:
    """The flags of every verb."""
    return {name: flags_of(parser) for name, parser in parsers().items()}


def sections(page: Path) -> dict[str, str]:
    """The text under every heading of a page, by the heading's anchor."""
    parts = re.split(r"^#{1,6} +(.*?) *$", prose_of(page), flags=re.MULTILINE)
    titles = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in parts[1::2]]
    return dict(zip(titles, parts[2::2], strict=True))


def flags_in_rows(text: str) -> set[str]:
    """Flags in the first column of tables."""
    cells = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return {flag for cell in cells for flag in re.findall(r"`(--?[a-z][\w-]*)", cell)}


@pytest.mark.parametrize("verb", verbs())
def test_the_reference_describes_exactly_the_flags_of_a_verb(verb: str):
    parts = sections(ROOT / "docs" / "cli.md")
    shared = re.findall(r"\(#([\w-]+)\)", parts[verb].split("\n\n")[1])
    documented = flags_in_rows(parts[verb])
    for name in shared:
        documented |= flags_in_rows(parts[name])
    everywhere = flags_of(_parser())
    assert documented >= verbs()[verb]
    assert documented <= verbs()[verb] | everywhere


def default_of(action: argparse.Action) -> Any:
    """The default of a flag, which may be that of the field of `Settings` that it sets."""
    field = Settings.__dataclass_fields__.get(action.dest)
    return field.default if field and action.default == argparse.SUPPRESS else action.default


@pytest.mark.parametrize("verb", verbs())
def test_the_reference_gives_the_defaults(verb: str):
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", text_of(ROOT / "docs" / "cli.md"), re.MULTILINE)
    written: dict[str, str] = {}
    defaults: dict[str, str] = {}
    for action in parsers()[verb]._actions:
        cells = [
            cell
            for names, cell in rows
            for flag in action.option_strings[:1]
            if f"`{flag}`" in names
        ]
        written[action.dest] = written.get(action.dest, "") + " ".join(cells)
        default = default_of(action)
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        if isinstance(default, int | float | str) and not isinstance(default, bool):
            defaults[action.dest] = str(default).removesuffix(".0")
    del defaults["help"]
    wrong = [
        name
        for name, default in defaults.items()
        if not re.search(rf"\b{re.escape(default)}\b", written[name])
    ]
    assert not wrong


def commands(text: str) -> Iterator[list[str]]:
    """Commands of moespan in blocks of code, as words that begin with the verb."""
    for _, _, _, block in FENCE.findall(text):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            try:
                words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            except ValueError:
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words[:1] == ["moespan"]:
                yield words[1:]
            elif words[:3] == ["python", "-m", "moespan"]:
                yield words[3:]
            elif words[:2] == ["bash", "tools/ascend_sim/run.sh"]:
                yield words[2:]
            elif words[:2] == ["bash", "run.sh"]:
                yield words[2:] if words[2:3] == ["serve"] else ["generate", *words[2:]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_use_flags_that_their_verb_has(page: Path):
    wrong = []
    for words in commands(text_of(page)):
        if words[:1] and words[0] in verbs():
            given = {word.partition("=")[0] for word in words if FLAG.fullmatch(word)}
            wrong += sorted(given - verbs()[words[0]])
    assert not wrong


@cache
def flags_of_scripts() -> set[str]:
    """Flags that the scripts and tools of this repository declare."""
    scripts = [*ROOT.glob("benchmarks/*"), *ROOT.glob("tools/*/*"), *ROOT.glob("*.sh")]
    texts = [text_of(path) for path in scripts if path.suffix in (".py", ".sh")]
    return {flag for text in texts for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", text)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_flag_that_is_named_exists(page: Path):
    known = set().union(*verbs().values(), flags_of(_parser()), flags_of_scripts(), OTHER_PROGRAMS)
    spans = [span for _, span in CODE.findall(prose_of(page))]
    named = {flag for span in spans for flag in FLAG.findall(span)}
    assert not named - known


# Versions and the changelog.


def test_pre_commit_runs_the_versions_that_the_tests_run():
    """Its hooks run what the extra `dev` installs, so the versions are written once."""
    hooks = text_of(ROOT / ".pre-commit-config.yaml")
    pinned = re.findall(r'"(ruff|mypy)==([\d.]+)"', text_of(ROOT / "pyproject.toml"))
    assert {tool for tool, _ in pinned} == {"ruff", "mypy"}
    written = set(re.findall(r"(ruff|mypy)==([\d.]+)", hooks))
    assert written == set(pinned)


def test_the_changelog_has_the_version_and_known_kinds():
    text = text_of(ROOT / "CHANGELOG.md")
    versions = re.findall(r"^## \[([\d.]+)\]", text, re.MULTILINE)
    assert versions == sorted(versions, key=_as_numbers, reverse=True)
    assert moespan.__version__ in versions
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def _as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_what_people_fill_in_asks_for_what_is_needed():
    bug: Any = text_of(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml")
    assert "moespan doctor" in bug and "--json" in bug and "layout" in bug.lower()
