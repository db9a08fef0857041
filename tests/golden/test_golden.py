"""Stores and bundles that earlier versions wrote are opened, moved forward, and give the same adapters.

Schema 7 is from before the first release: its store is refused, its bundle opens.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icm_cli.errors import ExitCode
from registry.storage.database import FIRST_SCHEMA, newest
from tests.cli.conftest import Ran
from tests.golden.build import HERE, TASKS

Icm = Callable[..., Ran]
VERSIONS = sorted((folder.name for folder in HERE.glob("schema-*")), key=lambda name: int(name.split("-")[1]))
BEFORE_THE_FIRST = f"schema-{FIRST_SCHEMA - 1}"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=[name for name in VERSIONS if name != BEFORE_THE_FIRST])
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What a version wrote; its store is a copy at the default place."""
    return unpacked(str(request.param), tmp_path)


def unpacked(version: str, tmp_path: Path) -> Path:
    folder = HERE / version
    with tarfile.open(folder / "store.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return folder


def check(found: Path, expected: Path, *, exact: bool) -> None:
    """Compare two folders of an adapter; other processors decode a code to weights that differ by rounding."""
    for name in {path.name for path in expected.iterdir()} - ({"README.md"} if exact else {"README.md", WEIGHTS}):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    made, known = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    assert made.keys() == known.keys()
    for name, tensor in known.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_store_of_an_earlier_version_is_whole_and_gives_the_same_adapters(
    icm: Icm, golden: Path, tmp_path: Path
) -> None:
    assert icm("verify", "--read-data").code == 0
    for task, source in TASKS.items():
        assert icm("materialize", task, "--source", source, "-o", tmp_path / task).code == 0
        check(tmp_path / task, golden / "adapters" / task, exact=source == "original")


def test_what_people_said_of_its_tasks_is_still_known(icm: Icm, golden: Path) -> None:
    rows = {row["name"]: row for row in icm("ls", "--json").document}
    assert rows.keys() == TASKS.keys()
    assert (rows["rules"]["tags"], rows["rules"]["note"]) == (["golden"], "kept for later versions")
    assert (rows["silent"]["pinned"], rows["poems"]["evicted_at"] is not None) == (True, True)
    assert rows["rules"]["retained_gain"] is not None


def test_it_can_be_changed_as_any_other(icm: Icm, golden: Path) -> None:
    assert icm("evict", "rules", "--max-error", "10").code == 0
    assert icm("rm", "poems", "--yes").code == 0
    assert icm("verify", "--read-data").code == 0


def test_a_store_from_before_the_first_release_is_refused_with_the_way_out(icm: Icm, tmp_path: Path) -> None:
    unpacked(BEFORE_THE_FIRST, tmp_path)
    for command in ("ls", "verify", "train"):
        ran = icm(command)
        assert ran.code == ExitCode.OTHER_VERSION
        assert "has schema 7; this icm begins with schema 8" in ran.err
        assert "ingest the adapters again" in ran.err


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_bundle_of_an_earlier_version_gives_the_same_adapters(
    icm: Icm, version: str, tmp_path: Path, stored: bool
) -> None:
    golden = HERE / version
    source: tuple[object, ...] = ("--from", golden / "fleet.icm")
    if stored:
        icm("--store", tmp_path / "other", "import", golden / "fleet.icm")
        source = ("--store", tmp_path / "other")
    assert icm("materialize", "poems", "-o", tmp_path / "poems", *source).code == 0
    check(tmp_path / "poems", golden / "adapters" / "poems", exact=False)


def test_there_is_one_of_the_schema_in_use() -> None:
    """`python -m tests.golden.build` writes it, once a schema is settled."""
    assert f"schema-{newest()}" in VERSIONS
