"""Tasks whose names are Chinese, Greek or accented: every command takes them, and files are called after them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.completion import complete_task
from icmlora.serving.tasks import open_tasks
from tests.cli.conftest import Ran
from tests.cli.fleet import write_texts
from tests.cli.tiny_fleet import icm_quietly, train_store, write_lora

Icm = Callable[..., Ran]
NAMES = ["Über-σ", "水墨画", "猫娘画风"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three adapters and a store with their codes."""
    place = tmp_path_factory.mktemp("scripts")
    for seed, name in enumerate(NAMES):
        write_texts(write_lora(place / "loras" / name, seed=seed))
    icm_quietly(place / "store", "ingest", place / "loras", "--no-vectors")
    train_store(place / "store")
    return place


@pytest.fixture
def store(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the store, which the commands of a test use."""
    copy = Path(shutil.copytree(trained / "store", tmp_path / "store"))
    monkeypatch.setenv("ICM_STORE", str(copy))
    return copy


def test_a_listing_shows_the_names_as_they_are(icm: Icm, store: Path) -> None:
    assert icm("ls", "-q").out.split() == NAMES
    assert [row["name"] for row in icm("ls", "--json").document] == NAMES
    assert complete_task("水") == ["水墨画"]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_materialized_from_its_code_and_from_its_original(
    icm: Icm, store: Path, trained: Path, tmp_path: Path, name: str
) -> None:
    assert icm("materialize", name, "-o", tmp_path / "code", "--source", "code").code == 0
    typed = unicodedata.normalize("NFD", name)
    assert icm("materialize", typed, "-o", tmp_path / "original", "--source", "original").code == 0
    written = (tmp_path / "original" / "adapter_model.safetensors").read_bytes()
    assert written == (trained / "loras" / name / "adapter_model.safetensors").read_bytes()


def test_a_bundle_carries_the_names_to_another_store(icm: Icm, store: Path, tmp_path: Path) -> None:
    assert icm("export", tmp_path / "fleet.icm").code == 0
    assert icm("materialize", "水墨画", "--from", tmp_path / "fleet.icm", "-o", tmp_path / "out").code == 0
    assert icm("--store", tmp_path / "other", "import", tmp_path / "fleet.icm").code == 0
    assert icm("--store", tmp_path / "other", "ls", "-q").out.split() == NAMES


def test_a_placeholder_brings_its_adapter_back(icm: Icm, store: Path, trained: Path) -> None:
    weights = trained / "loras" / "猫娘画风" / "adapter_model.safetensors"
    before = weights.read_bytes()
    assert icm("evict", "猫娘画风", "--placeholder", "--keep-originals").code == 0
    assert not weights.exists()
    assert icm("restore", trained / "loras").code == 0
    assert weights.read_bytes() == before


def test_a_name_in_another_case_is_the_same_task(icm: Icm, store: Path) -> None:
    assert icm("show", "über-Σ", "--json").document["name"] == "Über-σ"
    ran = icm("edit", "水墨画", "--name", "ÜBER-σ")
    assert ran.code != 0
    assert "there is already a task named 'Über-σ'" in ran.err
    assert icm("edit", "水墨画", "--name", unicodedata.normalize("NFD", "café")).code == 0
    assert "café" in icm("ls", "-q").out


def test_engines_find_a_task_by_its_name(store: Path) -> None:
    tasks = open_tasks(store, None, command="test", lock_timeout=1.0)
    found = tasks.find("水墨画")
    assert found is not None
    assert found.name == "水墨画"
    assert tasks.find("水墨") is None


def test_output_that_cannot_show_a_name_does_not_fail(trained: Path) -> None:
    script = "from icm_cli.app import main; main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "ICM_STORE": str(trained / "store")}
    ran = subprocess.run([sys.executable, "-c", script, "ls"], capture_output=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
