"""`Fleet.stats`: every number is the length of files on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import DataError, Fleet, OutputExists, StoreNotFound
from icmlora.fleet.stats.bill import TaskBill
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import TASKS, blob_of, code_blobs, files_of, size_of
from tests.icmlora.tiny_base import LABEL


def bills(fleet: Fleet) -> dict[str, TaskBill]:
    return {task.row.name: task for task in fleet.stats().each}


def sizes(fleet: Fleet, digests: set[str]) -> int:
    return sum(blob_of(fleet, digest).stat().st_size for digest in digests)


def test_the_total_is_that_of_the_folder(fleet: Fleet) -> None:
    assert fleet.stats().usage.total == size_of(fleet.path)


@pytest.mark.slow
def test_every_use_is_the_length_of_its_files(fleet: Fleet) -> None:
    usage = fleet.stats().usage
    vectors = {vector.blob for name in TASKS for vector in fleet.show(name).task.vectors}
    (version,) = fleet.generators()
    assert usage.codes == sizes(fleet, set(code_blobs(fleet).values()))
    assert usage.vectors == sizes(fleet, vectors)
    assert usage.generators == sizes(fleet, {version.generator.blob})
    assert usage.database == sum(path.stat().st_size for path in fleet.path.glob("registry.db*"))
    assert (usage.old_generators, usage.training) == (0, 0)


def test_originals_and_checkpoints_are_counted_apart(fleet: Fleet) -> None:
    usage = fleet.stats().usage
    finals = [fleet.show(name).task.final for name in TASKS]
    assert usage.originals <= sum(final.original_bytes for final in finals)  # two tasks may share a configuration
    assert usage.originals >= sum(final.weights.size for final in finals)
    assert usage.checkpoints == sum(one.weights.size for one in fleet.show("poems").task.checkpoints)


def test_the_bill_of_a_task_is_that_of_its_files(fleet: Fleet) -> None:
    for name, task in bills(fleet).items():
        known, row = fleet.show(name).task, task.row
        assert row.stored_bytes == known.final.original_bytes
        assert row.code_size == blob_of(fleet, code_blobs(fleet)[name]).stat().st_size
        assert row.vectors_bytes == sizes(fleet, {vector.blob for vector in known.vectors})
        assert task.bf16_size == 2 * known.final.parameters
        assert task.size == row.code_size + row.vectors_bytes


def test_totals_are_sums_over_tasks(fleet: Fleet) -> None:
    bill = fleet.stats()
    (of_base,) = bill.fleets
    assert (of_base.base_model, bill.tasks, bill.evicted) == (LABEL, 3, 0)
    assert bill.bf16_size == sum(task.bf16_size for task in of_base.tasks)
    assert of_base.per_task_size == sum(task.size for task in of_base.tasks)
    assert of_base.marginal_size == pytest.approx(of_base.per_task_size / 3)
    assert bill.compact_share == bill.compact_size / bill.bf16_size


@pytest.mark.slow
def test_an_eviction_takes_the_weights_off_the_bill(fleet: Fleet) -> None:
    before = fleet.stats()
    freed = fleet.evict(["rules"], max_error=0.7).freed
    after = fleet.stats()
    assert before.usage.originals - after.usage.originals == freed
    row = bills(fleet)["rules"].row
    assert (after.evicted, row.evicted_at is not None) == (1, True)
    assert row.stored_bytes == fleet.show("rules").task.final.stored_bytes


def test_a_few_shot_start_is_shared_by_all_tasks(started: Path) -> None:
    (of_base,) = Fleet(started).stats().fleets
    assert of_base.start_size > 0
    assert of_base.shared_size == of_base.generator_size + of_base.start_size == Fleet(started).stats().usage.generators


@pytest.mark.slow
def test_an_earlier_generator_is_counted_apart_and_its_codes_can_be_pruned(fleet: Fleet) -> None:
    before = fleet.stats().usage
    fleet.train(device="cpu", steps=2, fresh=True, refine=0, evaluate=False)
    bill = fleet.stats()
    assert (bill.usage.old_generators, bill.fleets[0].earlier_size) == (before.generators, 0)
    assert bill.usage.unreferenced >= before.unreferenced + before.codes


def test_removed_tasks_take_no_bytes(fleet: Fleet) -> None:
    before = fleet.stats().usage
    freed = fleet.remove(["rules"]).freed
    after = fleet.stats().usage
    assert freed is not None
    assert before.total - after.total >= freed - 1024  # the removal is a manifest too
    assert after.total == size_of(fleet.path)


def test_a_share_is_known_only_if_every_task_has_a_code(fleet: Fleet, loras: Path) -> None:
    assert fleet.stats().is_complete
    fleet.ingest([loras / "silent"], name="twin")
    bill = fleet.stats()
    assert (bill.is_complete, bill.compact_share, len(bill.fleets[0].encoded)) == (False, None, 3)


def test_each_base_model_has_its_own_bill(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write_lora(tmp_path / "alien", base_model_name_or_path="acme/elsewhere")])
    first, second = fleet.stats().fleets
    assert (first.base_model, first.generator, first.marginal_size, first.break_even) == (
        "acme/elsewhere", None, None, None,
    )  # fmt: skip
    assert second.base_model == LABEL


def test_counting_changes_no_byte(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    fleet.stats()
    assert files_of(fleet.path) == before


def test_an_empty_store_has_an_empty_bill(tmp_path: Path, base_folder: Path) -> None:
    fleet = Fleet(tmp_path / "new")
    fleet.add_base_model(LABEL, base_folder)
    bill = fleet.stats()
    assert (bill.fleets, bill.tasks, bill.compact_share) == ((), 0, None)
    assert bill.usage.total == size_of(fleet.path)


def test_without_a_store_there_is_no_bill(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        Fleet(tmp_path / "nowhere").stats()


def test_a_plot_of_another_ending_or_over_a_file_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.svg, \.png or \.pdf"):
        fleet.stats(plot=tmp_path / "bill.doc")
    (tmp_path / "bill.svg").write_text("mine")
    with pytest.raises(OutputExists):
        fleet.stats(plot=tmp_path / "bill.svg")
    assert (tmp_path / "bill.svg").read_text() == "mine"


def test_there_is_nothing_to_plot_without_codes(ingested: Fleet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="code"):
        ingested.stats(plot=tmp_path / "bill.svg")
    assert not (tmp_path / "bill.svg").exists()
