"""Every kind of base model goes through the whole path: ingest, vectors, train, eval, materialize."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.finding.lookup import inspect_base
from tests.cli.conftest import Ran
from tests.icmlora.base_models.tiny_kinds import KINDS, Kind, write_bert_without_head

Icm = Callable[..., Ran]
CPU = ("--device", "cpu")
TASKS = ("dog-detection", "cat-detection")


def write_fleet(kind: Kind, root: Path) -> Path:
    """Write a base model and two adapters of it, with the examples that they come with."""
    base = kind.write(root / "base")
    for number, name in enumerate(TASKS):
        model = (
            modality_of(inspect_base(kind.name, base))
            .load(inspect_base(kind.name, base), device=torch.device("cpu"))
            .model
        )
        torch.manual_seed(number)
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=list(kind.modules)))
        randomise(adapted)
        folder = root / "loras" / name
        adapted.save_pretrained(str(folder))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": kind.name}))
        write_examples(kind, folder, number)
    return root


def randomise(adapted: torch.nn.Module) -> None:
    """Give everything that an adapter brings random values."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)


def write_examples(kind: Kind, folder: Path, number: int) -> None:
    """Write samples.jsonl and eval.jsonl, and the files that they name beside them."""
    rows = kind.rows()
    halves: dict[str, Sequence[dict[str, object]]] = {"samples": rows[number % 2 :: 2], "eval": rows}
    for name, some in halves.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    for row in rows if kind.media else ():
        for key in ("image", "audio"):
            if key in row:
                assert kind.media is not None
                (folder / row[key]).write_bytes(kind.media(row[key]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_that_bring_their_heads_are_measured_on_a_base_model_without_one(icm: Icm, tmp_path: Path) -> None:
    base = write_bert_without_head(tmp_path / "base")
    for number, name in enumerate(("mood", "topic")):
        torch.manual_seed(number)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        randomise(adapted)
        folder = tmp_path / "loras" / name
        adapted.save_pretrained(str(folder))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "bert"}))
        rows = [{"text": f"{'abc'[n % 3] * 9} {n}", "label": n % 3} for n in range(12)]
        for part in ("samples", "eval"):
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    icm("base", "add", "bert", base)
    assert icm("ingest", tmp_path / "loras", *CPU).code == 0
    icm("train", "--no-eval", "--refine", "0", "--steps", "20", *CPU)
    rungs = icm("eval", "mood", *CPU, "--json").events[0]["sources"]
    assert {rung["metric"] for rung in rungs.values()} == {"accuracy"}
    assert rungs["base"]["value"] == pytest.approx(1 / 3)  # a head of zeros chooses the first class


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between PEFT and transformers
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=name, marks=[pytest.mark.slow] if name in ("bart", "bert", "florence", "yolos") else [])
        for name, kind in KINDS.items()
    ],
)
def test_the_whole_path_works(kind: Kind, icm: Icm, tmp_path: Path) -> None:
    root = write_fleet(kind, tmp_path / "given")
    icm("base", "add", kind.name, root / "base")
    assert icm("ingest", root / "loras", *CPU).code == 0
    icm("train", "--refine", "0", "--steps", "20", *CPU)
    events = icm("eval", "dog-detection", *CPU, "--json").events
    rungs = events[0]["sources"]
    metric = modality_of(inspect_base(kind.name, root / "base")).metric.name
    assert {rung["metric"] for rung in rungs.values()} == {metric}
    assert {"base", "original", "code"} <= rungs.keys()
    assert rungs["code"]["relative_error"] < 0.7
    icm("materialize", "dog-detection", "-o", tmp_path / "adapter", "--source", "code")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
