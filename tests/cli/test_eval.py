"""`icm eval`."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from icmlora.base_models.kinds import likelihood
from icmlora.base_models.modality import Score
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
EVAL = ("eval", "--device", "cpu")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each time that a model is measured."""

    def nll(model: object, *arguments: Any, **options: Any) -> Score:
        calls.append(model)
        return real(model, *arguments, **options)

    calls: list[object] = []
    real = likelihood.nll
    monkeypatch.setattr(likelihood, "nll", nll)
    return calls


def texts(path: Path, *lines: str) -> Path:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_every_source_stands_side_by_side(icm: Icm, trained: Path) -> None:
    out = icm(*EVAL).out
    for heading in ("BASE PPL", "ORIGINAL PPL", "CODE PPL", "RECALLED PPL", "CODE BPB", "CODE GAIN", "RECALLED ERROR"):
        assert heading in out
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["poems", "rules"]


def test_json_lines_keep_their_names(icm: Icm, trained: Path) -> None:
    events = icm(*EVAL, "poems", "--json").events
    assert set(events[0]) == {"type", "task", "precision", "sources", "with_context"}
    assert set(events[0]["sources"]) == {"base", "original", "code", "recalled"}
    assert set(events[0]["sources"]["code"]) == {
        "metric", "value", "count", "nats_per_token", "perplexity", "bits_per_byte", "tokens",
        "retained_gain", "relative_error", "squared_error",
    }  # fmt: skip
    assert all(set(event) == {"type", "source", "tasks", "mean", "worst", "precisions"} for event in events[1:])


@pytest.mark.slow
def test_the_figures_fit_together(icm: Icm, trained: Path) -> None:
    sources = icm(*EVAL, "poems", "--json").events[0]["sources"]
    base, original, code = (sources[name]["nats_per_token"] for name in ("base", "original", "code"))
    if base > original:
        assert sources["code"]["retained_gain"] == pytest.approx((base - code) / (base - original))
    else:
        assert sources["code"]["retained_gain"] is None
    stored = icm("show", "poems", "--json").document["code"]["relative_error"]
    assert sources["code"]["relative_error"] == pytest.approx(stored, rel=0.01)  # rounded to bfloat16


def test_a_second_time_nothing_is_measured_again(icm: Icm, trained: Path, counted: list[object]) -> None:
    first = icm(*EVAL, "--json").out
    assert len(counted) == 8
    assert icm(*EVAL, "--json").out == first
    assert len(counted) == 8


def test_again_measures_again(icm: Icm, trained: Path, counted: list[object]) -> None:
    icm(*EVAL, "poems")
    icm(*EVAL, "poems", "--again")
    assert len(counted) == 8


@pytest.mark.slow
def test_a_new_generator_is_measured_but_base_and_original_are_not(
    icm: Icm, trained: Path, counted: list[object]
) -> None:
    icm(*EVAL, "poems")
    icm("train", "--no-eval", "--refine", "0", "--steps", 2, "--device", "cpu")
    counted.clear()
    icm(*EVAL, "poems")
    assert len(counted) == 2


def test_fewer_tokens_are_another_measurement(icm: Icm, trained: Path) -> None:
    def tokens(*options: object) -> int:
        return int(icm(*EVAL, "poems", "--json", *options).events[0]["sources"]["base"]["tokens"])

    assert tokens("--max-tokens", 5) == 8
    assert tokens() > 8


@pytest.mark.slow
def test_a_quick_look_says_how_to_measure_as_usual_again(icm: Icm, trained: Path) -> None:
    assert "until the next `icm eval` with the default of 256 tokens" in icm(*EVAL, "--max-tokens", 5).err
    assert "with the default of" not in icm(*EVAL).err


def test_only_the_sources_that_are_named_beside_base_and_original(icm: Icm, trained: Path) -> None:
    sources = icm(*EVAL, "poems", "--source", "code", "--json").events[0]["sources"]
    assert list(sources) == ["base", "original", "code"]


def test_before_the_first_training_base_and_original_are_measured(icm: Icm, mixed: Path) -> None:
    assert list(icm(*EVAL, "poems", "--json").events[0]["sources"]) == ["base", "original"]


def test_a_task_named_twice_is_measured_once(icm: Icm, trained: Path) -> None:
    assert [event["task"] for event in icm(*EVAL, "poems", "POEMS", "--json").events if "task" in event] == ["poems"]


def test_tasks_without_held_out_text_are_named(icm: Icm, trained: Path) -> None:
    assert "not measured, no held-out text: silent" in icm(*EVAL, "--source", "code").err


def test_no_held_out_text_at_all_is_an_error_with_a_hint(icm: Icm, trained: Path) -> None:
    ran = icm(*EVAL, "silent", "--json")
    assert (ran.code, "--data" in ran.error["hint"]) == (ExitCode.FAILED, True)


@pytest.mark.slow
def test_other_text_can_be_given(icm: Icm, trained: Path, tmp_path: Path) -> None:
    data = texts(tmp_path / "other.jsonl", "some other text", "and more")
    assert icm(*EVAL, "silent", "--data", data, "--json").events[0]["task"] == "silent"


def test_text_that_cannot_be_read_is_named_before_any_model_is_loaded(icm: Icm, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('\n{"words": 1}\n')
    icm("base", "rm", LABEL)
    ran = icm(*EVAL, "--data", tmp_path / "bad.jsonl", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "data_error")
    assert "bad.jsonl: line 2" in ran.error["message"]
    assert icm(*EVAL, "--data", tmp_path / "none.jsonl").code == ExitCode.FAILED


def test_the_gain_on_the_tasks_own_text_is_the_one_that_is_shown(icm: Icm, trained: Path, tmp_path: Path) -> None:
    own = icm(*EVAL, "poems", "--json").events[0]["sources"]["code"]["retained_gain"]
    icm(*EVAL, "poems", "--data", texts(tmp_path / "other.jsonl", "quite another text"))
    done = icm("materialize", "poems", "-o", tmp_path / "out", "--source", "code", "--json").document
    assert done["retained_gain"] == own
    assert icm("stats", "--json").document["fleets"][0]["tasks"][0]["retained_gain"] == own


@pytest.mark.slow
def test_show_lists_the_measurements_of_the_present_generator(icm: Icm, trained: Path) -> None:
    icm(*EVAL, "poems")
    icm("train", "--no-eval", "--refine", "0", "--steps", 2, "--device", "cpu")
    out = icm("show", "poems").out
    rows = [line.split() for line in out.splitlines()[out.splitlines().index(next(
        line for line in out.splitlines() if line.startswith("SOURCE"))) + 1 :]]  # fmt: skip
    assert [row[:2] for row in rows] == [["base", "held-out"], ["original", "held-out"]]
    current = {entry["source"]: entry["is_current"] for entry in icm("show", "poems", "--json").document["evaluations"]}
    assert current == {"base": True, "original": True}


def test_eval_show_and_json_call_the_source_recalled(icm: Icm, trained: Path) -> None:
    for out in (icm(*EVAL, "poems").out, icm("show", "poems").out):
        assert "recalled" in out.lower()
        assert "generate" not in out.lower().replace("generated", "").replace("generator", "")


def test_show_says_how_a_rung_was_measured_and_against_which_original(icm: Icm, trained: Path) -> None:
    icm(*EVAL, "poems")
    shown = icm("show", "poems", "--json").document
    (final,) = [row["weights"] for row in shown["adapters"] if row["is_final"]]
    assert all(set(row["settings"]) == {"max_tokens", "dtype", "base", "original"} for row in shown["evaluations"])
    assert {row["settings"]["original"] for row in shown["evaluations"]} == {final}


def test_a_task_with_modules_of_its_own_has_no_generated_source(icm: Icm, trained: Path, tmp_path: Path) -> None:
    texts(write_lora(tmp_path / "wide", rank=16) / "eval.jsonl", "held-out text")
    icm("ingest", tmp_path / "wide", "--device", "cpu")
    ran = icm(*EVAL, "wide", "--json")
    assert (ran.code, list(ran.events[0]["sources"])) == (0, ["base", "original"])


def test_a_loss_that_is_no_number_is_an_error_that_names_the_task(icm: Icm, mixed: Path, tmp_path: Path) -> None:
    texts(write_lora(tmp_path / "loud", alpha=1e9, targets=("mlp.down_proj",), rank=1) / "eval.jsonl", "held-out")
    icm("ingest", tmp_path / "loud", "--no-vectors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "nll", lambda *a, **k: Score(float("nan"), 1, 1))
        ran = icm(*EVAL, "loud", "--json")
    assert (ran.code, ran.error["kind"], "'loud'" in ran.error["message"]) == (ExitCode.FAILED, "data_error", True)


def test_ctrl_c_ends_after_the_task_and_keeps_it(icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nll(*arguments: Any, **options: Any) -> Score:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(likelihood, "nll", real)
        return real(*arguments, **options)

    real = likelihood.nll
    monkeypatch.setattr(likelihood, "nll", nll)
    ran = icm(*EVAL, "--json")
    assert (ran.code, "measured 1 task" in ran.error["message"]) == (ExitCode.INTERRUPTED, True)
    with Store.open(trained) as store:
        assert [len(store.task(name).measured) for name in ("poems", "rules")] == [4, 0]


def test_cuda_without_a_gpu_is_an_error_with_a_hint(icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = icm("eval", "--device", "cuda", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "device_unavailable")


def test_a_missing_base_model_is_an_error_with_a_hint(icm: Icm, trained: Path) -> None:
    icm("base", "rm", LABEL)
    ran = icm(*EVAL, "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "base_model_not_found")


def test_an_original_that_is_no_better_than_the_base_model_gets_a_sentence(icm: Icm, trained: Path) -> None:
    icm("eval", "--device", "cpu")
    names = [task["name"] for task in icm("ls", "--json").document]
    for name in names:
        shown = icm("show", name)
        losses = {row["source"]: row["nats_per_token"] for row in icm("show", name, "--json").document["evaluations"]}
        is_no_better = "original" in losses and losses["original"] >= losses["base"]
        assert ("the original is no better than the base model on this text" in shown.out) == is_no_better
