"""Two workers of a local Ray cluster: the same bytes as one process, whoever dies; and a stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from icm_cli.commands import encode as command
from icm_cli.errors import ExitCode
from icmlora import Fleet
from icmlora.fleet.context import Context
from icmlora.fleet.encode import tasks as encoding
from icmlora.fleet.encode.search import encode_tasks
from icmlora.fleet.resources.workers import _cluster, _Worker
from icmlora.generator.codec.limits import Limits
from registry.errors import StoreNotFound
from registry.store import Store
from tests.cli.coded import tasks_of
from tests.cli.conftest import Ran
from tests.icmlora.fleet.dying import dies_always, dies_once
from tests.icmlora.fleet.stores import TASKS, code_blobs, copy_of, is_sound, tasks_in
from tests.shared import use_config_of

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,  # every worker imports torch
    # Ray leaves pipes and processes to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::FutureWarning"
    ),
]

Icm = Callable[..., Ran]


@pytest.fixture(scope="module", autouse=True)
def quick_codes() -> None:
    """Leave refining as it is: workers are processes of their own, in which nothing is patched."""


@pytest.fixture(scope="module", autouse=True)
def cluster(trained_template: Path) -> Iterator[Any]:
    """A local cluster for all tests: starting one takes seconds, and workers use the one that their process has."""
    use_config_of(trained_template)  # of the processes of the cluster
    with _cluster("2") as ray:
        yield ray


@pytest.fixture
def fleet(trained: Path) -> Fleet:
    """The mixed fleet, trained."""
    return Fleet(trained)


@pytest.fixture
def twin(fleet: Fleet, tmp_path: Path) -> Fleet:
    """A copy of the fleet, for one process."""
    return copy_of(fleet.path, tmp_path / "twin")


def test_codes_refined_by_two_workers_are_those_of_one_process_byte_for_byte(fleet: Fleet, twin: Fleet) -> None:
    report = fleet.encode(refine=2, device="cpu", workers="2")
    assert sorted(task.task for task in report.done) == TASKS
    assert {task.status for task in report.done} == {"encoded"}
    twin.encode(refine=2, device="cpu")
    assert code_blobs(fleet) == code_blobs(twin)
    assert is_sound(fleet)


def test_if_a_worker_is_killed_with_a_task_another_one_does_it(
    fleet: Fleet, twin: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_tasks", dies_once)
        report = fleet.encode(max_error=0.22, workers="2")
    assert (fleet.path.parent / "died").exists()
    assert {task.task: task.status for task in report.done} == dict.fromkeys(TASKS, "encoded")
    twin.encode(max_error=0.22)
    assert code_blobs(fleet) == code_blobs(twin)
    assert is_sound(fleet)


def test_a_task_that_kills_every_worker_keeps_its_code_and_the_others_are_encoded(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = code_blobs(fleet)
    monkeypatch.setattr(encoding, "encode_tasks", dies_always)
    report = fleet.encode(max_error=0.22, workers="2")
    statuses = {task.task: task.status for task in report.done}
    assert statuses == {name: "unmeasured" if name == "poems" else "encoded" for name in TASKS}
    assert code_blobs(fleet)["poems"] == before["poems"]


def test_vectors_and_measurements_of_two_workers_are_those_of_one_process(fleet: Fleet, twin: Fleet) -> None:
    for one, workers in ((fleet, "2"), (twin, None)):
        one.extract_vectors(device="cpu", again=True, workers=workers)
        one.evaluate(device="cpu", sources=["code"], workers=workers)
        one.evict(["rules"], min_gain=0.0, device="cpu", dry_run=True, workers=workers)
    assert facts(fleet) == facts(twin)


def facts(fleet: Fleet) -> list[object]:
    """Return the digests of all vectors and the values of all measurements."""
    with Store.open(fleet.path, read_only=True) as store:
        return [
            (
                task.name,
                [(one.view, one.support_set, one.blob) for one in task.vectors],
                [(one.source, one.value, one.retained_gain) for one in task.measured],
            )
            for task in store.tasks()
        ]


def test_ctrl_c_ends_the_workers_and_keeps_what_is_recorded(
    icm: Icm, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(*arguments)

    real, before = command.print_encoded, code_blobs(fleet)
    monkeypatch.setattr(command, "print_encoded", tell)
    ran = icm("encode", "--max-error", "0.22", "--workers", "2", "--json")
    assert (ran.code, ran.error["message"]) == (ExitCode.INTERRUPTED, "interrupted; encoded 1 task")
    after = code_blobs(fleet)
    assert [name for name in TASKS if after[name] != before[name]] == list(tasks_of(ran))
    assert is_sound(fleet)
    fleet.prune()  # waits until no worker has the store open


def test_an_eviction_checks_on_workers_and_then_deletes(icm: Icm, fleet: Fleet) -> None:
    fleet.encode(max_error=0.22)
    ran = icm("evict", "--max-error", "0.3", "--workers", "2", "--json")
    assert (ran.code, {event["status"] for event in tasks_of(ran).values()}) == (0, {"evicted"})
    assert all(task.final.is_evicted for task in tasks_in(fleet).values())


def test_a_store_that_a_worker_does_not_find_is_named(cluster: Any) -> None:
    worker = cluster.remote(_Worker).remote(Context(Path("/nowhere")), "cpu", 1)
    with pytest.raises(cluster.exceptions.RayTaskError) as caught:
        cluster.get(worker.run.remote(None, (encode_tasks, (Limits(),), {})))
    assert isinstance(caught.value.cause, StoreNotFound)
    assert "/nowhere" in str(caught.value.cause)


def test_sigterm_still_belongs_to_this_process() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
