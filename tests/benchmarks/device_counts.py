"""Count what work on a card costs, on the stand-in for one: operators, copies and syncs. Nothing is timed.

    python -m tests.benchmarks.device_counts --fleet DIR --base DIR

The fleet has adapters with samples.jsonl; four of them are used. Writes results/device-counts.json under "after"; what
stands there under "before" was counted in the same way at commit 6af7e90, whose steps saw one adapter each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.device import card

card.install()

from icmlora import Fleet  # noqa: E402 - torch asks for its devices once
from icmlora.base_models.examples.examples import plain  # noqa: E402
from icmlora.base_models.finding.lookup import inspect_base  # noqa: E402
from icmlora.base_models.kinds.causal_lm import CausalLM  # noqa: E402
from icmlora.fleet.resources.adapter_source import StoreAdapterSource  # noqa: E402
from icmlora.formats.discovery.folder import load_adapter  # noqa: E402
from icmlora.generator.codec.codec import Codec  # noqa: E402
from icmlora.generator.config import config_for  # noqa: E402
from icmlora.generator.files.network_file import generator_to_bytes  # noqa: E402
from icmlora.training.initialisation import fresh_network  # noqa: E402
from icmlora.training.loop import draws_of  # noqa: E402
from registry.store import Store  # noqa: E402
from tests.benchmarks.performance.machine import describe_machine  # noqa: E402
from tests.device import workloads  # noqa: E402
from tests.device.counts import Counts  # noqa: E402

RESULT = Path(__file__).parent / "results" / "device-counts.json"
_TASKS = 4
_TOKENS = 192  # as refinement reads of a text by default


def main() -> None:
    """Count everything and write the JSON."""
    parser = argparse.ArgumentParser(prog="device_counts", description=__doc__)
    parser.add_argument("--fleet", type=Path, required=True, help="folder of adapters with samples.jsonl")
    parser.add_argument("--base", type=Path, required=True, help="folder of their base model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        after = count(Path(folder) / "store", options.fleet, options.base)
    document: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    document |= {"date": datetime.now(UTC).date().isoformat(), "machine": describe_machine(), "after": after}
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(after, indent=1))


def count(store: Path, adapters: Path, base_folder: Path) -> dict[str, Any]:
    """Count each kind of work."""
    folders = sorted(path.parent for path in adapters.glob("*/adapter_config.json"))[:_TASKS]
    fleet = Fleet(store)
    fleet.ingest(folders)
    with Store.open(store, read_only=True) as opened:
        source = StoreAdapterSource.of_base(opened, *opened.task_counts())
        layouts = source.layouts()
        config = config_for(source.base_model, layouts, tasks=_TASKS, condition_size=0, quality=4)
        net = fresh_network(config, source, 0)
        codec = Codec.of(generator_to_bytes(net))
        training, steps = workloads.training(net, source)
    fleet.train(steps=1, device="cpu", refine=0, evaluate=False)
    base = CausalLM().load(inspect_base(source.base_model, base_folder), device=workloads.CARD)
    rows = (folders[0] / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    texts = plain([json.loads(row)["text"] for row in rows])
    items = base.modality.prepare(base, texts[:8], _TOKENS, whole=True)
    loaded = [load_adapter(folder) for folder in folders]
    return {
        "training step, for each of its adapters": shown(workloads.share(training, steps * draws_of(workloads.CARD))),
        "adapters of a training step": draws_of(workloads.CARD),
        "refinement step, one task": shown(workloads.refinement(base, codec, loaded[:1], items)),
        "refinement step, four tasks together": shown(workloads.refinement(base, codec, loaded, items)),
        "evaluation, for each text": shown(workloads.evaluation(base, texts[:8], 256)),
        "vectors of one task": shown(workloads.vectors(base, folders[0], texts)),
        "one code decoded to the card": shown(workloads.decoding(fleet, fleet.tasks()[0].name)),
    }


def shown(counts: Counts) -> dict[str, int]:
    """Return counts as numbers by name."""
    names = ("operators", "views", "copies_to", "bytes_to", "copies_from", "bytes_from", "syncs")
    return {name: getattr(counts, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
