"""The commands take locks as the scripts do for which it is shown that nobody waits in a circle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import EPISODES, STEPS, write_lora
from tests.icmlora.tiny_base import LABEL
from tests.registry.lock_scripts import SCRIPTS, Call, Holder, recording

Icm = Callable[..., Ran]
TRAIN = ("train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS)
COMMANDS = (
    ("ls",),
    ("edit", "poems", "--tag", "x"),
    ("verify", "--read-data"),
    ("verify", "--repair"),
    ("materialize", "poems", "-o", "out"),
    ("export", "fleet.icm"),
    ("vectors", "--device", "cpu"),
    ("ingest", "late", "--no-vectors"),
    (*TRAIN, "--update"),
    (*TRAIN, "--fresh"),
    ("train", "--few-shot", "--episodes", EPISODES, "--device", "cpu"),
    ("generators", "rollback", "FIRST"),
    ("encode", "poems", "--max-error", "0.1"),
    ("evict", "poems", "--max-error", "0.7"),
    ("base", "alias", LABEL, "another/name"),
    ("base", "alias", LABEL, "another/name", "--remove"),
    ("rm", "late", "--yes"),
    ("prune", "--yes", "--older-than", "0s"),
)


def sessions(calls: Sequence[Call]) -> list[tuple[Call, ...]]:
    """Split calls where the store is closed: a command may open it several times."""
    found: list[list[Call]] = [[]]
    for call in calls:
        if call == ("store", "close"):
            found.append([])
        else:
            found[-1].append(call)
    return [tuple(session) for session in found if session]


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[tuple[Call, ...]]:
    """What the scripts do."""
    done: set[tuple[Call, ...]] = set()
    for script in SCRIPTS:
        with recording(monkeypatch) as calls:
            holder = Holder(tmp_path, script.__name__)
            script(holder)
            holder.store.close()
        done.update(sessions(calls))
    return done


def test_every_command_does_what_a_script_does(
    icm: Icm, started: Path, known: set[tuple[Call, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path / "late", seed=9)
    for words in COMMANDS:
        digests = [row["generator"] for row in icm("generators", "--json").document]
        places = {"FIRST": digests[0]}
        with recording(monkeypatch) as calls:
            ran = icm(*(places.get(str(word), word) for word in words))
        assert ran.code == 0, (words, ran.err)
        assert {*sessions(calls)} <= known, words
