"""`Fleet.generators` and `rollback`."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import DamagedStore, DataError, Fleet
from tests.icmlora.fleet.stores import TASKS, blob_of, code_blobs, copy_of, damage, equal, files_of, has_blob, is_sound


@pytest.fixture(scope="module")
def twice_template(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("twice") / "store"
    fleet = copy_of(trained_template, store)
    fleet.evict(["rules"], max_error=0.95)
    fleet.train(device="cpu", steps=2, fresh=True, seed=3, refine=0, evaluate=False)
    return store


@pytest.fixture
def twice(twice_template: Path, tmp_path: Path) -> Fleet:
    """The mixed fleet after a second training from scratch, in which `rules` was evicted before."""
    return copy_of(twice_template, tmp_path / "store")


def digests(fleet: Fleet) -> list[str]:
    return [version.generator.blob for version in fleet.generators()]


def test_a_listing_has_the_size_of_each_file_and_its_tasks(twice: Fleet) -> None:
    first, second = twice.generators()
    assert (first.generator.version, list(first.tasks), first.is_current) == (1, ["rules"], False)
    assert (second.generator.version, list(second.tasks), second.is_current) == (2, ["poems", "silent"], True)
    for version in (first, second):
        assert version.generator.size == blob_of(twice, version.generator.blob).stat().st_size
        assert version.networks == 1


def test_a_damaged_file_is_still_listed(fleet: Fleet) -> None:
    damage(blob_of(fleet, digests(fleet)[0]))
    (version,) = fleet.generators()
    assert (version.networks, list(version.tasks)) == (None, TASKS)


def test_a_rollback_changes_no_code(twice: Fleet) -> None:
    codes = code_blobs(twice)
    adapters = {name: twice.load(name, source="code") for name in TASKS}
    first, second = digests(twice)
    done = twice.rollback(first[:12].upper())
    assert (done.generator.version, done.generator.blob, list(done.others)) == (3, first, ["poems", "silent"])
    assert (digests(twice), code_blobs(twice)) == ([first, second, first], codes)
    twice.prune(grace=0)
    assert digests(twice) == [second, first]
    assert all(equal(twice.load(name, source="code"), adapter) for name, adapter in adapters.items())
    assert is_sound(twice)


def test_new_codes_are_made_with_it(twice: Fleet) -> None:
    first, second = digests(twice)
    twice.rollback(first)
    twice.encode(device="cpu", max_error=0.9)
    twice.prune(grace=0)
    assert (digests(twice), has_blob(twice, second)) == ([first], False)
    assert is_sound(twice)


def test_a_rollback_to_the_current_generator_changes_nothing(twice: Fleet) -> None:
    before = files_of(twice.path)
    twice.rollback(digests(twice)[1])
    assert files_of(twice.path) == before


def test_a_damaged_generator_is_not_made_current(twice: Fleet) -> None:
    damage(blob_of(twice, digests(twice)[0]))
    before = files_of(twice.path)
    with pytest.raises(DamagedStore):
        twice.rollback(digests(twice)[0])
    assert files_of(twice.path) == before


@pytest.mark.parametrize("digits", ["", "abc"])
def test_too_few_digits_are_refused(fleet: Fleet, digits: str) -> None:
    with pytest.raises(DataError, match="use at least 4 digits"):
        fleet.rollback(digits)


def test_digits_of_no_generator_are_refused(fleet: Fleet) -> None:
    with pytest.raises(DataError, match="no generator begins with 'zzzz'") as error:
        fleet.rollback("zzzz")
    assert error.value.hint == "run `icm generators` to list them"


@pytest.mark.slow
def test_an_extended_generator_leaves_nothing_behind_that_an_evicted_task_needs(fleet: Fleet, tmp_path: Path) -> None:
    from tests.cli.tiny_fleet import write_lora

    fleet.evict(["rules"], max_error=0.7)
    before = fleet.load("rules")
    fleet.ingest([write_lora(tmp_path / "epics", seed=8, rank=16)])
    fleet.update(device="cpu", steps=2, refine=0, evaluate=False)
    fleet.prune(grace=0)
    (version,) = fleet.generators()
    assert (version.networks, "rules" in version.tasks) == (2, True)
    assert equal(fleet.load("rules"), before)
