"""The parts of the study: what `icm` takes and makes of a fleet of files, and what sd-scripts' resize makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from safetensors.torch import load_file

from tests.benchmarks.image_fleet.resize import cuts_of, real_error

EXTRAPOLATED = 1000
_MISSED = 3
"""Exit code of `icm encode` where some tasks miss the limit."""


def measure_store(halves: tuple[Path, Path], store: Path) -> dict[str, Any]:
    """Ingest two folders of equally many files, and time it and the listings of their tasks.

    Args:
        halves: The folders: what a listing takes is measured after each of them.
        store: Where the store goes; it stays.
    """
    ingests, listings, counts = [], [], []
    for folder in halves:
        seconds, _ = _timed(store, "ingest", str(folder), "--no-vectors")
        ingests.append(seconds)
        listings.append({command: _median(store, command) for command in ("ls", "stats")})
        counts.append(len(json.loads(_timed(store, "ls")[1])))
    tasks = json.loads(_timed(store, "ls")[1])
    return {
        "tasks": len(tasks),
        "original_bytes_a_task": round(fmean(task["original_size"] for task in tasks)),
        "seconds": {
            "ingest": round(sum(ingests), 2),
            **{command: round(listings[-1][command], 3) for command in ("ls", "stats")},
        },
        f"extrapolated_to_{EXTRAPOLATED}": {
            "ingest": round(sum(ingests) * EXTRAPOLATED / counts[1], 1),
            **{
                command: round(extrapolate(counts, [listing[command] for listing in listings]), 3)
                for command in ("ls", "stats")
            },
        },
    }


def measure_codes(store: Path, error: float, few: Sequence[str], errors: Sequence[float]) -> dict[str, Any]:
    """Train on all tasks of a store, with codes of one error, then make codes of a few tasks with others.

    Args:
        store: The store.
        error: Largest relative error of the codes of all tasks.
        few: The few tasks.
        errors: Their largest relative errors: those that another method reached on the same files.
    """
    training, lines = _timed(store, "train", "--no-eval", "--refine", "0", "--max-error", str(error))
    (trained,) = [line for line in _lines(lines) if line["type"] == "trained"]
    found = {
        "error": error,
        **_codes(json.loads(_timed(store, "ls")[1])),
        "generator_bytes": trained["generator_size"],
        "steps": trained["metrics"]["steps"],
        "peak_memory": trained["metrics"]["peak_memory"],
        "seconds_to_train_and_encode": round(training, 1),
    }
    for limit in errors:
        seconds, _ = _timed(store, "encode", *few, "--max-error", str(limit))
        tasks = [task for task in json.loads(_timed(store, "ls")[1]) if task["name"] in few]
        found.setdefault("few", {})[str(limit)] = {**_codes(tasks), "seconds_a_task": round(seconds / len(few), 1)}
    return found


def _codes(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tasks": len(tasks),
        "bytes_a_task": round(fmean(task["code_size"] for task in tasks)),
        "relative_error_mean": round(fmean(task["relative_error"] for task in tasks), 4),
        "relative_error_worst": round(max(task["relative_error"] for task in tasks), 4),
    }


def extrapolate(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the seconds at `EXTRAPOLATED` tasks on the line through two measurements, which never falls."""
    slope = max(0.0, (seconds[1] - seconds[0]) / (counts[1] - counts[0]))
    return seconds[1] + slope * (EXTRAPOLATED - counts[1])


def measure_resize(
    python: Path, sd_scripts: Path, files: Sequence[Path], errors: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Run `resize.py` with the interpreter that has sd-scripts' requirements, and summarise it."""
    command = [str(python), "-m", "tests.benchmarks.image_fleet.resize", str(sd_scripts)]
    with tempfile.TemporaryDirectory(prefix="resize-") as folder:
        out = Path(folder) / "found.json"
        options = ["--out", str(out), "--errors", *map(str, errors)]
        _run([*command, *map(str, files), *options])
        found = json.loads(out.read_text("utf-8"))
        _run([*command, str(files[0]), "--check", "--out", str(out)])
        compared = json.loads(out.read_text("utf-8"))["check"]
    return {
        "files": {"count": len(files), "original_bytes": round(fmean(file["original"] for file in found.values()))},
        "compared_with_the_tool": compared,
        "errors": {str(error): best_of(found, str(error)) for error in errors},
    }


def best_of(found: dict[str, Any], error: str) -> dict[str, Any]:
    """Return each method's mean bytes and error over the files, and the method of the smallest files."""
    files = [file["errors"][error] for file in found.values()]
    methods = {
        method: {
            "bytes": round(fmean(file[method]["bytes"] for file in files)),
            "error": round(fmean(file[method]["error"] for file in files), 4),
            "mean_rank": round(fmean(file[method]["mean_rank"] for file in files), 2),
        }
        for method in files[0]
    }
    best = min(methods, key=lambda method: methods[method]["bytes"])
    return {"best": best, **methods}


def measure_convert(files: Sequence[Path], sizes: Sequence[int], work: Path) -> dict[str, dict[str, float] | None]:
    """Shrink files with `icm convert --size` to sizes that resize reached, and return by size the error left.

    A size that one of the files cannot be cut to, since each module keeps a rank, has None: sizes are means over files.
    """
    found: dict[str, dict[str, float] | None] = {}
    for size in sizes:
        errors, bytes_ = list[float](), list[int]()
        for path in files:
            copy = work / path.name
            command = [*_icm(), "convert", str(path), str(copy), "--size", str(size), "--force"]
            if subprocess.run(command, capture_output=True).returncode:
                break
            errors.append(real_error(cuts_of(path), {name: value.float() for name, value in load_file(copy).items()}))
            bytes_.append(copy.stat().st_size)
            copy.unlink()
        is_whole = len(errors) == len(files)
        found[str(size)] = {"error": round(fmean(errors), 4), "bytes": round(fmean(bytes_))} if is_whole else None
    return found


def _icm() -> list[str]:
    return [sys.executable, "-c", "from icm_cli.app import main; main()"]


def _timed(store: Path, *arguments: str) -> tuple[float, str]:
    started = time.perf_counter()
    printed = _run([*_icm(), "--store", str(store), *arguments, "--json"])
    return time.perf_counter() - started, printed


def _median(store: Path, command: str) -> float:
    return median(_timed(store, command)[0] for _ in range(5))


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, _MISSED):
        sys.exit(f"{' '.join(command[3:8])}: exit {done.returncode}\n{done.stderr}")
    return done.stdout
