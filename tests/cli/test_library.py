"""`icm X` and `fleet.x()` with the same arguments leave the same bytes and states."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.app import run
from icmlora import Fleet
from registry.encoding import unpacked
from registry.store import Store
from tests.cli.fleet import write_adapter
from tests.icmlora.fleet.stores import files_of
from tests.icmlora.tiny_base import LABEL

Call = Callable[[Fleet, Path], object]
"""What is done with a fleet, beside a folder of its own."""

# The first word is the command. FOLDER is the folder of its own, where `new` is an adapter.
CASES: list[tuple[str, Call]] = [
    (
        "ingest FOLDER/new --name dogs --no-vectors",
        lambda f, at: f.ingest([at / "new"], name="dogs", vectors=False),
    ),
    (
        "vectors poems --again --device cpu",
        lambda f, at: f.extract_vectors(["poems"], again=True, device="cpu"),
    ),
    ("encode --max-error 0.5 --device cpu", lambda f, at: f.encode(max_error=0.5, device="cpu")),
    (
        "encode poems --max-error 0.1 --device cpu",
        lambda f, at: f.encode(["poems"], max_error=0.1, device="cpu"),
    ),
    ("eval poems --device cpu", lambda f, at: f.evaluate(["poems"], device="cpu")),
    ("evict poems --max-error 2 --device cpu", lambda f, at: f.evict(["poems"], max_error=2, device="cpu")),
    (
        "materialize poems -o FOLDER/out --source code",
        lambda f, at: f.materialize("poems", at / "out", source="code"),
    ),
    (
        "edit poems --name verses --tag prod --pin",
        lambda f, at: f.edit(["poems"], name="verses", add_tags=["prod"], pinned=True),
    ),
    ("rm rules --yes", lambda f, at: f.remove(["rules"])),
    ("prune --older-than 0s --yes", lambda f, at: f.prune(grace=0)),
    ("base alias NAME other/name", lambda f, at: f.alias_base_model(LABEL, ["other/name"])),
    ("base rm NAME", lambda f, at: f.forget_base_model(LABEL)),
    ("export FOLDER/fleet.icm", lambda f, at: f.export_bundle(at / "fleet.icm")),
    ("report -o FOLDER/page.html", lambda f, at: f.report(at / "page.html")),
]


def states(store: Path) -> list[object]:
    """Return what all refs and their history describe, without times and the digests that depend on them."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            dropped = {"seq", "parent"}
            return {key: timeless(one) for key, one in value.items() if key not in dropped and not key.endswith("_at")}
        return list(map(timeless, value)) if isinstance(value, list) else value

    with Store.open(store) as opened:
        digests = [str(row["manifest"]) for row in opened.refs()]
        versions = [str(task.manifest) for name in opened.names() for task in opened.history(name)]
        return [timeless(unpacked(opened.manifests.read(digest))) for digest in (*digests, *versions)]


def beside(folder: Path) -> Path:
    """Make the folder that a command reads and writes."""
    write_adapter(folder / "new", seed=5)
    return folder


@pytest.mark.parametrize(("words", "call"), CASES, ids=[words.partition(" -")[0] for words, _ in CASES])
def test_a_command_leaves_what_the_method_leaves(trained: Path, tmp_path: Path, words: str, call: Call) -> None:
    mine = Path(shutil.copytree(trained, tmp_path / "mine"))
    at, there = beside(tmp_path / "a" / "work"), beside(tmp_path / "b" / "work")
    arguments = [word.replace("FOLDER", str(at)).replace("NAME", LABEL) for word in words.split()]
    assert run(["--store", str(trained), "-q", *arguments]) == 0
    call(Fleet(mine), there)
    assert files_of(at) == files_of(there)
    assert {file.name for file in (trained / "blobs").rglob("*")} == {file.name for file in (mine / "blobs").rglob("*")}
    assert str(states(trained)).replace(str(at), str(there)) == str(states(mine))
