"""What a command does when another icm replaces what it has read and not used yet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from icmlora.base_models.kinds import likelihood
from icmlora.fleet.encode import search
from icmlora.fleet.evict.evictor import Evictor
from icmlora.fleet.evict.types import TaskEvicted
from icmlora.fleet.measure.measure import TaskLosses
from icmlora.fleet.vectors import extraction as vectors
from icmlora.generator.codec.generator_file import GeneratorFile
from icmlora.generator.files import file as generator_file
from registry.manifests import File, Task
from registry.store import Store
from tests.cli.coded import codes, current, make_another_current, tasks_of
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import icm_quietly, write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
Happen = Callable[[], object]
EVAL = ("eval", "poems", "--device", "cpu")


def before(patch: pytest.MonkeyPatch, owner: object, name: str, *happen: Happen) -> None:
    """Let something happen before the first calls of a function, or of a method."""

    def call(*arguments: Any, **options: Any) -> Any:
        next(happening)()
        return real(*arguments, **options)

    happening = chain(happen, repeat(lambda: None))
    real = getattr(owner, name)
    patch.setattr(owner, name, call)


def put_code(store: Path, task: str, data: bytes) -> None:
    """Give a task another code, as `icm encode` does."""
    with Store.open(store) as opened:
        blob = File(opened.blobs.put(data), len(data))
        opened.update(task, lambda found: replace(found, code=replace(found.code, blob=blob)))


def replace_adapter(store: Path, folder: Path) -> None:
    icm_quietly(store, "ingest", folder, "--on-conflict", "version", "--no-vectors")


def remove(store: Path, name: str) -> None:
    """Remove a task, as `icm rm` does."""
    with Store.open(store) as opened:
        opened.remove(opened.named([name]))


def measured(store: Path) -> dict[str, str | None]:
    """Return the recorded sources of `poems`, with the networks that they depend on."""
    with Store.open(store) as opened:
        return {one.source: one.generator for one in opened.task("poems").measured}


def remove_file(store: Path, task: str) -> None:
    digest = codes(store)[task].blob
    (store / "blobs" / digest[0] / digest).unlink()


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another adapter for the task `poems`."""
    return write_lora(tmp_path / "other" / "poems", seed=77)


@pytest.fixture(scope="module")
def finer(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Other codes for `poems` and `rules`, which the present generator decodes."""
    store = Path(shutil.copytree(trained_template, tmp_path_factory.mktemp("finer") / "store"))
    icm_quietly(store, "encode", "poems", "rules", "--max-error", "0.045")
    with Store.open(store) as opened:
        return {task: opened.blobs.read(row.blob) for task, row in codes(store).items()}


class TestVectors:
    """`icm vectors`."""

    VECTORS = ("vectors", "poems", "--again", "--device", "cpu")

    def of_poems(self, store: Path) -> Sequence[object]:
        with Store.open(store) as opened:
            return opened.task("poems").vectors

    def test_those_of_an_adapter_that_was_replaced_are_not_stored(
        self, icm: Icm, mixed: Path, other: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before(monkeypatch, vectors, "extract_adapted", lambda: replace_adapter(mixed, other))
        ran = icm(*self.VECTORS)
        assert (ran.code, "changed during extraction: poems" in ran.err) == (0, True)
        assert self.of_poems(mixed) == ()
        assert icm("vectors", "--device", "cpu", "--json").events[-1]["extracted"] == 1

    def test_those_of_samples_that_were_replaced_are_not_stored(
        self, icm: Icm, mixed: Path, mixed_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def replace_samples() -> None:
            folder = mixed_template / "loras" / "poems"
            icm_quietly(mixed, "ingest", folder, "--samples", samples, "--no-vectors")

        samples = tmp_path / "other.jsonl"
        samples.write_text(json.dumps({"text": "something else"}) + "\n")
        before(monkeypatch, vectors, "extract_context", replace_samples)
        assert icm(*self.VECTORS, "--json").events[-1]["extracted"] == 0
        assert self.of_poems(mixed) == ()


class TestEval:
    """`icm eval`."""

    def while_it_measures(self, patch: pytest.MonkeyPatch, source: str, happen: Happen) -> None:
        def score_of(losses: TaskLosses, label: str, folder: Path) -> object:
            if label == source:
                happen()
            return real(losses, label, folder)

        real = TaskLosses.score_of
        patch.setattr(TaskLosses, "score_of", score_of)

    def test_the_gain_of_a_code_that_was_replaced_is_not_recorded(
        self, icm: Icm, trained: Path, finer: dict[str, bytes]
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            self.while_it_measures(patch, "code", lambda: put_code(trained, "poems", finer["poems"]))
            ran = icm(*EVAL)
        assert (ran.code, "not fully recorded, changed by another icm process: poems" in ran.err) == (0, True)
        assert set(measured(trained)) == {"base", "original", "recalled"}
        assert "recorded" not in icm(*EVAL).err
        assert set(measured(trained)) == {"base", "original", "code", "recalled"}

    def test_the_score_of_an_original_that_was_replaced_is_not_recorded(
        self, icm: Icm, trained: Path, other: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.while_it_measures(monkeypatch, "original", lambda: replace_adapter(trained, other))
        ran = icm(*EVAL)
        assert (ran.code, "not fully recorded, changed by another icm process: poems" in ran.err) == (0, True)
        assert "original" not in measured(trained)

    def test_a_task_that_was_removed_is_named_and_the_others_are_measured(
        self, icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before(monkeypatch, likelihood, "nll", lambda: remove(trained, "poems"))
        ran = icm("eval", "--device", "cpu")
        assert (ran.code, "not fully recorded, changed by another icm process: poems" in ran.err) == (0, True)
        assert [line.split()[0] for line in ran.out.splitlines()[1:2]] == ["rules"]

    def test_what_is_measured_stands_under_the_generator_that_made_it(
        self, icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = current(trained)
        before(monkeypatch, likelihood, "nll", lambda: make_another_current(trained))
        assert icm(*EVAL).code == 0
        assert current(trained).blob != first.blob
        assert measured(trained) == {"base": None, "original": None, "code": first.blob, "recalled": first.blob}


class TestEncode:
    """`icm encode`."""

    def test_a_task_whose_adapter_was_replaced_is_left_out_and_named(
        self, icm: Icm, trained: Path, other: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before(monkeypatch, search, "read_original", lambda: replace_adapter(trained, other))
        ran = icm("encode", "poems", "rules", "--max-error", "0.1")
        assert (ran.code, "poems: its adapter changed during encoding" in ran.out) == (ExitCode.PARTLY, True)
        assert set(codes(trained)) == {"rules", "silent"}

    def test_a_task_that_was_removed_is_left_out_and_named(
        self, icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before(monkeypatch, search, "read_original", lambda: remove(trained, "poems"))
        ran = icm("encode", "poems", "rules", "--max-error", "0.1", "--json")
        assert {name: event["status"] for name, event in tasks_of(ran).items()} == {
            "poems": "changed", "rules": "encoded",
        }  # fmt: skip


class TestJobLock:
    """`icm encode` and `icm evict` wait for other long jobs of the same base model."""

    def test_while_another_job_runs_an_encode_says_which_base_model_is_in_use(self, icm: Icm, trained: Path) -> None:
        with Store.open(trained, command="icm train") as opened, opened.job(LABEL):
            ran = icm("encode", "--max-error", "0.7", "--lock-timeout", "0", "--json")
        assert (ran.code, ran.error["kind"]) == (ExitCode.LOCKED, "store_locked")
        assert LABEL in ran.error["message"]

    @pytest.mark.one_case
    @pytest.mark.parametrize(
        "command", [("evict", "--max-error", "0.7", "--dry-run"), ("eval", "poems", "--device", "cpu")]
    )
    def test_a_dry_run_and_an_evaluation_do_not_wait(self, icm: Icm, trained: Path, command: tuple[str, ...]) -> None:
        with Store.open(trained, command="icm train") as opened, opened.job(LABEL):
            assert icm(*command, "--lock-timeout", "0").code == 0


class TestMaterialize:
    """`icm materialize`."""

    CODE = ("materialize", "rules", "--source", "code", "--json")

    def test_a_code_that_was_replaced_is_still_there_for_who_has_read_its_row(
        self, icm: Icm, trained: Path, finer: dict[str, bytes], tmp_path: Path
    ) -> None:
        earlier = icm(*self.CODE, "-o", tmp_path / "earlier")
        with pytest.MonkeyPatch.context() as patch:
            before(patch, GeneratorFile, "__init__", lambda: put_code(trained, "rules", finer["rules"]))
            ran = icm(*self.CODE, "-o", tmp_path / "out")
        assert ran.document["weights"] == earlier.document["weights"]

    def test_a_code_whose_file_is_gone_is_damage(self, icm: Icm, trained: Path, tmp_path: Path) -> None:
        remove_file(trained, "rules")
        ran = icm(*self.CODE, "-o", tmp_path / "out")
        assert (ran.code, ran.error["kind"]) == (ExitCode.DAMAGED, "missing_blob")


class TestExport:
    """`icm export`."""

    def test_a_code_that_was_replaced_is_still_there_for_who_has_read_its_row(
        self, icm: Icm, trained: Path, finer: dict[str, bytes], tmp_path: Path
    ) -> None:
        icm("export", tmp_path / "earlier.icm")
        with pytest.MonkeyPatch.context() as patch:
            before(patch, generator_file, "versions_of", lambda: put_code(trained, "rules", finer["rules"]))
            assert icm("export", tmp_path / "out.icm").code == 0
        assert (tmp_path / "out.icm").read_bytes() == (tmp_path / "earlier.icm").read_bytes()

    def test_a_named_code_whose_file_is_gone_is_damage(self, icm: Icm, trained: Path, tmp_path: Path) -> None:
        remove_file(trained, "rules")
        ran = icm("export", tmp_path / "out.icm", "rules", "--json")
        assert (ran.code, "rules" in ran.error["message"]) == (ExitCode.DAMAGED, True)


def test_an_eviction_passes_over_a_task_that_was_removed_meanwhile(
    icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evict(evictor: Evictor, task: Task, checked: Any) -> TaskEvicted:
        done = real(evictor, task, checked)
        if task.name == "poems":
            remove(trained, "rules")
        return done

    real = Evictor.evict
    monkeypatch.setattr(Evictor, "evict", evict)
    ran = icm("evict", "--max-error", "0.7", "--json")
    found = {event["task"]: event["status"] for event in ran.events if event["type"] == "task"}
    assert (ran.code, found) == (0, {"poems": "evicted", "rules": "removed", "silent": "evicted"})
