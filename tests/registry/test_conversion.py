"""Sources of adapters: most follow from the folder of their task."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.names import source_label
from registry.store import Store
from registry.to_records import task_folder, unusual_source, usual_source
from tests.registry.every_row import fill


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("loras/sql", "loras/sql"),
        ("loras/sql/checkpoint-80", "loras/sql"),
        ("loras/checkpoint-80/adapter", "loras/checkpoint-80/adapter"),
        ("bundle.icm", "bundle.icm"),
    ],
)
def test_the_folder_of_a_task_is_where_its_checkpoints_lie(source: str, folder: str) -> None:
    assert task_folder(source) == folder


@pytest.mark.parametrize(
    ("source", "step", "is_final"),
    [("loras/sql", None, True), ("loras/sql/checkpoint-80", 80, False), ("loras/sql", None, False)],
)
def test_what_a_trainer_would_have_chosen_is_not_kept(source: str, step: int | None, is_final: bool) -> None:
    assert unusual_source(source, "loras/sql", step, is_final=is_final) is None


@given(st.text(), st.text(), st.none() | st.integers(0), st.booleans())
def test_every_source_comes_back(source: str, final: str, step: int | None, is_final: bool) -> None:
    folder = task_folder(final)
    kept = unusual_source(source, folder, step, is_final=is_final)
    assert (usual_source(folder, step, is_final=is_final) if kept is None else kept) == source


def test_a_path_that_is_no_unicode_is_written_out() -> None:
    assert source_label(Path("loras/é")) == "loras/é"
    assert source_label(Path(os.fsdecode(b"fl\xff/rust"))) == "fl\\xff/rust"


def test_sources_of_every_kind_are_what_they_were(store: Store) -> None:
    fill(store)
    assert [row.source for row in store.tasks.adapters("sql")] == [
        "runs/sql/checkpoint-5",
        "elsewhere",
        "runs/sql/checkpoint-9",
    ]
    assert {row.source for row in store.tasks.adapters("rust")} == {"loras/example"}
