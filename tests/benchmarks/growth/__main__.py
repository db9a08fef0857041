"""How the bill of a fleet grows from 20 to 1,000 tasks, on a synthetic fleet with the statistics of a real one.

    python -m tests.benchmarks.growth --fleet DIR [--figure FIGURE.svg]

Writes tests/benchmarks/results/growth.json. Every setting is a process of its own on one thread; what is finished is
kept in the cache, so a killed run goes on. About half an hour of one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from icmlora.generator.config import kind_of
from tests.benchmarks.growth.bill import break_even, table
from tests.benchmarks.growth.figure import draw
from tests.benchmarks.growth.measured import KindStatistics, Statistics, measure, to_tensors
from tests.benchmarks.growth.real import EVERY, RealGroup, real_group
from tests.benchmarks.growth.study import Setting, measure_alternatives
from tests.benchmarks.growth.synthetic import SyntheticAdapterSource
from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.rate_distortion.cache import Cache

ROOT = Path(__file__).parents[3]
RESULT = Path(__file__).parents[1] / "results" / "growth.json"
SIZES = (20, 50, 100, 200, 500, 1000)


def settings(group: RealGroup) -> Iterable[Setting]:
    """Yield what is measured, the most telling first."""
    share, real = round(group.same_start, 4), len(group.adapters)
    yield from (Setting(real, start, trained=trained) for start in (None, 1.0) for trained in (True, False))
    yield from (Setting(size, share) for size in SIZES)
    yield from (Setting(size, share, trained=False) for size in (20, 1000))
    yield from (Setting(size, share, width=96) for size in (20, 200, 1000))
    yield from (Setting(size, share, width=1) for size in (20, 1000))
    yield from (Setting(size, share, quality=2) for size in (20, 1000))
    yield Setting(1000, share, step_limit=6_000)


def main() -> None:
    """Measure, print the table, write the JSON and the figure."""
    options = _options()
    torch.set_num_threads(1)
    group = real_group(options.fleet)
    kinds = sorted({kind for kind, _ in map(kind_of, group.adapters[0].layout)})
    layers = range(1 + max(layer for _, layer in map(kind_of, group.adapters[0].layout)))
    statistics = measure(group.adapters, kinds, layers)
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "statistics.safetensors"
    save_file(to_tensors(statistics), path)
    cache = Cache(options.work / "growth.jsonl")
    results = _results(list(settings(group)), cache, options.jobs, lambda each: _measure(each, path, options.fleet))
    fleet = SyntheticAdapterSource(statistics, 0, round(group.same_start, 4))
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "fleet": _description(group, statistics, fleet),
        "bf16_bytes": 2 * sum(shape.parameters for shape in group.adapters[0].layout),
        "alternatives": measure_alternatives(fleet),
        "break_even": break_even(results),
        "settings": results,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    if options.figure is not None:
        draw(document, options.figure)


def _results(
    chosen: list[Setting], cache: Cache, jobs: int, measure_one: Callable[[Setting], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure what the cache does not have, some at a time, and return everything in order."""
    keys = [json.dumps(asdict(setting), sort_keys=True) for setting in chosen]
    missing = {key: setting for key, setting in zip(keys, chosen, strict=True) if cache.get(key) is None}
    with ThreadPoolExecutor(jobs) as pool:
        for key, found in zip(missing, pool.map(measure_one, missing.values()), strict=True):
            print(table([cache.add(key, **found)]).splitlines()[-1], file=sys.stderr, flush=True)
    return [record for key in keys if (record := cache.get(key)) is not None]


def _measure(setting: Setting, statistics: Path, fleet: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.growth.study", json.dumps(asdict(setting))]
    done = subprocess.run([*command, str(statistics), str(fleet)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _description(group: RealGroup, statistics: Statistics, fleet: SyntheticAdapterSource) -> dict[str, Any]:
    """Say what was measured, and what the same estimators find in as many synthetic tasks."""
    twins = SyntheticAdapterSource(statistics, len(group.adapters))
    made = [twins.load(number, None) for number in range(twins.count)]
    some = next(iter(statistics.values()))
    again = measure(made, list(statistics), range(len(some.log_norms)))
    return {
        "measured_on": f"{len(group.adapters)} adapters of one rank and start, one layer in {EVERY}",
        "same_start": fleet.same_start,
        "kinds": {
            kind.pattern: {"real": _summary(statistics[kind]), "synthetic": _summary(again[kind])}
            for kind in statistics
        },
    }


def _summary(measured: KindStatistics) -> dict[str, Any]:
    names = ("task_spread", "layer_spread", "slot_spread", "inputs_shared", "outputs_shared", "cosine")
    rows = {name: getattr(measured, name) for name in names} | {"log_norms": measured.log_norms.mean(0)}
    return {name: [round(value, 3) for value in values.flatten().tolist()] for name, values in rows.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fleet", type=Path, required=True, help="folder of real adapters")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "growth", help="what is kept between runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--figure", type=Path, help="SVG file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
