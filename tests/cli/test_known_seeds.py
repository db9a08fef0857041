"""Adapters whose training began with a seed that can be found: their codes say so, and are smaller."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from icmlora.adapter.metrics import squared_error
from icmlora.fleet.resources.adapter_source import StoreAdapterSource
from icmlora.formats.discovery.folder import load_adapter, save_adapter
from icmlora.generator.codec.codec import Codec
from registry.store import Store
from tests.cli.coded import codes, current
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import icm_quietly, train_store, write_lora
from tests.icmlora.peft_made import SEED, initial_of, peft_made
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
TRAINED = {"first": SEED, "second": SEED, "third": 7}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters that PEFT began and one of random values in loras/, and a trained store of them."""
    root = tmp_path_factory.mktemp("seeded")
    for task, (name, seed) in enumerate(TRAINED.items()):
        adapter = peft_made(seed, moved=1 / 3, task=task).adapter
        save_adapter(adapter, root / "loras" / name, dtype="float32")
    write_lora(root / "loras" / "unseeded", targets=("mlp.down_proj",))
    icm_quietly(root / "store", "ingest", root / "loras", "--no-vectors")
    train_store(root / "store")
    return root


@pytest.fixture
def seeded(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template / "store", tmp_path / "store"))


def seeds_in_codes(path: Path) -> dict[str, int | None]:
    with Store.open(path) as store:
        codec = Codec.of(store.blobs.read(current(path).blob))
        heads = {name: codec.open(store.blobs.read(code.blob)).head for name, code in codes(path).items()}
    return {task: head.initial.seed if head.initial else None for task, head in heads.items()}


def test_the_fleet_of_a_store_knows_where_training_began(seeded: Path) -> None:
    with Store.open(seeded) as store:
        fleet = StoreAdapterSource.of_base(store, LABEL)
        found = dict(zip(fleet.names, (fleet.initial(task) for task in range(fleet.tasks())), strict=True))
    assert {name: initial.seed if initial else None for name, initial in found.items()} == {**TRAINED, "unseeded": None}
    assert found["first"] == initial_of(peft_made(SEED, moved=1 / 3).adapter)


@pytest.mark.slow
def test_the_codes_of_train_and_encode_hold_the_seed(icm: Icm, seeded: Path) -> None:
    assert seeds_in_codes(seeded) == {**TRAINED, "unseeded": None}
    assert icm("encode", "--max-error", "0.14").code == 0
    assert seeds_in_codes(seeded) == {**TRAINED, "unseeded": None}


@pytest.mark.slow
def test_what_is_written_from_such_a_code_has_the_error_that_was_said(
    icm: Icm, seeded: Path, template: Path, tmp_path: Path
) -> None:
    assert icm("encode", "--max-error", "0.14").code == 0
    written = tmp_path / "written"
    assert icm("materialize", "first", "-o", str(written), "--source", "code", "--dtype", "float32").code == 0
    pair = (load_adapter(folder) for folder in (template / "loras" / "first", written))
    assert squared_error(*pair) == pytest.approx(codes(seeded)["first"].squared_error, rel=1e-2)


def test_show_names_the_seed(icm: Icm, seeded: Path) -> None:
    assert f"seed {SEED}, recovered for " in icm("show", "first").out
    assert icm("show", "third", "--json").document["initial_seed"] == 7
    assert icm("show", "unseeded", "--json").document["initial_seed"] is None


def test_show_of_a_damaged_code_still_shows_the_task(icm: Icm, seeded: Path) -> None:
    blob = str(codes(seeded)["first"].blob)
    (path,) = (seeded / "blobs").rglob(blob)
    path.chmod(0o600)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert icm("show", "first", "--json").document["initial_seed"] is None
