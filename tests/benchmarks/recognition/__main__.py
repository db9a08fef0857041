"""Compare conditions: `python -m tests.benchmarks.recognition --fleet FOLDER --base FOLDER --store STORE`.

STORE holds the fleet with its task vectors. It takes about a quarter of an hour on a CPU; --no-bits only recognises.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from icmlora.fleet.context import Context
from tests.benchmarks.recognition.study import CONDITIONS, bits, extract, recognition

RESULTS = Path(__file__).parent.parent / "results" / "recognition.json"
DESCRIPTIONS = Path(__file__).parent / "descriptions.json"


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.recognition")
    parser.add_argument("--fleet", type=Path, required=True, help="a folder of adapters with eval.jsonl")
    parser.add_argument("--store", type=Path, required=True, help="a store of them, with task vectors")
    parser.add_argument("--base", type=Path, required=True, help="the base model")
    parser.add_argument("--base-label", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, required=True, help="folder for a base model converted from GGUF")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--no-bits", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    descriptions = json.loads(DESCRIPTIONS.read_text())
    found = extract(Context(given.store, given.cache), given.base_label, given.fleet, descriptions)
    result = recognition(found)
    write(given.output, result)
    for name in () if given.no_bits else CONDITIONS:
        with tempfile.TemporaryDirectory() as folder:
            place = Context(Path(folder) / "store", given.cache)
            size = bits(place, given.base_label, given.base, given.fleet, found.known.get(name), given.steps)
        result["conditions"][name] |= size
        result["steps"] = given.steps
        write(given.output, result)
        sys.stdout.write(f"{name}: {size['code_bytes']:,} bytes of codes\n")
        sys.stdout.flush()


def write(path: Path, result: object) -> None:
    """Write the results so far."""
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
