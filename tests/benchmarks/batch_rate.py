"""Which learning rate several processes need: bytes of a fleet's codes by number of processes and factor of the rate.

    python -m tests.benchmarks.batch_rate [--fleet DIR] [--cases 1x1 2x1 2x1.414 4x1 4x2]

A case is a number of processes and what the learning rate is multiplied by in all, in place of the root of that
number. Writes results/batch-rate.json. All see the same number of adapters, so n processes take an n-th of the
optimiser's steps.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmlora.formats.discovery.folder import load_adapter
from icmlora.formats.peft.peft import CONFIG_NAME
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.config import config_for
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.training.config import TrainConfig
from icmlora.training.initialisation import fresh_network
from icmlora.training.loop import fit
from icmlora.training.ranks import joined
from icmlora.training.state import new_state
from tests.benchmarks.performance.machine import describe_machine
from tests.icmlora.small_fleet import MemoryAdapterSource

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "batch-rate.json"


def train(fleet: Path, factor: float) -> dict[str, Any] | None:
    """Train as one of several processes, with even weights and without vectors; rank 0 encodes and returns bytes."""
    adapters = [load_adapter(path.parent) for path in sorted(fleet.glob(f"*/{CONFIG_NAME}"))]
    source = MemoryAdapterSource([[adapter] for adapter in adapters], sets=0)
    config = config_for(adapters[0].base_model, source.layouts(), tasks=len(adapters), condition_size=0, quality=4)
    with joined() as ranks:
        rate = TrainConfig.learning_rate * factor / math.sqrt(ranks.count)
        options = TrainConfig.default(len(adapters), len(adapters), learning_rate=rate)
        state = new_state(fresh_network(config, source, 0), options)  # the same on every rank
        bits = [at.bits for at in fit(state, source, ranks)]
        if not ranks.is_first:
            return None
        last = bits[-len(bits) // 10 :]
        data = generator_to_bytes(state.net)
        codec = Codec.of(data)
        codes = [len(encode_adapter(codec, adapter, {}).data) for adapter in adapters]
        return {
            "processes": ranks.count,
            "factor": factor,
            "draws": options.steps,
            "bits_per_parameter_at_the_end": round(sum(last) / len(last), 4),
            "generator_bytes": len(data),
            "codes_bytes": sum(codes),
        }


def main() -> None:
    """Start the cases one after the other and write the JSON; or be one process of a case."""
    options = _options()
    if options.factor is not None:
        found = train(options.fleet, options.factor)
        if found is not None:
            print(json.dumps(found))
        return
    runs = []
    for case in options.cases:
        count, factor = case.split("x")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        command = [*launcher, "-m", "tests.benchmarks.batch_rate", "--fleet", str(options.fleet), "--factor", factor]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        runs.append(json.loads(done.stdout))
        print(done.stdout.strip(), flush=True)
    document = {"date": datetime.now(UTC).date().isoformat(), "machine": describe_machine(), "runs": runs}
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="batch_rate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fleet", type=Path, default=ROOT / "docs" / "example-fleet", help="folder of adapters")
    parser.add_argument("--cases", nargs="+", default=["1x1", "2x1", "2x1.414", "4x1", "4x2"], help="PROCESSESxFACTOR")
    parser.add_argument("--factor", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
