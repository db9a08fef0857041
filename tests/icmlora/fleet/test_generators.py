"""`Fleet.generators`, `rollback` and `forget_generator`."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import DataError, Fleet, LastCopy
from registry.errors import GeneratorConflict, GeneratorNotFound
from tests.icmlora.fleet.stores import TASKS, blob_of, code_blobs, copy_of, damage, equal, files_of, has_blob, is_sound


@pytest.fixture(scope="module")
def twice_template(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("twice") / "store"
    copy_of(trained_template, store).train(device="cpu", steps=2, fresh=True, seed=3, refine=0, evaluate=False)
    return store


@pytest.fixture
def twice(twice_template: Path, tmp_path: Path) -> Fleet:
    """The mixed fleet after a second training from scratch."""
    return copy_of(twice_template, tmp_path / "store")


def digests(fleet: Fleet) -> list[str]:
    return [version.record.blob for version in fleet.generators()]


def current(fleet: Fleet) -> list[bool]:
    return [version.record.is_current for version in fleet.generators()]


def test_a_listing_has_the_size_of_each_file_and_its_tasks(twice: Fleet) -> None:
    versions = twice.generators()
    assert [version.record.version for version in versions] == [1, 2]
    for version in versions:
        assert version.record.size == blob_of(twice, version.record.blob).stat().st_size
        assert (list(version.tasks), version.last_copies, version.networks) == (TASKS, (), 1)


def test_a_damaged_file_is_still_listed(fleet: Fleet) -> None:
    damage(blob_of(fleet, digests(fleet)[0]))
    (version,) = fleet.generators()
    assert (version.networks, list(version.tasks)) == (None, TASKS)


def test_a_rollback_brings_the_earlier_codes_back(fleet: Fleet) -> None:
    codes, adapter = code_blobs(fleet), fleet.load("rules", source="code")
    fleet.train(device="cpu", steps=2, fresh=True, seed=3, refine=0, evaluate=False)
    assert code_blobs(fleet) != codes
    done = fleet.rollback(digests(fleet)[0][:12].upper())
    assert (done.generator.version, done.without_code) == (1, [])
    assert code_blobs(fleet) == codes
    assert equal(fleet.load("rules", source="code"), adapter)


@pytest.mark.slow
def test_a_rollback_names_the_tasks_that_are_left_without_a_code(twice: Fleet, loras: Path) -> None:
    twice.ingest([loras / "silent"], name="twin")
    assert twice.update(device="cpu", steps=2, refine=0, evaluate=False).tasks == ["twin"]
    assert twice.rollback(digests(twice)[0]).without_code == ["twin"]
    assert twice.show("twin").code is None


def test_a_rollback_to_the_current_generator_changes_nothing(twice: Fleet) -> None:
    before = code_blobs(twice)
    twice.rollback(digests(twice)[1])
    assert (code_blobs(twice), current(twice)) == (before, [False, True])


def test_a_rollback_would_lose_an_evicted_task_and_is_refused(twice: Fleet) -> None:
    twice.evict(["rules"], max_error=0.95)
    before = files_of(twice.path)
    with pytest.raises(LastCopy, match="rules"):
        twice.rollback(digests(twice)[0])
    assert files_of(twice.path) == before


@pytest.mark.parametrize("digits", ["", "abc"])
def test_too_few_digits_are_refused(fleet: Fleet, digits: str) -> None:
    for work in (fleet.rollback, fleet.forget_generator):
        with pytest.raises(DataError, match="use at least 4 digits"):
            work(digits)


def test_digits_of_no_generator_are_refused(fleet: Fleet) -> None:
    for work in (fleet.rollback, fleet.forget_generator):
        with pytest.raises(DataError, match="no generator begins with 'zzzz'") as error:
            work("zzzz")
        assert error.value.hint == "run `icm generators` to list them"


def test_the_generator_in_use_is_not_forgotten(fleet: Fleet) -> None:
    with pytest.raises(GeneratorConflict, match="is in use"):
        fleet.forget_generator(digests(fleet)[0])
    assert len(fleet.generators()) == 1


def test_a_forgotten_generator_takes_its_codes_and_its_file_along(twice: Fleet) -> None:
    first, second = digests(twice)
    done = twice.forget_generator(first[:8])
    assert (done.generator.blob, done.codes) == (first, 3)
    assert (digests(twice), has_blob(twice, first), is_sound(twice)) == ([second], False, True)


def test_a_dry_run_forgets_nothing(twice: Fleet) -> None:
    before = files_of(twice.path)
    assert twice.forget_generator(digests(twice)[0], dry_run=True).codes == 3
    assert files_of(twice.path) == before


def test_a_generator_can_be_forgotten_by_its_record_but_once(twice: Fleet) -> None:
    record = twice.generators()[0].record
    twice.forget_generator(record)
    with pytest.raises(GeneratorNotFound):
        twice.forget_generator(record)


@pytest.mark.slow
def test_an_extended_generator_leaves_nothing_behind_that_an_evicted_task_needs(fleet: Fleet, tmp_path: Path) -> None:
    from tests.cli.tiny_fleet import write_lora

    fleet.evict(["rules"], max_error=0.7)
    before = fleet.load("rules")
    fleet.ingest([write_lora(tmp_path / "epics", seed=8, rank=16)])
    fleet.update(device="cpu", steps=2, refine=0, evaluate=False)
    first, second = fleet.generators()
    assert (second.networks, "rules" in second.tasks) == (2, True)
    fleet.forget_generator(first.record)
    assert equal(fleet.load("rules"), before)
