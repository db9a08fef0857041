"""`Fleet.report`: what is on the page of a real store, and what is said of what is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from icmlora import BaseModelNotFound, Cancelled, DataError, Fleet, OutputExists, Progress, StoreNotFound, TaskNotFound
from icmlora.fleet.report import content as use_case
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.report.made_up import Read
from tests.icmlora.fleet.stores import blob_of, damage, files_of, stop_after
from tests.icmlora.tiny_base import LABEL

NAMES = ["apples", "ships", "trains"]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "fleet.html"


def read(page: Path) -> Read:
    return Read.of(page.read_text(encoding="utf-8"))


def sources_in(texts: list[str]) -> list[str]:
    return [text for text in texts if text in ("base model", "original", "code")]


def test_every_task_is_in_the_table_with_what_the_store_says_of_it(learned: Fleet, page: Path) -> None:
    done = learned.report(page)
    table, tasks = read(page), {row.name: row for row in learned.tasks()}
    assert table.column("name") == NAMES
    assert table.column("original") == [tasks[name].original_bytes for name in NAMES]
    assert table.column("code") == [tasks[name].code_size for name in NAMES]
    assert (done.tasks, done.size) == (3, page.stat().st_size)


def test_the_headline_says_what_stats_says(learned: Fleet, page: Path) -> None:
    learned.report(page)
    bill, text = learned.stats(), page.read_text()
    assert bill.compact_share is not None
    assert f"take {100 * bill.compact_share:.1f}%" in text
    assert f"3 tasks of {LABEL}" in text


@pytest.mark.slow
def test_gains_are_shown_once_they_are_measured(learned: Fleet, page: Path) -> None:
    assert learned.report(page).quality == "relative error"
    learned.evaluate(sources=["code"], device="cpu")
    assert learned.report(page, force=True).quality == "retained gain"
    gains = [round(row.gain, 3) for row in learned.tasks() if row.gain is not None]
    assert read(page).column("gain") == pytest.approx(gains, abs=5e-4)


def test_the_map_is_that_of_the_map_command_with_a_row_for_each_marker(learned: Fleet, page: Path) -> None:
    assert learned.report(page).maps == [LABEL]
    clusters = {task.name: task.cluster for task in learned.task_map().map.tasks}
    table = read(page)
    assert dict(zip(table.column("name"), table.column("cluster"), strict=True)) == clusters
    assert len(re.findall(r'data-row="\d', page.read_text())) == 3 * 3  # marker, code and original of each


def test_without_vectors_there_is_no_map(tmp_path: Path, loras: Path, page: Path) -> None:
    fleet = Fleet(tmp_path / "new")
    fleet.ingest([loras])
    done = fleet.report(page)
    assert (done.maps, done.quality, "Task map" in page.read_text()) == ([], None, False)


@pytest.mark.slow
def test_damaged_vectors_cost_the_map_and_nothing_else(learned: Fleet, page: Path) -> None:
    damage(blob_of(learned, learned.show("ships").task.vectors[0].blob))
    done = learned.report(page)
    assert (done.maps, done.tasks) == ([], 3)
    assert "has changed" in page.read_text() or "damaged" in page.read_text()


def test_a_map_of_too_many_tasks_is_left_out_with_the_reason(
    learned: Fleet, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use_case, "MAX_MAPPED", 2)
    assert learned.report(page).maps == []
    assert "at most 2 tasks per base model, but there are 3" in page.read_text()


@pytest.mark.slow
def test_the_same_store_gives_the_same_bytes_and_stays_as_it_is(learned: Fleet, page: Path) -> None:
    learned.report(page, outputs=["ships"], max_new_tokens=4, device="cpu")
    first, before = page.read_bytes(), files_of(learned.path)
    learned.report(page, outputs=["ships"], max_new_tokens=4, device="cpu", force=True)
    assert page.read_bytes() == first
    assert files_of(learned.path) == before


def test_a_page_that_exists_is_replaced_with_force_only(learned: Fleet, page: Path) -> None:
    page.parent.mkdir()
    page.write_text("mine")
    with pytest.raises(OutputExists):
        learned.report(page)
    assert page.read_text() == "mine"


def test_an_empty_store_has_a_page(tmp_path: Path, base_folder: Path, page: Path) -> None:
    fleet = Fleet(tmp_path / "new")
    fleet.add_base_model(LABEL, base_folder)
    assert fleet.report(page).tasks == 0
    assert "Empty store" in page.read_text()


def test_without_a_store_there_is_no_page(tmp_path: Path, page: Path) -> None:
    with pytest.raises(StoreNotFound):
        Fleet(tmp_path / "nowhere").report(page)
    assert not page.exists()


class TestOutputs:
    def test_base_original_and_code_answer_the_beginnings_of_the_held_out_text(
        self, learned: Fleet, page: Path
    ) -> None:
        done = learned.report(page, outputs=["ships"], max_new_tokens=6, device="cpu")
        texts = read(page).texts
        assert (done.outputs, done.failures) == (["ships"], {})
        assert sources_in(texts) == ["base model", "original", "code"] * 3
        assert any(text.startswith("tall ships") for text in texts)

    @pytest.mark.slow
    def test_the_row_of_a_task_leads_to_its_outputs(self, learned: Fleet, page: Path) -> None:
        learned.report(page, outputs=["trains", "ships"], max_new_tokens=2, device="cpu")
        assert read(page).data["outputs"] == {"2": 1, "1": 2}

    @pytest.mark.slow
    def test_prompts_of_a_file_are_used_for_every_task(self, learned: Fleet, page: Path, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("first <prompt>\nsecond\n")
        learned.report(page, outputs=["ships", "apples"], prompts=prompts, max_new_tokens=2, device="cpu")
        texts = read(page).texts
        assert (texts.count("first <prompt>"), texts.count("second")) == (2, 2)

    @pytest.mark.slow
    def test_an_evicted_original_does_not_answer(self, learned: Fleet, page: Path) -> None:
        learned.evict(["ships"], max_error=0.9)
        learned.report(page, outputs=["ships"], max_new_tokens=4, device="cpu")
        texts = read(page).texts
        assert sources_in(texts) == ["base model", "code"] * 3
        assert "<mark>" not in page.read_text().partition('<article class="answers">')[2]

    @pytest.mark.slow
    def test_a_task_without_held_out_text_is_named_and_the_others_go_on(
        self, learned: Fleet, page: Path, tmp_path: Path
    ) -> None:
        learned.ingest([write_lora(tmp_path / "mute")])
        done = learned.report(page, outputs=["mute", "ships"], max_new_tokens=2, device="cpu")
        assert (done.outputs, list(done.failures)) == (["ships"], ["mute"])
        assert "no held-out text" in done.failures["mute"]
        assert "no held-out text" in page.read_text()

    @pytest.mark.slow
    def test_a_missing_base_model_is_named_and_the_others_go_on(
        self, learned: Fleet, page: Path, tmp_path: Path
    ) -> None:
        learned.ingest([write_lora(tmp_path / "other", base_model_name_or_path="acme/none")])
        done = learned.report(page, outputs=["other", "ships"], max_new_tokens=2, device="cpu")
        assert (done.outputs, list(done.failures)) == (["ships"], ["other"])

    def test_the_only_task_has_its_error_raised_and_nothing_is_written(
        self, learned: Fleet, page: Path, tmp_path: Path
    ) -> None:
        learned.ingest(
            [write_lora(tmp_path / "mute"), write_lora(tmp_path / "other", base_model_name_or_path="acme/none")]
        )
        with pytest.raises(DataError, match="no held-out text"):
            learned.report(page, outputs=["mute"], device="cpu")
        with pytest.raises(BaseModelNotFound):
            learned.report(page, outputs=["other"], device="cpu")
        assert not page.exists()

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"outputs": ["nobody"]}, TaskNotFound),
            ({"prompts": "prompts.txt"}, DataError),
            ({"outputs": ["ships"], "max_new_tokens": 0}, DataError),
        ],
    )
    def test_what_cannot_be_done_is_refused_before_any_model_is_loaded(
        self, learned: Fleet, page: Path, options: dict[str, object], error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            learned.report(page, **options)  # type: ignore[arg-type]
        assert not page.exists()

    def test_a_stop_leaves_no_page(self, learned: Fleet, page: Path) -> None:
        fleet = Fleet(learned.path, on_event=stop_after(2, Progress))
        with pytest.raises(Cancelled):
            fleet.report(page, outputs=["ships", "apples"], max_new_tokens=2, device="cpu")
        assert not page.exists()
