"""What tests of codes ask of a store and of a command's events."""

from pathlib import Path
from typing import Any

from registry.records import CodeRecord
from registry.store import Store
from tests.cli.conftest import Ran
from tests.icmlora.tiny_base import LABEL


def codes(store: Path) -> dict[str, CodeRecord]:
    with Store.open(store) as opened:
        generator = opened.generators.current(LABEL)
        assert generator is not None
        return {code.task: code for code in opened.codes.all(generator.id)}


def tasks_of(ran: Ran) -> dict[str, dict[str, Any]]:
    return {event["task"]: event for event in ran.events if event["type"] == "task"}


def damage(store: Path, digest: str) -> None:
    """Change a byte in the middle of a blob."""
    path = store / "blobs" / digest[0] / digest
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
