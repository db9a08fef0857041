"""Whether llama.cpp writes with icm's GGUF adapters, token for token, what PEFT writes with the folders.

    pip install xllamacpp                  (llama.cpp's server as a Python package, in the environment of icm)
    python -m tests.benchmarks.llama_cpp STORE --texts FOLDER --base FOLDER --model FILE.gguf [--source code]

STORE has the tasks, and knows where the base model is. --texts is a folder with TASK/eval.jsonl, whose first rows are
the prompts. --base is the base model for PEFT, --model the same in a GGUF file, of any type: it is read in float32, so
that both compute alike, and then once more as it is. Both answer greedily, on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from icmlora import Fleet
from tests.benchmarks.llama_cpp.engine import (
    Answer,
    engine_version,
    equal,
    largest_difference,
    of_llama_cpp,
    of_transformers,
    widen,
)

RESULT = Path(__file__).parents[1] / "results" / "llama_cpp.json"
TOKENS = 48
PROMPT = 48


class Study:
    """The base model in both engines, and what each says about a task."""

    def __init__(self, given: argparse.Namespace, place: Path) -> None:
        self._given, self._place = given, place
        self._tokenizer: Any = AutoTokenizer.from_pretrained(given.base)
        self._wide = place / "base.gguf"
        widen(given.model, self._wide)

    def compare(self, task: str) -> dict[str, object]:
        """Materialize a task in both forms and let both engines answer."""
        given, folder, file = self._given, self._place / task, self._place / f"{task}.gguf"
        fleet = Fleet(given.store)
        fleet.materialize(task, folder, source=given.source)
        fleet.materialize(task, file, source=given.source, adapter_format="gguf")
        prompts = self._prompts(task)
        model = AutoModelForCausalLM.from_pretrained(given.base, dtype=torch.float32).eval()
        base = of_llama_cpp(self._wide, None, prompts, TOKENS)
        plain = of_transformers(model, prompts, TOKENS, base[0].never)
        tuned = of_transformers(PeftModel.from_pretrained(model, folder).eval(), prompts, TOKENS, base[0].never)
        found = of_llama_cpp(self._wide, file, prompts, TOKENS)
        as_it_is = of_llama_cpp(given.model, file, prompts, TOKENS)
        for engine, answers in (("base", base), ("PEFT", tuned), ("llama.cpp", found)):
            print(f"{engine}: {self._tokenizer.decode(answers[0].tokens)!r}")
        return {
            "prompts": len(prompts),
            "tokens": sum(len(answer.tokens) for answer in found),
            "equal_with_adapter": equal(found, tuned),
            "equal_without_adapter": equal(base, plain),
            "adapter_changes_the_text": not equal(found, base),
            "log_probability_difference": largest_difference(found, tuned),
            "equal_tokens_on_the_file_as_it_is": _equal_tokens(as_it_is, tuned),
        }

    def _prompts(self, task: str) -> list[list[int]]:
        lines = (self._given.texts / task / "eval.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines[: self._given.prompts]]
        return [self._tokenizer(text, add_special_tokens=False)["input_ids"][:PROMPT] for text in texts]


def _equal_tokens(one: Sequence[Answer], other: Sequence[Answer]) -> int:
    """Count tokens up to the first that differs; from there on the engines read different texts."""
    count = 0
    for mine, theirs in zip(one, other, strict=True):
        pairs = list(zip(mine.tokens, theirs.tokens, strict=True))
        count += next((number for number, (x, y) in enumerate(pairs) if x != y), len(pairs))
    return count


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.llama_cpp")
    parser.add_argument("store", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="folder with TASK/eval.jsonl")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file of the same base model")
    parser.add_argument("--tasks", nargs="+", help="default: all of the store")
    parser.add_argument("--source", default="code", help="as of icm materialize")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    given = parser.parse_args()
    tasks: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as place:
        study = Study(given, Path(place))
        for task in given.tasks or (row.name for row in Fleet(given.store).tasks()):
            tasks[task] = study.compare(task)
            print(task, json.dumps(tasks[task]), flush=True)
    packages = {name: version(name) for name in ("peft", "transformers", "torch", "gguf")}
    found = {"engine": engine_version(), "packages": packages, "source": given.source}
    given.output.write_text(json.dumps(found | {"tasks": tasks}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
