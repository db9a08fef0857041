"""`icm vectors`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.tiny_base import LABEL, write_tiny_base

Icm = Callable[..., Ran]


@pytest.fixture
def pending(icm: Icm, tmp_path: Path, mixed_template: Path) -> Path:
    """The store of the mixed fleet, its base model known, without vectors."""
    icm("base", "add", LABEL, mixed_template / "base")
    icm("ingest", mixed_template / "loras", "--no-vectors")
    return tmp_path / "store"


def views(store: Path, task: str) -> set[str]:
    with Store.open(store) as opened:
        return {vector.view for vector in opened.task(task).vectors}


@pytest.mark.slow
def test_every_task_gets_its_vectors(icm: Icm, pending: Path) -> None:
    events = icm("vectors", "--device", "cpu", "--json").events
    assert [event["type"] for event in events] == ["vectors", "vectors", "vectors", "summary"]
    assert set(events[0]) == {"type", "task", "vectors", "source", "skipped"}
    assert events[-1] == {"type": "summary", "extracted": 3, "present": 0, "failed": []}


@pytest.mark.slow
def test_a_task_without_samples_is_read_through_the_probes(icm: Icm, pending: Path) -> None:
    events = icm("vectors", "silent", "poems", "--device", "cpu", "--json").events
    assert {event["task"]: event["source"] for event in events[:-1]} == {"poems": "samples", "silent": "probes"}
    assert (views(pending, "silent"), views(pending, "poems")) == ({"adapted"}, {"adapted", "context"})


@pytest.mark.slow
def test_what_is_there_is_not_made_again(icm: Icm, mixed: Path) -> None:
    assert icm("vectors", "--json").events == [{"type": "summary", "extracted": 0, "present": 3, "failed": []}]


def test_again_makes_the_same_vectors(icm: Icm, mixed: Path) -> None:
    with Store.open(mixed) as store:
        before = store.task("poems").vectors
    assert icm("vectors", "poems", "--again", "--device", "cpu", "--json").events[-1]["extracted"] == 1
    with Store.open(mixed) as store:
        assert store.task("poems").vectors == before


def test_only_the_tasks_that_are_named(icm: Icm, pending: Path) -> None:
    icm("vectors", "RULES", "--device", "cpu")
    assert {row["name"]: row["vectors_count"] > 0 for row in icm("ls", "--json").document} == {
        "poems": False,
        "rules": True,
        "silent": False,
    }


def test_an_unknown_task_is_an_error_before_any_work(icm: Icm, pending: Path) -> None:
    assert icm("vectors", "poems", "nope", "--device", "cpu").code == ExitCode.FAILED
    assert views(pending, "poems") == set()


def test_cuda_without_a_gpu_is_an_error_with_a_hint(icm: Icm, pending: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = icm("vectors", "--device", "cuda", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "device_unavailable")
    assert "--device cpu" in ran.error["hint"]


@pytest.mark.slow
def test_a_missing_base_model_does_not_keep_the_others_waiting(icm: Icm, pending: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "alien", base_model_name_or_path="aaa/first"), "--no-vectors")
    ran = icm("vectors", "--device", "cpu", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.PARTLY, "base_model_left_out")
    assert "icm base add" in ran.error["hint"]
    assert [event["task"] for event in ran.events[:-1]] == ["poems", "rules", "silent"]


def test_a_base_model_that_does_not_fit_is_an_error_that_names_the_module(
    icm: Icm, pending: Path, tmp_path: Path
) -> None:
    icm("base", "add", LABEL, write_tiny_base(tmp_path / "wide", hidden=64))
    ran = icm("vectors", "poems", "--device", "cpu", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "base_model_mismatch")
    assert "q_proj" in ran.error["message"]


def test_other_samples_make_the_vectors_pending(icm: Icm, mixed: Path, mixed_template: Path, tmp_path: Path) -> None:
    samples = tmp_path / "other.jsonl"
    samples.write_text(json.dumps({"text": "something else"}) + "\n")
    icm("ingest", mixed_template / "loras" / "poems", "--samples", samples, "--no-vectors")
    assert views(mixed, "poems") == set()
    assert icm("vectors", "--device", "cpu", "--json").events[-1] == {
        "type": "summary",
        "extracted": 1,
        "present": 2,
        "failed": [],
    }


def test_a_pattern_of_a_configuration_is_never_run(icm: Icm, tmp_path: Path, mixed_template: Path) -> None:
    folder = write_lora(tmp_path / "stuck", seed=9, rank=1, alpha=1, targets=("self_attn.v_proj",))
    config = json.loads((folder / "adapter_config.json").read_text())
    # Matching this against a module's name takes longer than anyone waits.
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": "(.|.)*zzz|.*v_proj"}))
    icm("base", "add", LABEL, mixed_template / "base")
    icm("ingest", folder, "--no-vectors")
    assert icm("vectors", "stuck", "--device", "cpu", "--json").events[-1]["extracted"] == 1
