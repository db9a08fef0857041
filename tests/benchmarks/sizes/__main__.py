"""The sizes that people have, before and after a revision: time, memory and bytes of training, encoding, decoding.

    python -m tests.benchmarks.sizes --fleet DIR [--before REVISION] [--cases NAME ...] [--out FILE.json]

DIR is the fleet of 20. Each case is one run of `icm ingest` and `icm train`; then one adapter is decoded and loaded
seven times in a process of its own, and encoded three times in another. All that with the code of this working tree,
and in turn with that of the other revision, checked out beside it. Where the older code would take hours, both take the
same few steps. No base model is at hand, so channel weights are even. The peak of training is that of the whole
process, some 0.3 GB of it torch; memory of decoding and encoding is what it adds to a process with generator and
adapter. A hundredth is a code of at most so many bytes of the adapter's file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.sizes.adapters import build

ROOT = Path(__file__).parents[3]
RESULT = Path(__file__).parents[1] / "results" / "sizes.json"
_ICM = "from icm_cli.app import main; main()"
_CODE = """import json, os, resource, statistics, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from icmlora.generator.codec.encoding import encode_adapter
from icmlora import load_adapter
from icmlora.fleet.context import Context
from icmlora.generator.codec.limits import Limits
from icmlora.generator.codec.generator_file import GeneratorFile
store, adapter, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
weights = adapter / "adapter_model.safetensors" if adapter.is_dir() else adapter
with Context(store).open() as opened:
    row = opened.task(adapter.stem).code
    code = opened.blobs.read(row.blob)
    codec = GeneratorFile(opened.blobs.read(row.generator)).codec_of(code)
def seconds(function, times=7):
    took = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        took.append(time.perf_counter() - started)
    return statistics.median(took)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def grown(function):
    before = resident()
    function()
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, 0)
def load():
    return [tensor.clone() for tensor in load_file(weights).values()]
def load_cold():
    with weights.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return load()
def encode(**limits):
    return encode_adapter(codec, loaded, {}, limits=Limits(**limits)).data
if what == "decode":
    print(json.dumps({"code_bytes": len(code), "decode_memory": grown(lambda: codec.decode(code)),
        "decode_seconds": seconds(lambda: codec.decode(code)), "load_seconds": seconds(load),
        "load_cold_seconds": seconds(load_cold)}))
else:
    loaded = load_adapter(adapter)
    memory = grown(lambda: encode(tolerance=0.11))
    took = seconds(lambda: encode(tolerance=0.11), 3)
    small = encode(size=weights.stat().st_size // 100)
    print(json.dumps({"encode_seconds": took, "encode_memory": memory, "hundredth_bytes": len(small),
        "hundredth_decode_seconds": seconds(lambda: codec.decode(small))}))
"""


@dataclass(frozen=True)
class Case:
    """A fleet, and for how many steps it is trained; None is the default."""

    adapters: int
    steps: int | None
    both: bool = True  # also with the older revision


CASES = {
    "fleet of 20": Case(20, None),
    "8B, 20 steps": Case(2, 20),
    "SDXL, 20 steps": Case(2, 20),
    "8B, whole": Case(20, None, both=False),
    "96 kinds, 20 steps": Case(8, 20, both=False),
    "192 kinds, 20 steps": Case(8, 20),
    "192 kinds, whole": Case(8, None, both=False),
    "300 tiny": Case(300, None),
}


def measure(tree: Path, adapters: Path, case: Case, store: Path) -> dict[str, Any]:
    """Ingest, train and decode with the code in a folder; returns what it took and gave."""
    load = os.getloadavg()[0]
    _python(tree, _ICM, "--store", str(store), "ingest", str(adapters), "--no-vectors")
    options = [] if case.steps is None else ["--steps", str(case.steps)]
    lines = _python(
        tree, _ICM, "--store", str(store), "train", "--no-eval", "--refine", "0", "--json", *options
    ).splitlines()
    (trained,) = [line for line in map(json.loads, lines) if line["type"] == "trained"]
    metrics = trained["metrics"]
    adapter = next(path for path in sorted(adapters.rglob("*")) if path.suffix == ".safetensors")
    if adapter.name == "adapter_model.safetensors":
        adapter = adapter.parent
    measured: dict[str, Any] = {}
    for what in ("decode", "encode"):  # each in a process of its own: the peak of a process never falls
        measured |= json.loads(_python(tree, _CODE, str(store), str(adapter), what))
    shutil.rmtree(store)
    return {
        "load": round(load, 2),
        "steps": metrics["steps"],
        "fit_seconds": metrics["fit_seconds"],
        "encode_seconds_a_task": round(metrics["encode_seconds"] / trained["tasks"], 3),
        "train_peak_memory": metrics["peak_memory"],
        "generator_bytes": trained["generator_size"],
        "codes_bytes": trained["codes_size"],
        **measured,
    }


def _python(tree: Path, code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    # Python looks into the working folder before anything else.
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    if done.returncode:
        sys.exit(f"{arguments[2:5]}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=Path, required=True, help="folder with the fleet of 20")
    parser.add_argument("--before", help="older revision to compare with")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which cases (default all)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write; other cases in it stay")
    options = parser.parse_args()
    found = json.loads(options.out.read_text("utf-8"))["cases"] if options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="sizes-") as folder:
        work, trees = Path(folder), {"now": ROOT}
        if options.before is not None:
            trees["before"] = work / "before"
            subprocess.run(
                ["git", "-C", ROOT, "worktree", "add", "--detach", trees["before"], options.before], check=True
            )
        try:
            for name in options.cases:
                case = CASES[name]
                # In a process of its own: the peak memory of a child counts what its parent had when it began.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as builder:
                    adapters = builder.submit(build, name, case.adapters, work / "adapters", options.fleet).result()
                used = {which: tree for which, tree in trees.items() if which == "now" or case.both}
                found[name] = {which: measure(tree, adapters, case, work / "store") for which, tree in used.items()}
                found[name]["case"] = asdict(case)
                print(json.dumps({name: found[name]}), flush=True)
                shutil.rmtree(work / "adapters", ignore_errors=True)
        finally:
            if options.before is not None:
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", trees["before"]], check=True)
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine() | {"torch_threads": torch.get_num_threads()},
        "before": options.before,
        "cases": found,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
