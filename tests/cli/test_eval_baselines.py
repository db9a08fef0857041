"""`icm eval --baseline`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from icmlora.base_models.kinds.likelihood import NllResult
from icmlora.fleet.context import Context
from icmlora.fleet.measure.baselines import BaselineResult, StoredOriginals
from icmlora.fleet.measure.compare import compare
from icmlora.fleet.measure.evaluate import TaskEvaluated
from icmlora.fleet.stats.stats import bill
from registry.store import Store
from tests.cli.conftest import Ran
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
EVAL = ("eval", "--device", "cpu", "--rung", "code", "--baseline")


def of_type(ran: Ran, kind: str) -> list[dict[str, Any]]:
    return [event for event in ran.events if event["type"] == kind]


def test_methods_stand_beside_the_code_with_their_bytes(icm: Icm, trained: Path) -> None:
    out = icm(*EVAL, "int8,svd1-2bit", "--baseline", "mean2").out
    table = out[out.index("METHOD") :].splitlines()
    for heading in ("BYTES PER TASK", "ONE MORE TASK", "OF BF16", "RELATIVE ERROR", "GAIN", "WORST"):
        assert heading in table[0]
    assert {line.split()[0] for line in table[1:]} == {"code", "int8", "svd1-2bit", "mean2"}


def test_json_lines_keep_their_names(icm: Icm, trained: Path) -> None:
    ran = icm(*EVAL, "int8", "poems", "--json")
    assert set(of_type(ran, "task")[0]) == {"type", "task", "precision", "rungs", "baselines"}
    assert set(of_type(ran, "task")[0]["baselines"]["int8"]) == {
        "size", "shared_size", "fleet_size", "metric", "value", "count", "tokens",
        "nats_per_token", "perplexity", "bits_per_byte", "retained_gain", "relative_error", "squared_error",
    }  # fmt: skip
    assert {event["method"] for event in of_type(ran, "method")} == {"code", "int8"}
    assert set(of_type(ran, "method")[0]) == {
        "type", "method", "tasks", "task_size", "marginal_size", "share",
        "relative_error", "squared_error", "mean", "worst", "worst_task",
    }  # fmt: skip


def test_bf16_is_the_original(icm: Icm, trained: Path) -> None:
    task = of_type(icm(*EVAL, "bf16", "poems", "--json"), "task")[0]
    assert task["baselines"]["bf16"]["nats_per_token"] == pytest.approx(
        task["rungs"]["original"]["nats_per_token"], rel=1e-3
    )
    assert task["baselines"]["bf16"]["relative_error"] < 1e-2


@pytest.mark.slow
def test_fewer_bits_take_fewer_bytes_and_lose_more(icm: Icm, trained: Path) -> None:
    found = of_type(icm(*EVAL, "int8,3bit,1bit", "rules", "--json"), "task")[0]["baselines"]
    sizes, errors = ([found[name][key] for name in ("int8", "3bit", "1bit")] for key in ("size", "relative_error"))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_what_is_shared_is_shared_by_the_whole_fleet_even_if_one_task_is_measured(icm: Icm, trained: Path) -> None:
    found = of_type(icm(*EVAL, "mean2", "poems", "--json"), "task")[0]["baselines"]["mean2"]
    assert (found["size"], found["fleet_size"], found["shared_size"] > 0) == (0, 3, True)


def test_nothing_is_stored(icm: Icm, trained: Path) -> None:
    icm(*EVAL, "int8", "poems")
    with Store.open(trained) as store:
        assert {row.rung for row in store.evaluations.all("poems")} == {"base", "original", "code"}


def test_an_unknown_method_is_named_before_anything_is_loaded(icm: Icm, trained: Path) -> None:
    icm("base", "rm", LABEL)
    ran = icm(*EVAL, "int8,zstd", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.USAGE, "unknown_baseline")
    assert "'zstd'" in ran.error["message"]
    assert "svd4" in ran.error["hint"]


def test_originals_are_read_when_they_are_asked_for(trained: Path) -> None:
    with Store.open(trained) as store:
        fleet = StoredOriginals(store, LABEL)
        assert (sorted(fleet), len(fleet)) == (["poems", "rules", "silent"], 3)
        assert fleet["silent"].modules
        assert len(StoredOriginals(store, "another/base")) == 0


def test_a_tasks_bytes_are_its_own_and_its_part_of_the_shared_ones(trained: Path) -> None:
    found = bill(Context(trained, trained))
    bf16 = sum(task.bf16_size for task in found.fleets[0].tasks if task.task in ("poems", "rules"))
    loss = NllResult(1.0, 1, 1)
    done = [
        TaskEvaluated("poems", {}, {"m": BaselineResult(10, 400, 4, loss, 0.5, 0.2)}),
        TaskEvaluated("rules", {}, {"m": BaselineResult(30, 400, 4, loss, None, None)}),
    ]
    (row,) = compare(done, found)
    assert (row.task_size, row.marginal_size, row.share) == (120, 20, 240 / bf16)
    assert (row.mean, row.worst, row.worst_task, row.squared_error) == (0.5, 0.5, "poems", 0.2)


def test_a_task_that_was_removed_since_it_was_measured_is_passed_over(trained: Path) -> None:
    result = BaselineResult(10, 400, 4, NllResult(1.0, 1, 1), 0.5, 0.2)
    done = [TaskEvaluated(name, {}, {"m": result}) for name in ("poems", "gone")]
    (row,) = compare(done, bill(Context(trained, trained)))
    assert (row.tasks, row.worst_task) == (1, "poems")
