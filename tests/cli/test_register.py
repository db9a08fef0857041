"""`icm generate --register`: a generated task is in the store, by its code and its vector alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from icmlora.adapter.metrics import squared_error
from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.kinds.likelihood import nll
from icmlora.base_models.running.attach import adapted
from icmlora.fleet.few_shot import generating
from icmlora.formats.discovery.folder import load_adapter
from registry.errors import TaskConflict
from registry.store import Store
from tests.cli.coded import current
from tests.cli.conftest import Ran
from tests.cli.test_generate import LINES, write_lines
from tests.cli.test_materialize import content
from tests.cli.tiny_fleet import EPISODES, STEPS, write_subject
from tests.icmlora.tiny_base import load_tiny_base

Icm = Callable[..., Ran]
TRAIN = ("train", "--no-eval", "--refine", "0", "--steps", STEPS, "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the adapter is written; a task of that name, so that it can be ingested as it is."""
    return tmp_path / "written" / "geese"


@pytest.fixture
def register(icm: Icm, started: Path, tmp_path: Path, folder: Path) -> Callable[..., Ran]:
    """Return a function that generates and registers `geese` with some more options."""

    def call(*options: object) -> Ran:
        samples = write_lines(tmp_path / "geese.jsonl", LINES)
        given = "--samples", samples, "-o", folder, "--device", "cpu", "--register", "--context", "0"
        return icm("generate", "geese", *given, *options)

    return call


Register = Callable[..., Ran]


def names(icm: Icm) -> list[str]:
    return [row["name"] for row in icm("ls", "--json").document]


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_the_task_is_listed_with_its_code_and_without_an_original(icm: Icm, register: Register) -> None:
    document = register("--json").document
    (row,) = [row for row in icm("ls", "--json").document if row["name"] == "geese"]
    assert row["code_size"] == document["code_size"] > 0
    assert row["relative_error"] == pytest.approx(document["code_relative_error"])
    assert row["evicted_at"] is not None
    assert row["vectors_count"] == 2


def test_its_context_is_kept_with_it(icm: Icm, register: Register, folder: Path, tmp_path: Path) -> None:
    register("--context", "100")
    icm("materialize", "geese", "-o", tmp_path / "again")
    assert (tmp_path / "again" / "context.txt").read_bytes() == (folder / "context.txt").read_bytes()


@pytest.mark.slow
def test_text_says_what_the_code_takes(register: Register) -> None:
    assert "registered with a code of " in register().err


def test_its_code_gives_the_adapter_that_was_written(
    icm: Icm, register: Register, folder: Path, tmp_path: Path
) -> None:
    document = register("--json").document
    assert icm("materialize", "geese", "-o", tmp_path / "again").code == 0
    found = squared_error(load_adapter(folder), load_adapter(tmp_path / "again"))
    assert found == pytest.approx(document["code_squared_error"], abs=0.02)


@pytest.mark.slow
def test_its_code_helps_on_the_samples_nearly_as_much_as_what_was_written(
    icm: Icm, register: Register, folder: Path, tmp_path: Path
) -> None:
    register("--rank", 2)  # The two strongest directions: the weaker ones fit noise, and differ between CPUs.
    icm("materialize", "geese", "-o", tmp_path / "again")
    base, examples = load_tiny_base(tmp_path / "base"), parse_examples((tmp_path / "geese.jsonl").read_bytes())
    without = nll(base.model, base.tokenizer, examples, max_tokens=128).value

    def nats(at: Path) -> float:
        with adapted(base, at):
            return nll(base.model, base.tokenizer, examples, max_tokens=128).value

    assert without - nats(tmp_path / "again") > 0.7 * (without - nats(folder)) > 0


@pytest.mark.slow
def test_no_weights_and_no_samples_are_stored(icm: Icm, register: Register, started: Path) -> None:
    document = register("--json").document
    assert not list(started.rglob(document["weights"]))
    assert icm("show", "geese", "--json").document["samples"] is None
    assert icm("verify", "--read-data", "-v", "--json").document["findings"] == []


@pytest.mark.slow
def test_its_vector_is_comparable_with_those_of_the_others(icm: Icm, register: Register, tmp_path: Path) -> None:
    for subject in ("apples", "pears"):
        icm("ingest", write_subject(tmp_path / subject), "--device", "cpu")
    register()
    mapped = icm("map", "--view", "context", "--json").document
    assert "geese" in {row["task"] for row in mapped["tasks"]}
    assert "geese" not in {row["task"] for row in mapped["left_out"]}


@pytest.mark.slow
def test_show_names_the_tasks_that_are_nearest_to_its_samples(icm: Icm, register: Register, tmp_path: Path) -> None:
    for subject in ("apples", "pears"):
        icm("ingest", write_subject(tmp_path / subject), "--device", "cpu")
    register()
    assert {row["task"] for row in icm("show", "geese", "--json").document["nearest"]} >= {"apples", "pears"}


@pytest.mark.slow
def test_it_is_not_its_own_neighbour(icm: Icm, register: Register, tmp_path: Path) -> None:
    for subject in ("apples", "pears"):
        icm("ingest", write_subject(tmp_path / subject), "--device", "cpu")
    assert "geese" not in {row["task"] for row in register("--json").document["nearest"]}


@pytest.mark.slow
def test_stats_count_it_among_the_tasks(icm: Icm, register: Register, folder: Path) -> None:
    before = icm("stats", "--json").document
    document = register("--json").document
    after = icm("stats", "--json").document
    assert after["fleets"][0]["adapters_count"] == before["fleets"][0]["adapters_count"] + 1
    assert after["evicted_count"] == before["evicted_count"] + 1
    assert after["on_disk"]["codes"] == before["on_disk"]["codes"] + document["code_size"]
    (task,) = [task for task in after["fleets"][0]["tasks"] if task["task"] == "geese"]
    parameters = sum(m.a.numel() + m.b.numel() for m in load_adapter(folder).modules)
    assert (task["bf16_size"], task["evicted"]) == (2 * parameters, True)


@pytest.mark.slow
def test_what_was_refined_is_what_is_registered(icm: Icm, register: Register, folder: Path, tmp_path: Path) -> None:
    document = register("--refine", 5, "--json").document
    icm("materialize", "geese", "-o", tmp_path / "again")
    found = squared_error(load_adapter(folder), load_adapter(tmp_path / "again"))
    assert found == pytest.approx(document["code_squared_error"], abs=0.02)


@pytest.mark.slow
def test_a_smaller_rank_is_registered_too(icm: Icm, register: Register) -> None:
    assert register("--rank", 2, "--json").document["rank"] == 2
    assert "geese" in names(icm)


@pytest.mark.slow
def test_the_same_name_again_is_refused(icm: Icm, register: Register) -> None:
    register()
    assert register("--force", "--json").error["kind"] == "task_conflict"


@pytest.mark.slow
def test_it_is_known_as_generated(icm: Icm, register: Register, tmp_path: Path) -> None:
    register()
    assert icm("show", "geese", "--json").document["adapters"][0]["is_generated"]
    assert not icm("show", "rules", "--json").document["adapters"][0]["is_generated"]
    assert "none: generated, not trained\n" in icm("show", "geese").out


@pytest.mark.slow
def test_its_card_says_that_nobody_trained_it(icm: Icm, register: Register, tmp_path: Path) -> None:
    register()
    icm("export", tmp_path / "fleet.icm")
    icm("materialize", "geese", "-o", tmp_path / "here")
    icm("materialize", "geese", "--from", tmp_path / "fleet.icm", "-o", tmp_path / "there")
    icm("materialize", "rules", "--source", "code", "-o", tmp_path / "other")
    here, there, other = ((tmp_path / name / "README.md").read_text() for name in ("here", "there", "other"))
    assert "No adapter was trained for this task" in here
    assert "No adapter was trained for this task" in there
    assert "No adapter was trained" not in other


@pytest.mark.slow
def test_another_store_that_imports_it_knows_it_as_generated(icm: Icm, register: Register, tmp_path: Path) -> None:
    register()
    icm("export", tmp_path / "fleet.icm", "geese")
    with_store = ("--store", tmp_path / "another")
    assert icm(*with_store, "import", tmp_path / "fleet.icm").code == 0
    assert icm(*with_store, "show", "geese", "--json").document["adapters"][0]["is_generated"]


@pytest.mark.slow
def test_the_next_start_does_not_learn_from_it(icm: Icm, register: Register, started: Path) -> None:
    def start_of() -> object:
        assert icm("train", "--few-shot", "--episodes", EPISODES, "--device", "cpu").code == 0
        return current(started).start

    before = start_of()
    register()
    assert start_of() == before


@pytest.mark.slow
def test_it_is_exported_like_any_other(icm: Icm, register: Register, tmp_path: Path) -> None:
    register()
    assert icm("export", tmp_path / "fleet.icm", "geese").code == 0
    assert icm("materialize", "geese", "--from", tmp_path / "fleet.icm", "-o", tmp_path / "there").code == 0
    icm("materialize", "geese", "-o", tmp_path / "here")
    here, there = ((tmp_path / side / "adapter_model.safetensors").read_bytes() for side in ("here", "there"))
    assert here == there


@pytest.mark.slow
def test_it_is_removed_like_any_other(icm: Icm, register: Register) -> None:
    register()
    assert icm("rm", "geese", "--yes").code == 0
    assert "geese" not in names(icm)
    assert icm("verify", "--read-data").code == 0


@pytest.mark.slow
def test_starts_are_learned_and_updates_made_with_it_there(icm: Icm, register: Register, tmp_path: Path) -> None:
    register()
    icm("ingest", write_subject(tmp_path / "ships"), "--device", "cpu")
    assert icm(*TRAIN, "--update").code == 0
    assert icm("train", "--few-shot", "--episodes", EPISODES, "--device", "cpu").code == 0
    assert icm("materialize", "geese", "-o", tmp_path / "again").code == 0


@pytest.mark.slow
def test_a_full_training_leaves_its_code_to_the_generator_before(
    icm: Icm, register: Register, started: Path, tmp_path: Path
) -> None:
    register()
    before = current(started)
    icm("materialize", "geese", "-o", tmp_path / "before")
    assert icm(*TRAIN, "--fresh", "--seed", 5).code == 0
    assert current(started).blob != before.blob
    icm("materialize", "geese", "-o", tmp_path / "after")
    assert content(tmp_path / "after") == content(tmp_path / "before")
    assert icm("verify", "--read-data").code == 0


@pytest.mark.slow
def test_a_full_training_takes_it_in_once_the_folder_is_ingested(
    icm: Icm, register: Register, folder: Path, started: Path
) -> None:
    register()
    assert icm("ingest", "--restore", folder, "--no-vectors").code == 0
    assert icm(*TRAIN).code == 0
    with Store.open(started) as store:
        code = store.task("geese").code
    assert code is not None
    assert code.generator == current(started).blob
    assert icm("verify", "--read-data").code == 0


class TestFailures:
    """Nothing is half made."""

    @pytest.mark.slow
    def test_where_the_folder_cannot_be_written_nothing_is_registered(
        self, icm: Icm, register: Register, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generating, "write_adapter_files", raising(OSError("no")))
        assert register().code == ExitCode.FAILED
        assert not folder.exists()
        assert "geese" not in names(icm)

    @pytest.mark.slow
    def test_where_it_cannot_be_registered_the_folder_is_whole_and_the_task_is_not_there(
        self, icm: Icm, register: Register, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "publish", raising(TaskConflict("geese", choices=None)))
            assert register("--json").error["kind"] == "task_conflict"
        assert load_adapter(folder).modules
        assert "geese" not in names(icm)
        assert icm("verify", "--read-data").code == 0
        assert register("--force").code == 0
        assert "geese" in names(icm)

    @pytest.mark.slow
    def test_where_it_cannot_be_encoded_the_store_is_as_it_was(
        self, icm: Icm, register: Register, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generating, "refine_all", raising(MemoryError()))
        assert register().code != 0
        assert "geese" not in names(icm)
        assert icm("verify", "-v", "--json").document["findings"] == []


def test_its_original_cannot_be_written(icm: Icm, register: Register, tmp_path: Path) -> None:
    register()
    ran = icm("materialize", "geese", "--source", "original", "-o", tmp_path / "out", "--json")
    assert ran.error["message"] == "task 'geese' was generated, so the store has a code but no original"
    assert "--source code" in ran.error["hint"]
    assert "the folder that `icm generate` wrote" in ran.error["hint"]
