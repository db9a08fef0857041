"""Hundreds of small files in one folder: what the commands that meet all of them take as whole processes.

    python -m tests.benchmarks.many_files [--files 500] [--out FILE.json]

The files are LoRAs of an image model under kohya's names, of rank 4, with random factors that are drawn with fixed
seeds; every tenth has the tensors of the one before it. The digest is of the generator and all codes: a change that is
only meant to be faster leaves it as it is. With OMP_NUM_THREADS=1 no command takes a second thread or process.

icm's own modules are compiled first, as an installation does: where PYTHONDONTWRITEBYTECODE is set, each command would
compile them again.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file

from registry.store import Store
from tests.benchmarks.performance.commands import process
from tests.benchmarks.performance.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "many-files.json"
RANK, WIDTH, CONTEXT = 4, 640, 2048
HEADER = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "4", "ss_network_alpha": "2.0"}
COMMANDS: dict[str, tuple[list[str], float]] = {
    "duplicates": (["duplicates"], 4.0),
    "train": (["train", "--steps", "100", "--refine", "0"], 40.0),
    "evict": (["evict", "--max-error", "0.9", "--dry-run"], 6.0),
}
"""Arguments, and the seconds that they may take on two free cores."""


def build(folder: Path, count: int) -> None:
    """Write `count` files of eight modules each."""
    folder.mkdir()
    for number in range(count):
        draw = torch.Generator().manual_seed(number - (number % 10 == 9))
        tensors = {}
        for block in range(2):
            for layer in ("attn1_to_q", "attn1_to_v", "attn2_to_k", "attn2_to_out_0"):
                stem = f"lora_unet_input_blocks_4_1_transformer_blocks_{block}_{layer}"
                inputs = CONTEXT if layer == "attn2_to_k" else WIDTH
                tensors[f"{stem}.lora_down.weight"] = (torch.randn(RANK, inputs, generator=draw) / 8).half()
                tensors[f"{stem}.lora_up.weight"] = (torch.randn(WIDTH, RANK, generator=draw) / 50).half()
                tensors[f"{stem}.alpha"] = torch.tensor(2.0).half()
        save_file(
            tensors, folder / f"style-{number:03d}.safetensors", metadata=HEADER | {"ss_output_name": f"{number}"}
        )


def measure(store: Path, arguments: list[str], limit: float) -> dict[str, object]:
    """Run one command and return the seconds that it took."""
    load, before, started = os.getloadavg()[0], os.times(), time.perf_counter()
    process([sys.executable, "-c", "from icm_cli.app import main; main()", "--store", str(store), *arguments])
    elapsed, after = time.perf_counter() - started, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "command": " ".join(["icm", *(word for word in arguments if not word.startswith("/"))]),
        "elapsed_seconds": round(elapsed, 2),
        "processor_seconds": round(used, 2),
        "load": round(load, 2),
        "limit_seconds": limit,
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
    parser.add_argument("--files", type=int, default=500, help="how many (default 500)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    for package in ("icm_cli", "icmlora", "registry"):
        compileall.compile_dir(Path(__file__).parents[2] / package, quiet=1)
    with tempfile.TemporaryDirectory(prefix="many-files-") as folder:
        files, store = Path(folder) / "files", Path(folder) / "store"
        build(files, options.files)
        runs = [measure(store, ["ingest", str(files)], 5.0)]
        runs += [measure(store, arguments, limit) for arguments, limit in COMMANDS.values()]
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": describe_machine(),
            "files": options.files,
            "runs": runs,
            "digest": digest(store),
        }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
