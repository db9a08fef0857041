"""The main training of a fleet, from nothing, as `icm train --json` reports it. Takes minutes; give it idle cores."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.benchmarks.performance.commands import icm, process
from tests.benchmarks.performance.figures import Figure

LIMIT_SECONDS, LIMIT_BYTES = 20 * 60.0, 4.0 * 2**30


def measure_training(fleet: Path, base: Path, store: Path, options: list[str]) -> list[Figure]:
    """Fill a store and say what it took.

    Args:
        fleet: The adapters.
        base: Folder of the one base model that they name.
        store: A folder that does not exist yet.
        options: Further options of `icm train`.
    """
    process(icm("ingest", str(fleet), "--no-vectors", store=store))
    (label,) = {json.loads(path.read_bytes())["base_model_name_or_path"] for path in fleet.rglob("adapter_config.json")}
    process(icm("base", "add", label, str(base), store=store))
    extracting = _seconds(icm("vectors", store=store))
    started = time.perf_counter()
    lines = process(icm("train", "--no-eval", "--refine", "0", "--json", *options, store=store)).splitlines()
    whole = time.perf_counter() - started
    (trained,) = [line for line in map(json.loads, lines) if line["type"] == "trained"]
    metrics = trained["metrics"]
    device = metrics["device"]
    return [
        Figure("icm vectors", extracting, "s"),
        Figure(f"icm train --no-eval on {device}, whole process", round(whole, 2), "s", LIMIT_SECONDS),
        Figure(f"fitting the generator on {device}, {metrics['steps']} steps", metrics["fit_seconds"], "s"),
        Figure("encoding every task", metrics["encode_seconds"], "s"),
        Figure("peak memory of training", metrics["peak_memory"], "bytes", LIMIT_BYTES),
    ]


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    process(command)
    return round(time.perf_counter() - started, 2)
