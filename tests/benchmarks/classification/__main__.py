"""A fleet of six text classifiers with trained heads: what accuracy their codes keep, and what the heads take.

usage: OMP_NUM_THREADS=1 python -m tests.benchmarks.classification --work W [--out FILE.json]

The base model is MiniLM (22.7 M parameters) from a PyPI package, the texts come from Debian, PyPI and npm packages, and
each adapter is trained by PEFT with `task_type="SEQ_CLS"` in less than a minute of one core. Adapters that are there
are not trained again. Packages of about 100 MB are kept in W.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.benchmarks.classification.rows import cut
from tests.benchmarks.classification.study import run, table
from tests.benchmarks.classification.tasks import TASKS
from tests.benchmarks.classification.train import BASE_MODEL, base_folder, train
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.performance.machine import describe_machine

RESULT = Path(__file__).parents[1] / "results" / "classification.json"


def main() -> None:
    """Build the fleet, run the study, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of downloaded packages and trained adapters")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    packages = Packages(options.work.resolve())
    fleet, base = options.work.resolve() / "fleet", base_folder(packages)
    data = {task.name: cut(task.documents(packages)) for task in TASKS}
    for name, rows in data.items():
        if not (fleet / name / "adapter_config.json").exists():  # the last file that PEFT writes
            print(f"training {name}: {len(rows.train)} rows, {len(rows.classes)} classes", flush=True)
            train(base, rows, fleet / name)
    with tempfile.TemporaryDirectory(prefix="classification-") as work:
        study = run(fleet, base, data, Path(work))
    print(table(study))
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "base_model": BASE_MODEL,
        "packages": dict(sorted(packages.versions.items())),
        **asdict(study),
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
