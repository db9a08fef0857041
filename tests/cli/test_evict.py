"""`icm evict` and `icm edit --pin`: what goes, what stays, and what is said about it."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from icm_cli.errors import ExitCode
from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.formats.discovery.folder import load_adapter
from icmlora.generator.codec.codec import Codec
from registry.errors import StoreFull
from registry.manifests import Code, StoredAdapter
from registry.storage.sqlite import SqliteDatabase
from registry.store import Store
from tests.cli.coded import damage
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
ALL = ("evict", "--max-error", "0.7")
GAIN = ("evict", "--min-gain", "0.01", "--device", "cpu")


def blob_bytes(store: Path) -> int:
    return sum(path.stat().st_size for path in (store / "blobs").rglob("*") if path.is_file())


def finals(store: Path) -> dict[str, StoredAdapter]:
    with Store.open(store) as opened:
        return {task.name: task.final for task in opened.tasks()}


def evicted(store: Path) -> set[str]:
    return {name for name, final in finals(store).items() if final.is_evicted}


def code_of(store: Path, task: str) -> Code:
    with Store.open(store) as opened:
        code = opened.task(task).code
        assert code is not None
        return code


def tasks_of(ran: Ran) -> dict[str, dict[str, Any]]:
    return {event["task"]: event for event in ran.events if event["type"] == "task"}


def test_what_a_code_has_to_keep_must_be_said(icm: Icm, trained: Path) -> None:
    ran = icm("evict", "--json")
    assert (ran.code, "--min-gain" in ran.error["message"]) == (ExitCode.USAGE, True)
    assert evicted(trained) == set()


@pytest.mark.parametrize(
    "limit",
    [
        ("--max-error", "nan"),
        ("--max-error", "inf"),
        ("--max-error", "-1"),
        ("--min-gain", "nan"),
        ("--min-gain", "98"),
        ("--min-gain", "-5"),
    ],
)
def test_a_limit_that_makes_no_sense_is_wrong_usage(icm: Icm, limit: tuple[str, str]) -> None:
    assert icm("evict", *limit).code == ExitCode.USAGE  # without a look for the store, which is not there


def test_originals_and_checkpoints_go_and_their_bytes_are_free(icm: Icm, trained: Path) -> None:
    before = blob_bytes(trained)
    ran = icm(*ALL, "--json")
    assert (ran.code, evicted(trained)) == (0, {"poems", "rules", "silent"})
    assert [tasks_of(ran)[name]["adapters"] for name in ("poems", "rules", "silent")] == [3, 1, 1]
    summary = ran.events[-1]
    assert summary == {
        "type": "summary", "dry_run": False, "tasks": 3, "evicted": 3, "kept": 0, "freed": before - blob_bytes(trained),
        "pending": 0, "placeholders": 0, "freed_in_folders": 0,
    }  # fmt: skip
    assert icm("verify", "--read-data").code == 0


def test_a_dry_run_says_the_same_and_deletes_nothing(icm: Icm, trained: Path) -> None:
    before = blob_bytes(trained)
    planned = icm(*ALL, "--dry-run", "--json")
    assert (blob_bytes(trained), evicted(trained)) == (before, set())
    done = icm(*ALL, "--json")
    assert planned.events[-1]["freed"] == done.events[-1]["freed"] == before - blob_bytes(trained)
    for name, task in tasks_of(planned).items():
        assert task | {"status": "evicted"} == tasks_of(done)[name]


@pytest.mark.slow
def test_a_file_that_two_tasks_share_is_free_once(icm: Icm, trained: Path, mixed_template: Path) -> None:
    icm("ingest", mixed_template / "loras" / "poems", "--name", "twin", "--no-vectors")
    icm("train", "--no-eval", "--refine", "0", "--steps", 2, "--device", "cpu")
    planned, before = icm(*ALL, "-n", "--json"), blob_bytes(trained)
    assert icm(*ALL).code == 0
    assert planned.events[-1]["freed"] == before - blob_bytes(trained)


def test_the_table_says_what_each_task_kept(icm: Icm, trained: Path) -> None:
    ran = icm("evict", "rules", "--max-error", "0.7")
    heading, row, verdict = ran.out.splitlines()
    assert heading.split() == ["TASK", "RESULT", "FREED", "CODE", "RELATIVE", "ERROR", "RETAINED", "GAIN"]
    assert row.split()[:2] == ["rules", "evicted"]
    assert f"{code_of(trained, 'rules').relative_error:.4f}" in row
    assert "evicted 1 of 1 task" in verdict
    assert icm("evict", "poems", "--max-error", "0.7", "-q").out == "poems\n"


def test_a_code_that_loses_too_much_keeps_its_original(icm: Icm, trained: Path) -> None:
    errors = sorted((code_of(trained, name).relative_error or 0.0, name) for name in ("poems", "rules", "silent"))
    limit = (errors[0][0] + errors[1][0]) / 2
    ran = icm("evict", "--max-error", limit)
    assert (ran.code, evicted(trained)) == (ExitCode.PARTLY, {errors[0][1]})
    assert f"kept {errors[2][1]}: its relative error is {errors[2][0]:.4f}" in ran.out


def test_the_error_is_measured_now_and_stored(icm: Icm, trained: Path, mixed_template: Path, tmp_path: Path) -> None:
    icm("materialize", "rules", "--source", "code", "--dtype", "float32", "-o", tmp_path / "out")
    original = load_adapter(mixed_template / "loras" / "rules")
    error = math.sqrt(squared_error(original, load_adapter(tmp_path / "out")))
    with Store.open(trained) as store:
        store.update("rules", lambda task: replace(task, code=replace(task.code, squared_error=0.0)))  # type: ignore[type-var]
    assert icm("evict", "rules", "--max-error", error * 0.99).code == ExitCode.PARTLY
    assert icm("evict", "rules", "--max-error", error * 1.01).code == 0
    assert code_of(trained, "rules").relative_error == pytest.approx(error, rel=1e-3)


def test_a_task_without_a_code_is_kept(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "late", seed=7), "--no-vectors")
    ran = icm(*ALL, "--json")
    assert (ran.code, tasks_of(ran)["late"]["status"]) == (ExitCode.PARTLY, "kept")
    assert "icm train" in tasks_of(ran)["late"]["reason"]
    assert "late" not in evicted(trained)


def test_an_unknown_name_evicts_nothing(icm: Icm, trained: Path) -> None:
    assert icm("evict", "poems", "nope", "--max-error", "0.7").code == ExitCode.FAILED
    assert evicted(trained) == set()


def precise(icm: Icm) -> None:
    """Give `rules` a code that keeps a gain: its adapter is random, so a coarse code may do anything."""
    assert icm("encode", "rules", "--max-error", "0.045").code == 0


def test_the_gain_is_measured_and_kept_with_that_of_the_original(icm: Icm, trained: Path) -> None:
    precise(icm)
    ran = icm(*GAIN, "rules", "--json")
    gain = tasks_of(ran)["rules"]["retained_gain"]
    assert (ran.code, gain >= 0.01) == (0, True)
    rungs = {row["source"]: row["retained_gain"] for row in icm("show", "rules", "--json").document["evaluations"]}
    assert rungs == {"base": None, "original": None, "code": gain}


@pytest.mark.slow
def test_a_dry_run_records_no_measurement(icm: Icm, trained: Path) -> None:
    precise(icm)
    assert tasks_of(icm(*GAIN, "rules", "-n", "--json"))["rules"]["retained_gain"] > 0
    assert icm("show", "rules", "--json").document["evaluations"] == []


def test_a_dry_run_writes_nothing_into_the_store_not_even_its_name(icm: Icm, trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert icm(*ALL, "-n").code == 0
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_too_small_a_gain_keeps_the_original(icm: Icm, trained: Path, plain_gains: None) -> None:
    ran = icm("evict", "rules", "--min-gain", 1, "--device", "cpu")
    assert (ran.code, evicted(trained)) == (ExitCode.PARTLY, set())
    assert "below the limit of 1" in ran.out


@pytest.mark.slow
def test_both_limits_must_hold(icm: Icm, trained: Path) -> None:
    precise(icm)
    assert icm(*GAIN, "rules", "--max-error", 0.001).code == ExitCode.PARTLY
    assert icm(*GAIN, "rules", "--max-error", 0.7).code == 0


def test_without_held_out_text_the_gain_is_unknown_and_the_original_kept(icm: Icm, trained: Path) -> None:
    ran = icm(*GAIN, "silent", "--json")
    assert (ran.code, evicted(trained)) == (ExitCode.PARTLY, set())
    assert "held-out text" in tasks_of(ran)["silent"]["reason"]


def test_without_the_base_model_the_original_is_kept(icm: Icm, trained: Path) -> None:
    icm("base", "rm", LABEL)
    ran = icm(*GAIN, "rules", "--json")
    assert (ran.code, evicted(trained)) == (ExitCode.PARTLY, set())
    assert LABEL in tasks_of(ran)["rules"]["reason"]


def not_finite(adapter: Adapter) -> Adapter:
    first, *others = adapter.modules
    return replace(adapter, modules=(replace(first, a=first.a * float("nan")), *others))


def of_another_shape(adapter: Adapter) -> Adapter:
    first, *others = adapter.modules
    return replace(adapter, modules=(replace(first, a=torch.zeros(first.a.shape[0], 3)), *others))


def without_a_module(adapter: Adapter) -> Adapter:
    return replace(adapter, modules=adapter.modules[:1])


def crashing(adapter: Adapter) -> Adapter:
    raise IndexError("out of range")


@pytest.mark.parametrize("lie", [not_finite, of_another_shape, without_a_module, crashing, lambda adapter: None])
def test_a_codec_that_lies_costs_no_original(
    icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch, lie: Callable[[Adapter], Adapter]
) -> None:
    real, before = Codec.decode, blob_bytes(trained)
    monkeypatch.setattr(Codec, "decode", lambda self, data: lie(real(self, data)))
    ran = icm("evict", "poems", "rules", "--max-error", "0.45", "--json")
    assert (ran.code, evicted(trained), blob_bytes(trained)) == (ExitCode.PARTLY, set(), before)
    assert all(task["reason"] for task in tasks_of(ran).values())


@pytest.mark.parametrize("part", ["code", "generator", "original"])
def test_nothing_goes_where_a_part_is_damaged(icm: Icm, trained: Path, part: str) -> None:
    code = code_of(trained, "rules")
    digests = {"code": code.blob, "generator": code.generator, "original": finals(trained)["rules"].weights}
    damage(trained, digests[part])
    ran = icm(*ALL, "rules", "--json")
    assert (ran.code, evicted(trained)) == (ExitCode.PARTLY, set())
    assert "damaged" in tasks_of(ran)["rules"]["reason"]


@pytest.mark.slow
def test_one_adapter_at_a_time_is_in_memory(icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, alive = Codec.decode, []

    def decode(self: Codec, data: bytes) -> Adapter:
        gc.collect()
        alive.append(sum(reference() is not None for reference in seen))
        adapter = real(self, data)
        seen.append(weakref.ref(adapter.modules[0].a))
        return adapter

    seen: list[Any] = []
    monkeypatch.setattr(Codec, "decode", decode)
    assert icm(*ALL).code == 0
    assert alive == [0, 0, 0]


def test_a_second_run_has_nothing_to_do(icm: Icm, trained: Path) -> None:
    icm(*ALL)
    ran = icm(*ALL, "--json")
    assert (ran.code, {task["status"] for task in tasks_of(ran).values()}) == (0, {"known"})
    assert all(task["relative_error"] is not None for task in tasks_of(ran).values())


def test_a_full_disk_can_be_emptied(icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, reserve = SqliteDatabase.write, trained / "reserve"

    def write(database: SqliteDatabase) -> object:
        if reserve.exists():
            raise StoreFull("database or disk is full")
        return real(database)

    monkeypatch.setattr(SqliteDatabase, "write", write)
    assert icm("evict", "--max-error", "0.7").code == 0
    assert (evicted(trained), reserve.exists()) == ({"poems", "rules", "silent"}, True)


def test_pinned_tasks_are_kept(icm: Icm, trained: Path) -> None:
    assert icm("edit", "Rules", "rules", "--pin", "--json").document[0]["pinned"] is True
    ran = icm(*ALL, "--json")
    assert (ran.code, evicted(trained), tasks_of(ran)["rules"]["status"]) == (0, {"poems", "silent"}, "pinned")
    assert icm(*ALL, "rules").code == ExitCode.PARTLY
    assert icm("edit", "rules", "--no-pin", "--json").document[0]["pinned"] is False
    assert icm(*ALL, "rules").code == 0


def test_ls_and_show_tell_pinned_and_evicted(icm: Icm, trained: Path) -> None:
    icm("edit", "rules", "--pin")
    icm(*ALL)
    rows = {row["name"]: row for row in icm("ls", "--json").document}
    assert (rows["rules"]["pinned"], rows["rules"]["evicted_at"]) == (True, None)
    assert (rows["poems"]["pinned"], rows["poems"]["evicted_at"] is not None) == (False, True)
    assert (rows["poems"]["checkpoints_count"], rows["poems"]["evicted_checkpoints_count"]) == (0, 2)
    lines = icm("ls").out.splitlines()
    assert ("evicted" in lines[1], "pinned" in lines[2]) == (True, True)
    assert "in the store, pinned" in icm("show", "rules").out
    assert icm("show", "poems").out.count("evicted") == 4


def test_pinning_what_is_gone_says_so(icm: Icm, trained: Path) -> None:
    icm(*ALL)
    assert "no original" in icm("edit", "poems", "--pin").err


def test_checkpoints_alone_can_go(icm: Icm, trained: Path) -> None:
    ran = icm(*ALL, "--checkpoints-only", "--json")
    assert (ran.code, evicted(trained)) == (0, set())
    assert {name: task["status"] for name, task in tasks_of(ran).items()} == {
        "poems": "evicted", "rules": "known", "silent": "known",
    }  # fmt: skip
    assert icm("ls", "--json").document[0]["checkpoints_count"] == 0


def test_checkpoints_that_came_after_an_eviction_can_go_too(
    icm: Icm, trained: Path, mixed_template: Path, tmp_path: Path
) -> None:
    icm(*ALL)
    folder = tmp_path / "poems"
    write_lora(folder, seed=1)
    write_lora(folder / "checkpoint-30", seed=30)
    assert icm("ingest", folder, "--no-vectors", "--json").events[-1]["new"] == 1
    assert tasks_of(icm(*ALL, "poems", "--json"))["poems"]["adapters"] == 1


def test_an_earlier_version_can_go_alone(icm: Icm, trained: Path, tmp_path: Path) -> None:
    first = finals(trained)["rules"]
    write_lora(tmp_path / "rules", seed=77)
    assert icm("ingest", tmp_path / "rules", "--on-conflict", "version", "--no-vectors").code == 0
    ran = icm(*ALL, "rules@1", "RULES", "--json")
    assert {name: task["status"] for name, task in tasks_of(ran).items()} == {"rules": "kept", "rules@1": "evicted"}
    assert ran.events[-1]["freed"] == first.weights.size
    assert not (trained / "blobs" / first.weights[0] / first.weights).exists()
    assert evicted(trained) == set()
    assert icm("materialize", "rules@1", "-o", tmp_path / "out").code == 0
    assert icm("verify", "--read-data").code == 0


def test_while_another_process_uses_the_store_the_next_prune_frees_the_bytes(icm: Icm, trained: Path) -> None:
    before = blob_bytes(trained)
    with Store.open(trained):
        ran = icm(*ALL, "rules", "--lock-timeout", "0")
    assert (ran.code, evicted(trained), blob_bytes(trained)) == (0, {"rules"}, before)
    assert "the next `icm prune` frees" in ran.err
    assert icm("prune", "--grace", "0s", "--yes").code == 0
    assert blob_bytes(trained) < before
    assert icm("verify", "--read-data").code == 0


def test_the_next_eviction_frees_them_too(icm: Icm, trained: Path) -> None:
    before, size = blob_bytes(trained), finals(trained)["rules"].weights.size
    with Store.open(trained):
        ran = icm(*ALL, "rules", "--lock-timeout", "0", "--json")
    assert (ran.events[-1]["freed"], ran.events[-1]["pending"]) == (0, size)
    again = icm(*ALL, "rules", "--json")
    assert (tasks_of(again)["rules"]["status"], tasks_of(again)["rules"]["left"]) == ("known", size)
    assert again.events[-1]["freed"] == size == before - blob_bytes(trained)


def test_a_task_that_changes_during_its_check_is_kept(icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, changed = Store.update, list[str]()

    def update(store: Store, name: str, change: Callable[[Any], Any]) -> object:
        if not changed:
            changed.append(name)
            real(store, name, lambda task: replace(task, pinned=True))
        return real(store, name, change)

    monkeypatch.setattr(Store, "update", update)
    ran = icm(*ALL, "rules")
    assert (ran.code, evicted(trained)) == (ExitCode.PARTLY, set())
    assert "it was pinned" in ran.out
