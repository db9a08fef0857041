"""Tasks that were never ingested: every row of the leave-tasks-out study.

    python -m tests.benchmarks.unseen --fleet DIR --base DIR --work DIR [--most N] [--folds 0,1,...] [--out FILE.json]

The fleet is the one of `make domain-fleet`. A stopped run goes on where it was; several may run side by side on
different folds with the same work folder. --out summarises everything that the work folder has.
"""

from __future__ import annotations

import argparse
import json

import torch

from tests.benchmarks.unseen.fleet import built_tasks, load_study_base
from tests.benchmarks.unseen.folds import folds_of
from tests.benchmarks.unseen.options import study_parser
from tests.benchmarks.unseen.study import Fold, Options, Results
from tests.benchmarks.unseen.summary import summarise, table


def main(arguments: list[str] | None = None) -> None:
    """Measure some folds, or summarise what was measured."""
    options = _options(arguments)
    torch.set_num_threads(1)
    tasks = built_tasks(options.fleet, options.most)
    folds = folds_of(tasks)
    options.work.mkdir(parents=True, exist_ok=True)
    base = None
    for number in options.folds:
        base = base or load_study_base(options.base)
        members = [task for task in tasks if task not in folds[number]]
        settings = Options(options.base, options.work, options.seeds, options.episodes, options.many, options.refined)
        results = Results(options.work / f"results-{number}.jsonl")
        Fold(number, members, folds[number], base, settings, results).run()
    if options.out is not None:
        measured: dict[tuple[str, str, int], float] = {}
        for path in sorted(options.work.glob("results-*.jsonl")):
            measured |= Results(path).values
        document = summarise(measured, tasks, folds)
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(table(document))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = study_parser("unseen", __doc__, most=None, episodes=48)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the samples (default 3)")
    parser.add_argument("--many", type=int, default=99, help="tasks of a fold with 64 samples too (default all)")
    parser.add_argument("--refined", type=int, default=99, help="tasks of a fold that are refined too (default all)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
