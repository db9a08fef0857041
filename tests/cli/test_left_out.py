"""One task that cannot be run, or one base model, never stops the others: each is named, and the exit code is 3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from icm_cli.errors import ExitCode
from icmlora.io.text import some
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.fleet import write_texts
from tests.cli.tiny_fleet import STEPS, write_lora
from tests.icmlora.tiny_base import HIDDEN, LABEL, tiny_tokenizer, write_tiny_base

Icm = Callable[..., Ran]
CPU = ("--device", "cpu")
GOOD = ("apples", "pears", "trains")


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file, {"format": "pt"})


def add_tensor(folder: Path, name: str, value: torch.Tensor) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}": value}, file, {"format": "pt"})


@pytest.fixture
def odd_fleet(tmp_path: Path) -> Path:
    """Three good tasks; `stranger` has layers that the base model lacks, `upper` is for one layer only."""
    root = tmp_path / "loras"
    for seed, name in enumerate((*GOOD, "stranger", "upper")):
        folder = write_lora(root / name, seed=seed)
        write_texts(folder, count=16)
        write_texts(folder, "eval.jsonl", count=2)
    rename(root / "stranger", "layers.1.", "layers.7.")
    upper = root / "upper" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(upper).items() if "layers.1." in name}, upper, {"format": "pt"})
    write_tiny_base(tmp_path / "base")
    return root


@pytest.fixture
def store(icm: Icm, odd_fleet: Path, tmp_path: Path) -> Path:
    assert icm("base", "add", LABEL, tmp_path / "base").code == 0
    assert icm("ingest", odd_fleet, "--no-vectors").code == 0
    return tmp_path / "store"


@pytest.mark.slow
def test_ingest_takes_all_and_names_the_one_without_vectors(icm: Icm, odd_fleet: Path, tmp_path: Path) -> None:
    icm("base", "add", LABEL, tmp_path / "base")
    ran = icm("ingest", odd_fleet, *CPU)
    assert ran.code == ExitCode.PARTLY
    assert "extracted the vectors of 4 tasks" in ran.out
    assert "stranger: module 'model.layers.7.self_attn.q_proj' of the adapter does not exist" in ran.err


def test_vectors_of_the_others_are_extracted(icm: Icm, store: Path) -> None:
    ran = icm("vectors", *CPU, "--json")
    assert ran.code == ExitCode.PARTLY
    assert ran.events[-1] == {"type": "summary", "extracted": 4, "present": 0, "failed": ["stranger"]}
    warning = json.loads(ran.err.splitlines()[0])
    assert (warning["kind"], warning["task"]) == ("base_model_mismatch", "stranger")
    assert "icm base add" in warning["hint"]
    assert "/tmp" not in ran.err


@pytest.mark.slow
def test_the_others_are_measured_after_training_and_by_eval(icm: Icm, store: Path) -> None:
    trained = icm("train", *CPU, "--steps", STEPS, "--refine", "2")
    assert trained.code == ExitCode.PARTLY
    assert "not measured, see the warnings above: stranger" in trained.err
    assert "retained gain of `code`" in trained.out
    measured = icm("eval", *CPU, "--json")
    assert measured.code == ExitCode.PARTLY
    assert [event["task"] for event in measured.events if event["type"] == "task"] == [*GOOD, "upper"]


@pytest.mark.slow
def test_a_code_of_what_cannot_be_measured_evicts_nothing(icm: Icm, store: Path) -> None:
    assert icm("train", "--no-eval", "--refine", "0", *CPU, "--steps", STEPS).code == 0
    ran = icm("evict", "stranger", "--min-gain", "0.1", *CPU)
    assert (ran.code, "kept stranger: it cannot be measured: module" in ran.out) == (ExitCode.PARTLY, True)


class TestTwoBaseModels:
    def test_the_tasks_of_the_one_that_is_there_are_done(self, icm: Icm, store: Path, tmp_path: Path) -> None:
        write_lora(tmp_path / "more" / "far", base_model_name_or_path="somewhere/else")
        icm("ingest", tmp_path / "more", "--no-vectors")
        ran = icm("vectors", *GOOD, "far", *CPU)
        assert ran.code == ExitCode.PARTLY
        assert "extracted the vectors of 3 tasks" in ran.out
        assert "no vectors for 1 task (far): base model 'somewhere/else'" in ran.err
        assert "icm base add somewhere/else PATH" in ran.err

    def test_without_any_the_command_fails(self, icm: Icm, tmp_path: Path) -> None:
        write_lora(tmp_path / "more" / "far", base_model_name_or_path="somewhere/else")
        icm("ingest", tmp_path / "more", "--no-vectors")
        assert icm("vectors", *CPU, "--json").error["kind"] == "base_model_not_found"


class TestNotRun:
    """Tasks of a BERT without a head, which predicts nothing."""

    @pytest.fixture
    def bert(self, icm: Icm, tmp_path: Path) -> Path:
        sizes = {"vocab_size": 257, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4}
        BertModel(BertConfig(**sizes, intermediate_size=48)).save_pretrained(tmp_path / "bert")
        tiny_tokenizer().save_pretrained(tmp_path / "bert")
        assert icm("base", "add", "tiny/bert", tmp_path / "bert").code == 0
        for name in GOOD:
            folder = write_lora(tmp_path / "berts" / name, base_model_name_or_path="tiny/bert")
            for old, new in (("model.layers", "encoder.layer"), ("v_proj", "key"), ("q_proj", "query")):
                rename(folder, old, new)
            rename(folder, "self_attn", "attention.self")
            write_texts(folder, "eval.jsonl", count=2)
        return tmp_path / "berts"

    @pytest.mark.slow
    def test_it_goes_the_whole_way_and_is_not_measured(self, icm: Icm, bert: Path) -> None:
        ran = icm("ingest", bert, *CPU)
        reason = "base model 'tiny/bert' is of a kind that icm cannot run"
        assert (ran.code, f"no vectors for 3 tasks ({some(GOOD)}): {reason}" in ran.err) == (0, True)
        assert icm("vectors", *CPU).code == 0
        trained = icm("train", *CPU, "--steps", STEPS)
        assert (trained.code, "is of a kind that icm cannot run" in trained.err) == (0, True)
        measured = icm("eval", *CPU)
        assert (measured.code, f"no measurements for 3 tasks ({some(GOOD)}): {reason}" in measured.err) == (0, True)
        kept = icm("evict", "apples", "--min-gain", "0.1", *CPU)
        assert (kept.code, "is of a kind that icm cannot run" in kept.out) == (ExitCode.PARTLY, True)
        assert icm("encode", "apples", "--max-error", "0.5", *CPU).code == 0


class TestExtras:
    @pytest.fixture
    def with_bias(self, icm: Icm, store: Path, tmp_path: Path) -> Path:
        """A task whose adapter replaces the last norm of the base model by a larger one."""
        folder = write_lora(tmp_path / "loud" / "loud", seed=9, modules_to_save=["norm"])
        add_tensor(folder, "model.norm.weight", torch.full((HIDDEN,), 3.0))
        write_texts(folder, count=16)
        write_texts(folder, "eval.jsonl", count=2)
        assert icm("ingest", tmp_path / "loud", "--no-vectors").code == 0
        return store

    @pytest.mark.slow
    def test_original_and_code_are_measured_with_them(self, icm: Icm, with_bias: Path) -> None:
        assert icm("vectors", "loud", *CPU).code == 0
        assert icm("train", "--no-eval", "--refine", "0", *CPU, "--steps", STEPS).code == 0
        (event, *_) = icm("eval", "loud", *CPU, "--json").events
        base, original, code = (event["sources"][name]["nats_per_token"] for name in ("base", "original", "code"))
        # The norm matters more than what the code loses of the LoRA.
        assert abs(original - base) > 0.05
        assert abs(code - original) < abs(original - base)
        assert event["sources"]["code"]["relative_error"] < 1

    @pytest.mark.slow
    def test_its_code_is_not_refined(self, icm: Icm, with_bias: Path) -> None:
        assert icm("train", "--no-eval", "--refine", "0", *CPU, "--steps", STEPS).code == 0
        ran = icm("encode", "loud", "--quality", "1", "--refine", "2", *CPU)
        assert "its adapter has more than LoRA factors, so its code cannot be refined" in ran.out + ran.err


class TestVerify:
    def test_an_adapter_that_does_nothing_is_a_remark(self, icm: Icm, tmp_path: Path) -> None:
        folder = write_lora(tmp_path / "loras" / "idle")
        file = folder / "adapter_model.safetensors"
        save_file({name: value * ("lora_A" in name) for name, value in load_file(file).items()}, file, {"format": "pt"})
        write_lora(tmp_path / "loras" / "busy")
        icm("ingest", tmp_path / "loras", "--no-vectors")
        ran = icm("verify")
        assert (ran.code, "remark: the adapter of idle does nothing: " in ran.err) == (0, True)
        document = icm("verify", "--json").document
        assert document["ok"] is True
        assert [(finding["kind"], finding["tasks"]) for finding in document["findings"]] == [("remark", ["idle"])]
        assert icm("verify", "busy", "--json").document["findings"] == []

    def test_with_all_data_adapters_are_held_against_their_base_model(self, icm: Icm, store: Path) -> None:
        assert "stranger" not in icm("verify").err
        ran = icm("verify", "--read-data")
        assert (ran.code, "remark: the adapter of stranger does not fit: module" in ran.err) == (0, True)
        with Store.open(store, read_only=True) as opened:
            assert opened.task("stranger").final.original_only is None
