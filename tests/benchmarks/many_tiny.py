"""Hundreds of tiny adapters: what `icm train` takes as a whole process when there is next to nothing to learn.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.many_tiny [--adapters 300] [--runs 3] [--out FILE.json]

The adapters have two layers of width 32, ranks 4 and 8, and random weights drawn with fixed seeds. Processor seconds
say more than elapsed ones on a machine that does other things; the load average says whether it did. The digest is of
the generator and all codes: a change that is only meant to be faster leaves it as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from registry.store import Store
from tests.benchmarks.performance.commands import icm, process
from tests.benchmarks.performance.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "many-tiny.json"
RANKS = (4, 8)
BASE_MODEL = "tiny-llama"


def build(folder: Path, count: int) -> None:
    """Save `count` adapters with PEFT, each with a B of its own."""
    for number in range(count):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        torch.manual_seed(number)
        lora = LoraConfig(r=RANKS[number % len(RANKS)], target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM(config), lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        model.peft_config["default"].base_model_name_or_path = BASE_MODEL
        model.save_pretrained(str(folder / f"tiny-{number:03d}"))


def measure(adapters: Path, store: Path) -> dict[str, object]:
    """Ingest the adapters and train on them; returns what the training took and gave."""
    process(icm("ingest", str(adapters), "--no-vectors", store=store))
    load, before, started = os.getloadavg()[0], os.times(), time.perf_counter()
    lines = process(icm("train", "--no-eval", "--refine", "0", "--json", store=store)).splitlines()
    elapsed, after = time.perf_counter() - started, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    (trained,) = [line for line in map(json.loads, lines) if line["type"] == "trained"]
    return {
        "processor_seconds": round(used, 2),
        "elapsed_seconds": round(elapsed, 2),
        "load": round(load, 2),
        "steps": trained["metrics"]["steps"],
        "generator_bytes": trained["generator_size"],
        "codes_bytes": trained["codes_size"],
        "digest": digest(store),
    }


def digest(store: Path) -> str:
    """Return a digest of the generator, and of the code of each task and its error."""
    with Store.open(store, read_only=True) as opened:
        coded = [(task.name, task.code) for task in opened.tasks() if task.code is not None]
        (generator,) = opened.generators()
    codes = [(name, code.blob, code.squared_error) for name, code in coded]
    return hashlib.sha256(json.dumps([generator.blob, codes]).encode()).hexdigest()


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--runs", type=int, default=3, help="how often the training is measured (default 3)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="many-tiny-") as folder:
        work = Path(folder)
        build(work / "adapters", options.adapters)
        runs = [measure(work / "adapters", work / f"store-{number}") for number in range(options.runs)]
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "adapters": options.adapters,
        "runs": runs,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
