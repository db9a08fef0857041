"""What tests of codes ask of a store and of a command's events."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from registry.manifests import Code, File, Generator
from registry.store import Store
from tests.cli.conftest import Ran
from tests.icmlora.tiny_base import LABEL


def codes(store: Path) -> dict[str, Code]:
    """Return the codes of the generator in use."""
    generator = current(store)
    with Store.open(store) as opened:
        found = {task.name: task.code_under(generator) for task in opened.tasks()}
    return {name: code for name, code in found.items() if code is not None}


def current(store: Path) -> Generator:
    with Store.open(store, read_only=True) as opened:
        generator = opened.generator(LABEL)
    assert generator is not None
    return generator


def make_another_current(store: Path, data: bytes = b"another one", label: str = LABEL) -> None:
    """Make another generator current, as `icm import` does."""
    with Store.open(store) as opened:
        blob = File(opened.blobs.put(data), len(data))
        present = opened.generator(label)
        new = Generator(base_model=label, blob=blob, config={}, metrics={})
        if present is not None:
            new = replace(new, version=present.version + 1, manifest=present.manifest, seq=present.seq)
        opened.publish([new])


def tasks_of(ran: Ran) -> dict[str, dict[str, Any]]:
    return {event["task"]: event for event in ran.events if event["type"] == "task"}


def damage(store: Path, digest: str) -> None:
    """Change a byte in the middle of a blob."""
    path = store / "blobs" / digest[0] / digest
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
