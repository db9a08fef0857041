"""`icm log`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from registry.manifests import Code, File
from registry.store import Store
from tests.cli.conftest import Ran, modules_of

Icm = Callable[..., Ran]


@pytest.fixture
def versions(stored: Path, tmp_path: Path) -> Store:
    """A store in which `rust` has two versions: the first is evicted, and has a code."""
    with Store.open(tmp_path / "store") as store:
        first = store.task("rust")
        code = Code(blob=File(store.blobs.put(b"code"), 4), generator=File("a" * 64, 9))
        gone = replace(first.final, evicted_at="2026-01-02T03:04:05Z")
        (first,) = store.publish([replace(first, final=gone, code=code)])
        final = replace(store.task("sql").final, source="loras/rust-2")
        new = replace(first, version=2, final=final, checkpoints=(), code=None, samples=None, eval_data=None)
        store.publish([replace(new, aliases={"prod": 1, "next": 2})])
    return store


def test_versions_are_listed_newest_first_with_what_is_kept(icm: Icm, versions: Store) -> None:
    lines = [line.split() for line in icm("log", "RUST").out.splitlines()]
    assert lines[0] == ["VERSION", "DATE", "SOURCE", "ORIGINAL", "STORED", "KEPT", "ALIASES"]
    assert (lines[1][0], lines[1][2], lines[1][-2:]) == ("2", "loras/rust-2", ["original", "next"])
    assert (lines[2][0], lines[2][-4:]) == ("1", ["code,", "2", "checkpoints", "prod"])
    assert icm("log", "rust", "-q").out == "rust@2\nrust@1\n"


def test_json_has_the_bytes(icm: Icm, versions: Store) -> None:
    second, first = icm("log", "rust", "--json").document
    assert (second["version"], second["code_size"], second["checkpoints_count"]) == (2, None, 0)
    assert (first["version"], first["code_size"], first["checkpoints_count"]) == (1, 4, 2)
    with Store.open(versions.address) as store:
        task = store.task("rust@1")
        weights = [one.weights.size for one in task.checkpoints]
        assert task.samples is not None
        assert task.eval_data is not None
        texts = task.samples.size + task.eval_data.size
    cards = sum({one.card: one.card.size for one in task.adapters if one.card is not None}.values())
    configs = sum({one.config: one.config.size for one in task.adapters}.values())
    assert first["stored_size"] == sum(weights) + texts + cards + configs + 4
    assert first["original_size"] == task.final.original_bytes
    assert (first["evicted_at"], second["evicted_at"]) == ("2026-01-02T03:04:05Z", None)
    assert (first["aliases"], second["aliases"]) == (["prod"], ["next"])


def test_a_task_that_does_not_exist_is_refused(icm: Icm, stored: Path) -> None:
    ran = icm("log", "rusty", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "task_not_found")


@pytest.mark.slow
def test_it_imports_neither_torch_nor_numpy(stored: Path) -> None:
    assert not {"torch", "numpy"} & modules_of("log", "rust")
