"""Which tasks can be served, and under which key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from icmlora import Fleet, load_adapter
from icmlora.serving.tasks import ServedTasks, open_tasks
from tests.icmlora.serving.conftest import Served, folder_bytes


@pytest.fixture(params=["store", "bundle"])
def tasks(request: pytest.FixtureRequest, served_template: Served) -> ServedTasks:
    if request.param == "bundle":
        return open_tasks(None, served_template.bundle, command="test")
    return open_tasks(served_template.store, None, command="test")


def test_all_tasks_of_the_source_are_named(tasks: ServedTasks) -> None:
    assert tasks.names() == ["poems", "rules", "silent"]


def test_a_task_is_found_by_its_exact_name(tasks: ServedTasks) -> None:
    found = tasks.find("rules")
    assert found is not None
    assert found.name == "rules"
    assert tasks.find("Rules") is None


@given(st.text())
def test_any_text_may_be_asked_for(served_template: Served, name: str) -> None:
    for source in (
        open_tasks(served_template.store, None, command="t"),
        open_tasks(None, served_template.bundle, command="t"),
    ):
        found = source.find(name)
        assert found is None or found.name == name


def test_the_written_folder_is_that_of_materialize(served: Served, tmp_path: Path) -> None:
    tasks = open_tasks(served.store, None, command="test")
    for name in tasks.names():
        found = tasks.find(name)
        assert found is not None
        tasks.write(found, tmp_path / "served" / name)
        Fleet(served.store).materialize(name, tmp_path / "materialized" / name)
        assert folder_bytes(tmp_path / "served" / name) == folder_bytes(tmp_path / "materialized" / name)


def test_a_bundle_alone_gives_the_adapter_of_the_store(served_template: Served, tmp_path: Path) -> None:
    for number, source in enumerate(
        (open_tasks(served_template.store, None, command="t"), open_tasks(None, served_template.bundle, command="t"))
    ):
        found = source.find("poems")  # evicted: the store has its code alone
        assert found is not None
        source.write(found, tmp_path / str(number))
    weights = [(tmp_path / str(number) / "adapter_model.safetensors").read_bytes() for number in (0, 1)]
    assert weights[0] == weights[1]
    assert load_adapter(tmp_path / "0").modules


def test_a_key_stays_while_nothing_changes(served: Served) -> None:
    first, second = (open_tasks(served.store, None, command="t").find("rules") for _ in range(2))
    assert first == second


def test_every_task_has_a_key_of_its_own(tasks: ServedTasks) -> None:
    found = [tasks.find(name) for name in tasks.names()]
    assert len({task.key for task in found if task is not None}) == 3


def test_a_key_changes_when_the_adapter_that_is_served_changes(served: Served) -> None:
    tasks = open_tasks(served.store, None, command="test")
    before = tasks.find("rules")
    Fleet(served.store).evict(["rules"], max_error=10)
    after = tasks.find("rules")
    assert before is not None
    assert after is not None
    assert before.key != after.key


def test_a_bundle_that_was_replaced_is_not_served(served: Served, tmp_path: Path) -> None:
    from icmlora import BundleError

    copy = tmp_path / "copy.icm"
    copy.write_bytes(served.bundle.read_bytes())
    tasks = open_tasks(None, copy, command="t")
    found = tasks.find("poems")
    assert found is not None
    tasks.write(found, tmp_path / "before")
    damaged = bytearray(copy.read_bytes())
    damaged[-1] ^= 1
    copy.write_bytes(damaged)
    with pytest.raises(BundleError, match="damaged"):
        tasks.write(found, tmp_path / "after")
    assert not (tmp_path / "after").exists()
