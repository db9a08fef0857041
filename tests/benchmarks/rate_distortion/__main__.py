"""Every method a curve of retained gain against bytes, measured after a save and a load by PEFT.

    python -m tests.benchmarks.rate_distortion --fleet DIR --base DIR [--store DIR]... [--methods NAME,...]
        [--texts N] [--dtype float32|bfloat16] [--tasks NAME,...] [--out FILE.json] [--figures FOLDER]

A killed run goes on where it was: bytes, errors and losses are kept in --cache as they come. --store adds icm's own
curve, a point for each trained store; --default names the one that `icm train` leaves when nothing is asked of it, and
the figure marks it. The packages that are compared with (vlora-dev, lorashare, lmzip) are left out with a word if they
are not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.rate_distortion.cache import Cache
from tests.benchmarks.rate_distortion.figure import draw
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.judging import Judge, Settings
from tests.benchmarks.rate_distortion.peers import PackageMissing
from tests.benchmarks.rate_distortion.points import all_points, chosen
from tests.benchmarks.rate_distortion.study import PointResult, Study
from tests.benchmarks.rate_distortion.summary import OURS, report, summarise, table

ROOT = Path(__file__).parents[3]
WORK = ROOT / "build" / "rate_distortion"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON and figures."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(options.texts, options.max_tokens, options.dtype)
    fleet = FleetFolder(options.fleet, options.tasks)
    cache = Cache(options.cache)
    study = Study(fleet, Judge(options.base, fleet, settings, cache), cache, options.work)
    results: list[PointResult] = []
    points = chosen(all_points(options.store, options.cvae_steps, options.base), options.methods)
    if options.default not in {None, *(point.name for point in points if point.family == OURS)}:
        raise SystemExit(f"--default {options.default}: no such store is measured")
    for point in points:
        try:
            results += study.run([point])
        except PackageMissing as error:
            print(f"{point.name}: {error}", file=sys.stderr)
            continue
        print(table([summarise(results[-1])]).splitlines()[-1], file=sys.stderr, flush=True)
    if not results:
        raise SystemExit("nothing was measured")
    document = _document(results, settings, options.default)
    print(table([summarise(result) for result in results]))
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.figures is not None:
        draw(document, options.figures)


def _document(results: list[PointResult], settings: Settings, default: str | None) -> dict[str, Any]:
    now = datetime.now(UTC).date().isoformat()
    how = {"texts": settings.texts, "max_tokens": settings.max_tokens, "dtype": settings.dtype}
    return {"date": now, "machine": describe_machine(), "settings": how, "default": default, **report(results)}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rate_distortion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fleet", type=Path, required=True, help="folder of adapters with eval.jsonl")
    parser.add_argument("--base", type=Path, required=True, help="folder of their base model")
    parser.add_argument("--store", type=Path, action="append", default=[], help="a trained store of the fleet")
    parser.add_argument("--default", metavar="NAME", help="which of the stores has what `icm train` makes by default")
    parser.add_argument("--methods", type=_names, default=[], help="names or families, with * and ?")
    parser.add_argument("--tasks", type=_names, default=[], help="only these")
    parser.add_argument("--texts", type=int, help="held-out texts of each task (default all)")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of each text (default 256)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--cvae-steps", type=int, default=400, help="training steps of the flat CVAE (default 400)")
    parser.add_argument("--cache", type=Path, default=WORK / "cache.jsonl", help="where results are kept as they come")
    parser.add_argument("--work", type=Path, default=WORK / "work", help="what methods keep between runs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--figures", type=Path, help="folder to write the figures to")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    main()
