"""`Fleet.task_map`: which tasks are compared, and what a map says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import DataError, Fleet, OutputExists, StoreNotFound
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import blob_of, damage, files_of
from tests.icmlora.tiny_base import LABEL

NAMES = ["apples", "ships", "trains"]


def test_a_map_has_every_task_with_its_neighbour(learned: Fleet) -> None:
    report = learned.task_map()
    assert (report.base_model, report.view, report.left_out) == (LABEL, "adapted", ())
    assert [task.name for task in report.map.tasks] == NAMES
    assert report.support_sets == sum(
        vector.view == "adapted" for name in NAMES for vector in learned.show(name).task.vectors
    )


def test_the_nearest_tasks_of_show_are_those_of_the_map(learned: Fleet) -> None:
    closest = min(learned.task_map().map.pairs, key=lambda pair: pair.distance)
    one, other = closest.tasks
    shown = learned.show(one).nearest
    assert (shown[0].task, shown[0].distance) == (other, pytest.approx(closest.distance))


def test_the_context_view_needs_no_adapter(learned: Fleet) -> None:
    learned.evict(max_error=0.7)
    report = learned.task_map(view="context")
    assert (report.view, len(report.map.tasks)) == ("context", 3)


@pytest.mark.one_case
@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_the_number_of_clusters_can_be_chosen(learned: Fleet, clusters: int) -> None:
    found = learned.task_map(clusters=clusters).map.clusters
    assert (len(found), sum(map(len, found))) == (clusters, 3)


def test_more_clusters_than_tasks_are_refused(learned: Fleet) -> None:
    with pytest.raises(DataError, match="3 tasks cannot make 4 clusters"):
        learned.task_map(clusters=4)


def test_a_task_without_vectors_is_left_out_with_the_reason(learned: Fleet, tmp_path: Path) -> None:
    learned.ingest([write_lora(tmp_path / "mute")])
    report = learned.task_map()
    assert [entry.task for entry in report.left_out] == ["mute"]
    assert report.reasons == [f"{report.left_out[0].reason}: mute"]


def test_the_picture_names_every_task_and_is_not_overwritten(learned: Fleet, tmp_path: Path) -> None:
    picture = tmp_path / "map.svg"
    learned.task_map(plot=picture)
    text = picture.read_text()
    assert text.lstrip().startswith(("<?xml", "<svg"))
    assert all(name in text for name in NAMES)
    with pytest.raises(OutputExists):
        learned.task_map(plot=str(picture))
    learned.task_map(plot=picture, force=True)
    assert picture.read_text() == text


def test_a_picture_of_another_kind_is_refused(learned: Fleet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.svg") as error:
        learned.task_map(plot=tmp_path / "map.png")
    assert error.value.hint == "use a file name that ends in .svg"


def test_a_base_model_without_tasks_is_refused(learned: Fleet) -> None:
    with pytest.raises(DataError, match="no task belongs to base model 'acme/other'"):
        learned.task_map(base_model="acme/other")


def test_without_vectors_there_is_no_map(tmp_path: Path, loras: Path) -> None:
    fleet = Fleet(tmp_path / "new")
    fleet.ingest([loras])
    with pytest.raises(DataError, match="no task has vectors") as error:
        fleet.task_map()
    assert "icm vectors" in str(error.value.hint)


def test_a_task_with_damaged_vectors_is_not_on_the_map(learned: Fleet) -> None:
    damage(blob_of(learned, learned.show("ships").task.vectors[0].blob))
    with pytest.raises(DataError, match=r"its vectors cannot be read: blob \w+ is damaged: ships"):
        learned.task_map()
    assert learned.show("apples").nearest == ()


def test_a_map_changes_no_byte_and_needs_a_store(learned: Fleet, tmp_path: Path) -> None:
    before = files_of(learned.path)
    learned.task_map()
    assert files_of(learned.path) == before
    with pytest.raises(StoreNotFound):
        Fleet(tmp_path / "nowhere").task_map()
