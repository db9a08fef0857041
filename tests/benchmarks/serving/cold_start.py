"""Time the first token of cold tasks of a large store, through the plug-in and the gateway, against folders.

    python -m tests.benchmarks.serving.cold_start STORE BASE --fleet DIR --vllm PYTHON [--out FILE.json]

STORE holds many evicted tasks, among them those of DIR, whose folders have texts to ask for; the rest as in
`tests.benchmarks.serving.vllm`. The same adapters lie ready as folders, which vLLM's own resolver finds. By turns:

    plug_in    seconds to the first token of a cold task through the plug-in, against its folder, each once
    gateway    the same through `icm serve`, against its folder asked of the engine itself
    changed    a name is given to another task while the engine runs: whether the next answer is the other's, and the
               seconds to its first token
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmlora import Fleet
from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.serving.vllm import COPY, Server, gateway, materialized, parser_of, prompts_of, started, version

RESULT = Path(__file__).parents[1] / "results" / "cold_start.json"


def main() -> None:
    """Measure, print, write JSON."""
    options = parser_of(__doc__, RESULT).parse_args()
    with tempfile.TemporaryDirectory(prefix="cold-", dir="/dev/shm") as folder:
        work = Path(folder)
        shutil.copytree(options.store, work / "store")  # its tasks are renamed
        options.store = work / "store"
        fleet = Fleet(options.store)
        prompts = prompts_of(fleet, options.fleet)
        materialized(fleet, list(prompts), options.base, work / "folders")
        with started(options, work) as server:
            found = {"plug_in": cold(server, server, prompts), "changed": changed(server, fleet, prompts)}
        with started(options, work, plug_in=False) as alone, gateway(options, work, alone) as server:
            found["gateway"] = cold(server, alone, prompts)
            found["changed_behind_gateway"] = changed(server, fleet, prompts)
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": describe_machine(),
            "vllm": version(options.vllm),
            "tasks_in_the_store": len(fleet.tasks()),
            **found,
        }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def cold(through: Server, direct: Server, prompts: dict[str, str]) -> dict[str, Any]:
    """Time the first token of each task by turns, through icm and from its folder; the first one warms up both."""
    first, *others = prompts
    for _ in range(2):  # what is done once in the life of a server
        through.first_token(first, prompts[first])
        direct.first_token(f"{COPY}{first}", prompts[first])
    seconds: dict[str, list[float]] = {"icm": [], "folder": [], "warm": []}
    for number, task in enumerate(others):
        turns = [("icm", through, task), ("folder", direct, f"{COPY}{task}")]
        for way, server, model in turns if number % 2 else reversed(turns):
            seconds[way].append(server.first_token(model, prompts[task]))
        seconds["warm"].append(direct.first_token(f"{COPY}{task}", prompts[task]))
    pairs = [icm / folder for icm, folder in zip(seconds["icm"], seconds["folder"], strict=True)]
    return {
        "pairs": len(pairs),
        "median_ratio": round(statistics.median(pairs), 3),
        "medians": {way: round(statistics.median(values), 4) for way, values in seconds.items()},
        "least": {way: round(min(values), 4) for way, values in seconds.items()},
    }


def changed(server: Server, fleet: Fleet, prompts: dict[str, str]) -> dict[str, Any]:
    """Let two tasks change their names, and ask for one of them."""
    one, other = list(prompts)[1:3]
    prompt = prompts[one]
    before, expected = server.complete(one, prompt), server.complete(other, prompt)
    for old, new in ((one, "aside"), (other, one), ("aside", other)):
        fleet.edit([old], name=new)
    first_token = server.first_token(one, prompt)
    after, again = server.complete(one, prompt), server.complete(other, prompt)
    return {
        "answers_differ": before != expected,
        "the_next_answer_is_the_others": (after, again) == (expected, before),
        "seconds_to_the_first_token": round(first_token, 4),
    }


if __name__ == "__main__":
    main()
