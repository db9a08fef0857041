"""`icm encode`: the smallest code that keeps what is asked for, and what is said where there is none."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora.adapter.metrics import squared_error
from icmlora.fleet.encode.search import CodeSearch
from icmlora.formats.discovery.folder import load_adapter
from icmlora.generator.codec.encoding import Encoded
from icmlora.generator.config import keep_of
from icmlora.io.text import human_size
from registry.store import Store
from tests.cli.coded import codes, tasks_of
from tests.cli.conftest import Ran

Icm = Callable[..., Ran]


def stop_after_one(patch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C once the first code is made."""

    def best(self: CodeSearch) -> tuple[Encoded, float | None, bool]:
        found = real(self)
        os.kill(os.getpid(), signal.SIGINT)
        return found

    real = CodeSearch.best
    patch.setattr(CodeSearch, "best", best)


@pytest.mark.slow
def test_without_a_limit_every_code_is_refined_at_the_generators_quality(icm: Icm, trained: Path) -> None:
    ran = icm("encode", "--refine", "2", "--device", "cpu", "--json")
    assert ran.code == 0
    tasks = tasks_of(ran)
    assert {event["status"] for event in tasks.values()} == {"encoded"}
    asked = {name: code.asked for name, code in codes(trained).items()}
    assert all(limits is not None and (limits.keep, limits.refined) == (keep_of(4), 2) for limits in asked.values())
    assert all(event["effect"] > 0.9 for event in tasks.values())


@pytest.mark.slow
def test_every_code_keeps_the_error_that_was_asked_for(icm: Icm, trained: Path) -> None:
    ran = icm("encode", "--max-error", "0.14", "--json")
    assert ran.code == 0
    assert {event["status"] for event in tasks_of(ran).values()} == {"encoded"}
    assert all(0.1 < (code.relative_error or 1) <= 0.14 for code in codes(trained).values())


@pytest.mark.slow
def test_what_is_written_from_the_new_code_has_the_error_that_was_said(icm: Icm, trained: Path, tmp_path: Path) -> None:
    (name, *_) = tasks_of(icm("encode", "--max-error", "0.14", "--json"))
    said = codes(trained)[name].squared_error
    for source in ("original", "code"):
        assert (
            icm("materialize", name, "-o", str(tmp_path / source), "--source", source, "--dtype", "float32").code == 0
        )
    pair = (load_adapter(tmp_path / source) for source in ("original", "code"))
    assert squared_error(*pair) == pytest.approx(said, rel=1e-2)


def test_more_error_takes_fewer_bytes(icm: Icm, trained: Path) -> None:
    sizes = []
    for limit in ("0.55", "0.17", "0.055"):
        icm("encode", "--max-error", limit)
        sizes.append(sum(code.size for code in codes(trained).values()))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.slow
def test_a_size_makes_codes_of_at_most_so_many_bytes(icm: Icm, trained: Path) -> None:
    ran = icm("encode", "--size", "0.5KiB", "--json")
    assert ran.code == 0
    assert all(300 < code.size <= 512 for code in codes(trained).values())
    assert {event["status"] for event in tasks_of(icm("encode", "--size", "512", "--json")).values()} == {"known"}


def test_a_size_that_no_code_keeps_is_told_with_the_smallest_one(icm: Icm, trained: Path) -> None:
    ran = icm("encode", "--size", "20B", "poems")
    assert ran.code == ExitCode.PARTLY
    assert f"poems: its smallest code takes {codes(trained)['poems'].size} bytes" in ran.out
    assert "no code meets at most 20 B" in icm("stats").out


@pytest.mark.slow
def test_a_code_that_was_made_for_the_same_limits_is_left_as_it_is(icm: Icm, trained: Path) -> None:
    first = tasks_of(icm("encode", "--max-error", "0.14", "--json"))
    before = codes(trained)
    again = icm("encode", "--max-error", "0.14", "--json")
    assert again.code == 0
    assert {name: event["size"] for name, event in tasks_of(again).items()} == {
        name: event["size"] for name, event in first.items()
    }
    assert {event["status"] for event in tasks_of(again).values()} == {"known"}
    assert codes(trained) == before


@pytest.mark.slow
def test_and_is_made_again_where_that_is_asked_for_or_the_limits_are_others(icm: Icm, trained: Path) -> None:
    icm("encode", "--max-error", "0.14")
    for other in (("--max-error", "0.14", "--again"), ("--max-error", "0.17"), ("--quality", "7", "--refine", "0")):
        assert {event["status"] for event in tasks_of(icm("encode", *other, "--json")).values()} == {"encoded"}


@pytest.mark.slow
def test_a_stopped_run_does_only_what_is_left(icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after_one(patch)
        ran = icm("encode", "--max-error", "0.14", "--json")
    assert ran.code == ExitCode.INTERRUPTED
    done = set(tasks_of(ran))
    told = tasks_of(icm("encode", "--max-error", "0.14", "--json"))
    assert {name for name, event in told.items() if event["status"] == "known"} == done
    assert set(told) > done


def test_if_no_code_meets_the_error_the_earlier_one_stays_as_the_help_says(icm: Icm, trained: Path) -> None:
    before = codes(trained)
    ran = icm("encode", "poems", "--max-error", "0.000001")
    assert (ran.code, codes(trained)) == (ExitCode.PARTLY, before)
    assert "poems: no code has a relative error of 1e-06 or less" in ran.out
    assert "with --max-error alone the task keeps its earlier code" in " ".join(icm("encode", "--help").out.split())


def test_only_the_named_tasks_are_encoded(icm: Icm, trained: Path) -> None:
    before = codes(trained)
    name = sorted(before)[0]
    icm("encode", name, "--max-error", "0.055")
    after = codes(trained)
    assert {task for task in before if before[task].blob != after[task].blob} == {name}


@pytest.mark.slow
def test_a_prune_frees_as_many_bytes_of_replaced_codes_as_was_said(icm: Icm, trained: Path) -> None:
    old = codes(trained)
    ran = icm("encode", "--max-error", "0.055")
    size = sum(code.size for code in old.values())
    assert f"`icm prune` frees {human_size(size)} of replaced files" in ran.err
    kept = {path.name for path in (trained / "blobs").rglob("*") if path.is_file()}
    assert {code.blob for code in old.values()} <= kept
    with Store.open(trained) as store:
        store.prune(grace=0)
    gone = kept - {path.name for path in (trained / "blobs").rglob("*") if path.is_file()}
    assert {code.blob for code in old.values()} <= gone
    assert icm("verify", "--read-data").code == 0


@pytest.mark.slow
def test_the_code_of_an_evicted_task_stays(icm: Icm, trained: Path) -> None:
    name = sorted(codes(trained))[0]
    assert icm("evict", name, "--max-error", "0.95").code == 0
    before = codes(trained)[name]
    told = tasks_of(icm("encode", "--max-error", "0.055", "--json"))
    assert told[name]["status"] == "evicted"
    assert codes(trained)[name] == before


def test_an_evicted_task_that_is_named_is_not_passed_over_in_silence(icm: Icm, trained: Path) -> None:
    assert icm("evict", "rules", "--max-error", "0.95").code == 0
    ran = icm("encode", "rules", "--max-error", "0.055")
    assert ran.code == ExitCode.PARTLY
    assert "rules: its original is not in the store, so its code cannot be replaced" in ran.out


def test_without_a_generator_there_is_a_hint(icm: Icm, stored: Path) -> None:
    ran = icm("encode", "--max-error", "0.32", "--json")
    assert ran.code != 0
    assert "icm train" in str(ran.error["hint"])


@pytest.mark.slow
def test_train_encodes_as_asked_for(icm: Icm, trained: Path) -> None:
    ran = icm("train", "--steps", "5", "--fresh", "--no-eval", "--refine", "0", "--max-error", "0.1", "--device", "cpu")
    assert ran.code == 0
    assert all((code.relative_error or 1) <= 0.1 for code in codes(trained).values())


def test_a_refined_code_is_another_code_of_the_same_task(icm: Icm, trained: Path) -> None:
    name = sorted(codes(trained))[0]
    sizes = []
    for steps in ("0", "3"):
        ran = icm("encode", name, "--quality", "2", "--refine", steps, "--device", "cpu", "--json")
        assert (ran.code, tasks_of(ran)[name]["status"]) == (0, "encoded")
        sizes.append(codes(trained)[name].blob)
    assert sizes[0] != sizes[1]
    assert icm("materialize", name, "-o", str(trained.parent / "out"), "--source", "code").code == 0


@pytest.mark.slow
def test_a_quality_refines_every_code_that_it_can(icm: Icm, trained: Path) -> None:
    ran = icm("encode", "--quality", "5", "--refine", "2", "--device", "cpu")
    assert ran.code == 0
    assert "tasks" in ran.out


@pytest.mark.slow
def test_training_refines_the_codes_afterwards(icm: Icm, trained: Path) -> None:
    ran = icm("train", "--steps", "2", "--no-eval", "--refine", "2", "--device", "cpu")
    assert ran.code == 0
    assert "refined " in ran.out
