"""Put the points of several runs on one fleet into one study, with one set of BD-rates and its figures.

    python -m tests.benchmarks.rate_distortion.merge FIRST.json MORE.json ... --out FILE.json [--figures FOLDER]

A point of a later file takes the place of an earlier one of the same name. A point that was measured in another way
than the first file says (fewer texts, another precision) says so in its notes. The default is that of the last file
that names one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.rate_distortion.figure import draw
from tests.benchmarks.rate_distortion.study import PointResult, TaskResult
from tests.benchmarks.rate_distortion.summary import report, summarise, table


def main(arguments: list[str] | None = None) -> None:
    """Merge, print the table, write JSON and figures."""
    parser = argparse.ArgumentParser(prog="merge", description=__doc__)
    parser.add_argument("studies", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figures", type=Path, help="folder to write the figures to")
    options = parser.parse_args(arguments)
    document = merged([json.loads(path.read_text(encoding="utf-8")) for path in options.studies])
    print(table([summarise(point_of(point)) for point in document["points"]]))
    options.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.figures is not None:
        draw(document, options.figures)


def merged(studies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one study of the points of all.

    Raises:
        SystemExit: They are not of the same tasks.
    """
    first = studies[0]
    points: dict[str, dict[str, Any]] = {}
    for study in studies:
        if (study["tasks"], study["bf16_total"]) != (first["tasks"], first["bf16_total"]):
            raise SystemExit("the studies are of different fleets")
        another = study["settings"] if study["settings"] != first["settings"] else None
        for point in study["points"]:
            notes = point["notes"] if another is None else {**point["notes"], "settings": another}
            points[point["name"]] = {**point, "notes": notes}
    how = {name: first[name] for name in ("date", "machine", "settings")}
    default = [study["default"] for study in studies if study.get("default") is not None]
    results = [point_of(point) for point in points.values()]
    return {**how, "default": default[-1] if default else None, **report(results)}


def point_of(point: dict[str, Any]) -> PointResult:
    """Return a point as it was before it was written."""
    tasks = tuple(TaskResult(**task) for task in point["by_task"])
    return PointResult(point["family"], point["name"], point["shared"], tasks, point["notes"])


if __name__ == "__main__":
    main()
