"""docs/reference/json.md and what the commands print name the same keys."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran
from tests.cli.fleet import write_broken, write_texts
from tests.cli.tiny_fleet import write_subject
from tests.docs.pages import ROOT, cells_of, codes_in, section_of

Icm = Callable[..., Ran]
PAGE = ROOT / "docs" / "reference" / "json.md"
COMMANDS = {
    "ls": ("ls",),
    "ls --from": ("ls", "--from", "fleet.icm"),
    "show": ("show", "poems"),
    "log": ("log", "poems"),
    "map": ("map",),
    "duplicates": ("duplicates",),
    "report": ("report", "-o", "fleet.html", "--outputs", "poems", "--outputs", "silent", "--device", "cpu"),
    "stats": ("stats",),
    "materialize": ("materialize", "poems", "--source", "code", "-o", "adapter"),
    "recognize": ("recognize", "--samples", "geese.jsonl", "--device", "cpu"),
    "generate": ("generate", "geese", "--samples", "geese.jsonl", "-o", "adapter", "--device", "cpu"),
    "export": ("export", "new.icm"),
    "import": ("import", "fleet.icm"),
    "copy": ("copy", "store", "other"),
    "base ls": ("base", "ls"),
    "generators": ("generators",),
    "generators rollback": ("generators", "rollback", "FIRST"),
    "verify": ("verify",),
    "prune": ("prune", "--dry-run"),
    "rm": ("rm", "poems", "--dry-run"),
    "ls --tags": ("ls", "--tags"),
    "edit": ("edit", "poems", "--note", "short lines"),
    "doctor": ("doctor",),
    "doctor --path": ("doctor", "--path", "store"),
    "convert --list-formats": ("convert", "--list-formats"),
    "serve --print-config": ("serve", "--print-config", "sglang"),
}


def paths_in(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of a JSON value, with `[]` for the entries of a list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{prefix}.{key}" if prefix else key
            yield path
            yield from paths_in(inner, path)
    elif isinstance(value, list):
        for inner in value:
            yield from paths_in(inner, f"{prefix}[]")


def stem(path: str) -> str:
    """Return the part of a path that has to be documented: its first key."""
    found = re.match(r"(\[\]\.)?\w+", path)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_documents_keys_are_those_on_the_page(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in ("show", "map", "duplicates", "recognize", "generate"):
        for subject in ("apples", "ships"):
            icm("ingest", write_subject(tmp_path / subject), "--device", "cpu")
    if name == "show":
        icm("eval", "poems", "--device", "cpu")
    if name in ("recognize", "generate"):
        write_texts(tmp_path, "geese.jsonl")
    if name == "generate":
        icm("train", "--few-shot", "--episodes", "1", "--device", "cpu")
    if name in ("ls --from", "import"):
        icm("export", "fleet.icm")
    if name == "ls --tags":
        icm("edit", "poems", "--tag", "prod")
    first = icm("generators", "-q").out.split()[0]
    words = [first if word == "FIRST" else word for word in COMMANDS[name]]
    printed = set(paths_in(icm(*words, "--json").document))
    documented = {path for row in cells_of(section_of(PAGE, f"icm {name}")) for path in codes_in(row[0])}
    assert documented <= printed
    assert {stem(path) for path in printed} == {stem(path) for path in documented}


@pytest.fixture(scope="module")
def documented() -> dict[tuple[str, str], set[str]]:
    """Command and type of each event on the page -> its keys."""
    found: dict[tuple[str, str], set[str]] = {}
    for name, keys in cells_of(section_of(PAGE, "Events")):
        words = codes_in(name)
        for command, kind in zip(words[::2], words[1::2], strict=True):
            found[command, kind] = set(codes_in(keys))
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("ingest", "loras"),
        ("vectors", "--again"),
        ("train", "--steps", "10", "--fresh", "--refine", "2"),
        ("train", "--update"),
        ("train", "--few-shot", "--episodes", "1"),
        ("eval", "poems"),
        ("encode", "--max-error", "0.32"),
        ("evict", "--max-error", "0.7"),
    ],
    ids=" ".join,
)
def test_an_events_keys_are_those_on_the_page(
    icm: Icm,
    trained: Path,
    mixed_template: Path,
    documented: dict[tuple[str, str], set[str]],
    arguments: tuple[str, ...],
) -> None:
    words = [mixed_template / "loras" if word == "loras" else word for word in arguments]
    command = f"icm {arguments[0]}"
    for event in icm(*words, "--device", "cpu", "--json").events:
        keys = documented[command, event["type"]]
        if "icm eval" in keys:  # "as for"
            keys = documented["icm eval", event["type"]]
        assert set(event) - {"type"} <= keys, event["type"]


@pytest.mark.parametrize(
    "commands",
    [
        [("evict", "rules", "--max-error", "0.7", "--placeholder"), ("ingest",), ("restore",)],
        [("evict", "--placeholder", "--keep-originals"), ("restore", "--dry-run")],
    ],
    ids=len,
)
def test_the_keys_of_placeholders_are_those_on_the_page(
    icm: Icm,
    own_loras: Path,
    documented: dict[tuple[str, str], set[str]],
    commands: list[tuple[str, ...]],
) -> None:
    kinds = set()
    for name, *others in commands:
        folder = [] if name == "evict" else [own_loras]
        for event in icm(name, *folder, *others, "--json").events:
            kinds.add((name, event["type"]))
            printed = set(event).union(*event.get("folders", [])) - {"type"}
            assert printed <= documented[f"icm {name}", event["type"]]
    assert kinds >= {("evict", "task"), ("restore", "adapter"), ("restore", "summary")}


def test_the_keys_of_conversions_are_those_on_the_page(
    icm: Icm, mixed_template: Path, tmp_path: Path, documented: dict[tuple[str, str], set[str]]
) -> None:
    shutil.copytree(mixed_template / "loras", tmp_path / "loras")
    write_broken(tmp_path / "loras" / "broken")
    events = icm("convert", tmp_path / "loras", tmp_path / "out", "--rank", "1", "--json").events
    assert {event["type"] for event in events} == {"adapter", "failed", "summary"}
    for event in events:
        assert set(event) - {"type"} == documented["icm convert", event["type"]] - {"null"}
