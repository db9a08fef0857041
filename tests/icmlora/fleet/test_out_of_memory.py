"""Memory that runs out in one task: it is told what helps, its memory is free again, and the next task goes on."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from icmlora import Fleet
from icmlora.base_models.running.attach import adapted  # noqa: F401  # before the forward pass below is replaced
from icmlora.errors import BaseModelNotFound, OutOfMemory
from icmlora.fleet.failures import as_error
from icmlora.io.memory import ran_out
from tests.icmlora.fleet.stores import code_blobs, files_of, is_sound
from tests.icmlora.tiny_base import LABEL

CPU = {"device": "cpu"}
ON_CARD = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.02 GiB is"


@pytest.fixture
def fleet(learned: Fleet, tmp_path: Path) -> Fleet:
    """Three tasks, of which `ships` has long texts."""
    folder = tmp_path / "long"
    learned.materialize("ships", folder / "ships", source="original")
    for file in ("samples.jsonl", "eval.jsonl"):
        lines = [json.dumps({"text": f"tall ships {number} " * 20}) for number in range(8)]
        (folder / "ships" / file).write_text("\n".join(lines) + "\n")
    learned.ingest([folder])
    return learned


@contextmanager
def too_long(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, tokens: int = 160
) -> Iterator[list[weakref.ref[torch.Tensor]]]:
    """Let memory run out in the layers where a text is long; yields what was in use then."""
    real, used = LlamaMLP.forward, list[weakref.ref[torch.Tensor]]()

    def forward(self: LlamaMLP, x: torch.Tensor) -> Any:
        if x.shape[1] >= tokens:
            large = torch.zeros(1000)
            used.append(weakref.ref(large))
            raise error.with_traceback(None)
        return real(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(LlamaMLP, "forward", forward)
        yield used


@pytest.fixture(params=[torch.OutOfMemoryError(ON_CARD), MemoryError()], ids=["card", "machine"])
def error(request: pytest.FixtureRequest) -> BaseException:
    found: BaseException = request.param
    return found


@pytest.mark.one_case
def test_only_that_task_is_not_measured(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    with too_long(monkeypatch, error) as used:
        report = fleet.evaluate(sources=["code"], **CPU)  # type: ignore[arg-type]
        gc.collect()
        assert used
        assert not any(reference() is not None for reference in used)
    assert [task.task for task in report.done] == ["apples", "trains"]
    (failed,) = report.failed
    assert (failed.task, failed.kind) == ("ships", "out_of_memory")
    assert failed.hint is not None
    assert failed.hint.startswith(f"use a lower --max-tokens, or run `icm base add {LABEL} PATH --load-in nf4`")
    assert is_sound(fleet)
    assert len(fleet.evaluate(sources=["code"], **CPU).done) == 3  # type: ignore[arg-type]


@pytest.mark.one_case
def test_only_that_task_has_no_vectors(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    with too_long(monkeypatch, error, tokens=400):  # the texts of a support set are read one after the other
        report = fleet.extract_vectors(again=True, **CPU)  # type: ignore[arg-type]
    assert [task.task for task in report.done] == ["apples", "trains"]
    assert [(failed.task, failed.kind) for failed in report.failed] == [("ships", "out_of_memory")]


@pytest.mark.one_case
def test_only_that_task_keeps_its_code(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    fleet.update(refine=0, evaluate=False, **CPU)  # type: ignore[arg-type]
    before = code_blobs(fleet)
    with too_long(monkeypatch, error):
        report = fleet.encode(keep=0.9, refine=0, **CPU)  # type: ignore[arg-type]
    assert {task.task: task.status for task in report.done if task.status == "unmeasured"} == {"ships": "unmeasured"}
    (reason,) = [task.reason for task in report.done if task.task == "ships"]
    assert reason is not None
    assert "ran out" in reason
    assert "--load-in nf4" in reason
    after = code_blobs(fleet)
    assert after["ships"] == before["ships"]
    assert after["apples"] != before["apples"]


def test_a_single_task_raises_the_error(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(fleet.path)
    with too_long(monkeypatch, torch.OutOfMemoryError(ON_CARD)), pytest.raises(OutOfMemory) as caught:
        fleet.evaluate(["ships"], sources=[], **CPU)  # type: ignore[arg-type]
    assert caught.value.message == "the card ran out of memory: 2.50 GiB more were requested"
    assert files_of(fleet.path) == before


def test_what_the_allocator_of_the_cpu_says_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert ran_out(caught.value)
    assert "this machine ran out of memory" in as_error(caught.value).message


def test_other_errors_are_told_as_before() -> None:
    assert not ran_out(RuntimeError("shapes do not match"))


def test_a_base_model_that_does_not_fit_is_told_what_makes_it_smaller(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError(ON_CARD)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    with pytest.raises(BaseModelNotFound, match="does not fit into memory") as caught:
        fleet.evaluate(**CPU)  # type: ignore[arg-type]
    assert caught.value.hint == f"run `icm base add {LABEL} PATH --load-in nf4` to load it in 4 bits"
