"""A fleet of LoRAs for SDXL: what icm makes of kohya's files, and sd-scripts' `resize_lora.py` at the same errors.

    python -m tests.benchmarks.image_fleet --sd-scripts DIR --sd-python VENV/bin/python [--work DIR]
                                           [--parts resize store codes convert] [--flat] [--count 50] [--rank 16]

The files are made, not trained: shapes and names are those of kohya's for SDXL, the singular values fall as those of
real language adapters do (`spectrum.py`), with --flat as those of the flattest of them. A listing of 1,000 tasks is
extrapolated from half of the files and all of them, an ingest of 1,000 from all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.image_fleet.build import write_fleet
from tests.benchmarks.image_fleet.resize import ERRORS
from tests.benchmarks.image_fleet.spectrum import FLAT, STEEP
from tests.benchmarks.image_fleet.study import measure_codes, measure_convert, measure_resize, measure_store
from tests.benchmarks.performance.machine import describe_machine

RESULT = Path(__file__).parents[1] / "results" / "image_fleet.json"
PARTS = ("resize", "store", "codes", "convert")


def measure(
    options: argparse.Namespace, work: Path, found: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> None:
    """Build the fleet, and run the parts that were asked for; each is saved when it is done."""
    spectrum = FLAT if options.flat else STEEP
    half = options.count // 2
    halves = (work / "first", work / "second")
    files = []
    for folder, numbers in zip(halves, (range(half), range(half, options.count)), strict=True):
        files += write_fleet(folder, numbers, rank=options.rank, text=options.text, spectrum=spectrum)
    few = files[: options.resized]
    fleet = {"rank": options.rank, "text": options.text, "spectrum": asdict(spectrum)}
    if found.get("fleet") != fleet:
        found = {"fleet": fleet}
    if "resize" in options.parts:
        found["resize"] = measure_resize(options.sd_python, options.sd_scripts, few, ERRORS)
        save(found)
    if "store" in options.parts:
        found["store"] = measure_store(halves, work / "store")
        save(found)
    if "codes" in options.parts:
        rows = found["resize"]["errors"].values()
        equal = sorted({row[row["best"]]["error"] for row in rows})
        found["codes"] = measure_codes(work / "store", options.error, [path.stem for path in few], equal)
        save(found)
    if "convert" in options.parts:
        best = [row[row["best"]]["bytes"] for row in found["resize"]["errors"].values()]
        found["convert"] = measure_convert(few, sorted(set(best)), work)
        save(found)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd-scripts", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--sd-python", type=Path, help="an interpreter with its requirements")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, default=50, help="files of the fleet (default 50)")
    parser.add_argument("--resized", type=int, default=5, help="files that are resized (default the first 5)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--text", action="store_true", help="with both text encoders")
    parser.add_argument("--flat", action="store_true", help="the flattest singular values measured")
    parser.add_argument("--error", type=float, default=0.3, help="largest relative error of icm's codes")
    parser.add_argument("--work", type=Path, help="where the fleet and the store go (default a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write; other parts in it stay")
    options = parser.parse_args()
    if "resize" in options.parts and not (options.sd_scripts and options.sd_python):
        parser.error("the part resize needs --sd-scripts and --sd-python")
    document = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {"fleets": {}}
    name = "flat" if options.flat else "steep"

    def save(found: dict[str, Any]) -> None:
        document["fleets"][name] = found
        document.update({"date": datetime.now(UTC).date().isoformat(), "machine": describe_machine()})
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="image-fleet-") as folder:
        measure(options, options.work or Path(folder), document["fleets"].get(name, {}), save)
    print(json.dumps({name: document["fleets"][name]}))


if __name__ == "__main__":
    main()
