"""What answers codes keep: exact matches of base model, originals, codes and alternatives of equal bytes.

usage: OMP_NUM_THREADS=1 python -m tests.benchmarks.answers --work W --fleet F [--base qwen] [--quality 4,2,6]

F is what `tests.benchmarks.answers.train` trained. Stores are made with the command line: a generator and plain codes
first, then a copy with the codes of each quality. Every adapter is written by `icm materialize`, loaded by PEFT, and
answers the same held-out questions greedily, in the base model's chat template. The first quality is the one that the
alternatives are matched to: the cheapest of fewer ranks and bits that takes at least as many bytes a task, without and
with icm's correction of the strength. Answers are kept in W, so that a stopped study goes on.
"""

import argparse
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.benchmarks.answers.study import (
    Study,
    alternatives,
    baseline,
    codes,
    document,
    originals,
    table,
    table_of_tasks,
)
from tests.benchmarks.answers.tasks import TASKS
from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.rate_distortion.cache import Cache
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.summary import REFINED
from tests.benchmarks.realistic_fleet.bases import base_folder
from tests.benchmarks.realistic_fleet.stores import NAMES, make_stores

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Make the stores, ask, print the tables, write JSON."""
    options = _options()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    work = options.work.resolve()
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    (label,) = (label for label, name in NAMES.items() if name == options.base)
    tasks = [task for task in TASKS if task.base_model == label]
    fleet = FleetFolder(options.fleet.resolve(), [task.name for task in tasks if (options.fleet / task.name).exists()])
    base, qualities = base_folder(label, work), options.quality.split(",")
    root = work / "stores" / f"answers-{options.base}"
    make_stores(root, label, base, [fleet.folder(task) for task in fleet], qualities)
    kept = [codes(fleet, root / f"{REFINED}{quality}", f"code, quality {quality}") for quality in qualities]
    methods = [originals(fleet, root / "plain-4"), *kept]
    if not options.only_codes:
        methods += [baseline(fleet, name) for name in options.alternatives or alternatives(fleet, kept[0].total)]
    cache = Cache(work / f"answers-{options.base}.jsonl")
    study = Study(fleet, base, getattr(torch, options.dtype), options.rows, cache)
    results = list(study.run(methods))
    if not options.only_codes:
        results = [*study.without_adapters(), *results]
    print(table(results), table_of_tasks(results), sep="\n\n")
    written = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "base_model": label,
        "settings": {"rows": options.rows, "dtype": options.dtype},
        "tasks": {task.name: {"rank": task.rank, "steps": task.steps} for task in tasks if task.name in fleet},
        "results": document(results),
    }
    path = options.out or RESULTS / f"answers-{options.base}.json"
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of packages, base models, stores and answers")
    parser.add_argument("--fleet", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--base", choices=("smollm2", "qwen"), default="smollm2", help="whose adapters are measured")
    parser.add_argument("--quality", default="4,2,6", help="of the codes, the default of icm first (default 4,2,6)")
    parser.add_argument("--alternatives", type=lambda names: names.split(","), help="baselines instead of the matched")
    parser.add_argument("--only-codes", action="store_true", help="compare codes with originals, and nothing else")
    parser.add_argument("--rows", type=int, default=200, help="held-out rows of a task at most (default 200)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: results/answers-BASE.json)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
