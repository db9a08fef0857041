"""Serve tasks with contexts through the gateway from a real vLLM: are answers right, and what does a context cost?

    python -m tests.benchmarks.serving.context STORE BASE --fleet F --vllm PYTHON [--tokens 1536] [--out FILE.json]

STORE, BASE, F and PYTHON are as for `tests.benchmarks.serving.vllm`. Each task gets a context of its samples, F's
samples.jsonl, in a copy of the store. Everything runs in float32, so that greedy decoding has one right answer.

    equal      answers of `icm-context: on` that are those of the context and the prompt written out by hand
    without    seconds to the first token without the context; the adapter is loaded
    cold       with it, the first time
    warm       with it, of later requests with other prompts: the engine has read the context before
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import urllib.request
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer

from icmlora import Fleet
from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.examples.examples import plain
from icmlora.fewshot.context_choice import ContextScorer
from icmlora.fleet.few_shot.context_choice import kept_files, with_files
from registry.store import Store
from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.serving.vllm import Server, gateway, parser_of, prompts_of, started, version

RESULT = Path(__file__).parents[1] / "results" / "vllm-context.json"
LENGTH = 2048  # tokens of the longest request
BLOCK = "32"  # tokens of a block of vLLM's cache: the smallest on a CPU, where it takes 128 by itself; 16 on a card
PIECE = 128  # tokens of a sample in a context
WARM = 3  # requests of each task that find its context read
SHORT = 100  # characters of a prompt


def main() -> None:
    """Measure, print, write JSON."""
    parser = parser_of(__doc__, RESULT)
    parser.add_argument("--tokens", type=int, default=1536, help="of each context, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        work = Path(folder)
        shutil.copytree(options.store, work / "store")
        options.store = str(work / "store")
        (work / "folders").mkdir()  # vLLM's own resolver of folders insists on it
        contexts, caching = give_contexts(options), ("--enable-prefix-caching", "--block-size", BLOCK)
        with (
            started(options, work, *caching, plug_in=False, length=LENGTH) as alone,
            gateway(options, work, alone, "--max-adapters", "64") as server,
        ):
            found = measured(options, server, contexts)
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "vllm": version(options.vllm),
        "block": int(BLOCK),
        "tasks": len(contexts),
        "tokens": [min(map(_tokens, contexts.values())), max(map(_tokens, contexts.values()))],
        **found,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def give_contexts(options: argparse.Namespace) -> dict[str, tuple[TaskContext, int]]:
    """Give each task with samples a context of them, as long as is asked for; return these, with their lengths."""
    tokenizer, found = AutoTokenizer.from_pretrained(options.base), {}
    prompted = ContextScorer(SimpleNamespace(tokenizer=tokenizer, positions=None))  # type: ignore[arg-type]
    with Store.open(options.store) as store:
        for task in (row.name for row in Fleet(options.store).tasks()):
            lines = (options.fleet / task / "samples.jsonl").read_text(encoding="utf-8").split("\n")
            samples = plain(json.loads(line)["text"] for line in lines if line)
            context = prompted.context_of(prompted.fitting(samples, PIECE, options.tokens), PIECE).context
            store.update(task, partial(with_files, files=kept_files(store.blobs, context.files)))
            found[task] = context, len(tokenizer(context.text)["input_ids"])
    return found


def measured(
    options: argparse.Namespace, server: Server, contexts: dict[str, tuple[TaskContext, int]]
) -> dict[str, Any]:
    """Ask for each task without its context, with it, and with it written out by hand."""
    behind = Server(server.port, server.process, {"icm-context": "on"})
    seconds: dict[str, list[float]] = {"without": [], "cold": [], "warm": []}
    differing = {}
    prompts = {task: _prompts(options.fleet / task) for task in prompts_of(Fleet(options.store), options.fleet)}
    for task, (first, *others) in prompts.items():
        server.complete(task, first, 1)  # loads the adapter
        seconds["cold"].append(behind.first_token(task, first))
        for prompt in others:
            seconds["without"].append(server.first_token(task, prompt))
            seconds["warm"].append(behind.first_token(task, prompt))
        texts = behind.complete(task, first), server.complete(task, contexts[task][0].text + first)
        if texts[0] != texts[1]:
            differing[task] = texts
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    pairs = [warm / without for warm, without in zip(seconds["warm"], seconds["without"], strict=True)]
    return {
        "equal": len(prompts) - len(differing),
        "differing": differing,
        "medians": medians,
        "warm_ratio": round(statistics.median(pairs), 3),
        "figures": _figures(server),
        "all": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
    }


def _prompts(folder: Path) -> list[str]:
    """Return prompts of a task that have no beginning in common."""
    lines = (folder / "eval.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"][:SHORT] for line in lines[: WARM + 1]]


def _figures(server: Server) -> dict[str, float]:
    """Return what the gateway counts of contexts and of the engine's prefix cache."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10).read().decode()
    lines = [line.rpartition(" ") for line in text.split("\n") if line.startswith(("icm_contexts_total", "icm_engine"))]
    return {name: float(value) for name, _, value in lines}


def _tokens(given: tuple[TaskContext, int]) -> int:
    return given[1]


if __name__ == "__main__":
    main()
