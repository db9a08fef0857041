"""Compare tasks by their vectors: `icm map`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icmlora.errors import DataError
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.map.picture import draw_map
from icmlora.fleet.params import BaseModelName, Param, ReplacePlot
from icmlora.io.staging import check_absent, writing_file
from registry.manifests import View

if TYPE_CHECKING:
    from icmlora.fleet.map.task_map import MapReport


def _clusters(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise DataError(f"--clusters {text!r} is not a positive number", hint="use a positive number, or auto")
    return int(text)


@use_case
def map_fleet(
    context: Context,
    *,
    view: Annotated[
        View,
        Param("Vectors to compare: with the adapter (adapted) or from the base model alone (context).", "--view"),
    ] = "adapted",
    base_model: BaseModelName = None,
    clusters: Annotated[
        int | None,
        Param(
            "Number of clusters. Default: auto, which maximises the mean silhouette.",
            "--clusters N|auto",
            parse=_clusters,
        ),
    ] = None,
    plot: Annotated[str | Path | None, Param("Also draw the map as an SVG file.", "--plot FILE.svg")] = None,
    force: ReplacePlot = False,
) -> MapReport:
    """Compare tasks by their vectors and group them into clusters.

    DISTANCE is the cosine distance between vectors centred on the fleet's mean: 0 means the same direction, 1
    unrelated, 2 opposite. SILHOUETTE is 1 well inside a group, 0 on its border, and negative if another group is
    nearer. By task, it shows how well the support sets of different tasks are separated; by cluster, how well the
    clusters are. -v adds a row per task, and --quiet prints one cluster per line.

    Example:
      icm map --plot map.svg

    Raises:
        DataError: Too few tasks have comparable vectors, there are fewer tasks than clusters, or the plot is not
            an .svg file.
        OutputExists: The file exists and `force` is not given.
    """
    from icmlora.fleet.map.task_map import map_of  # imports numpy, as the next one does
    from icmlora.fleet.resources.stored_vectors import tasks_of_one_base

    picture = None if plot is None else Path(plot)
    if picture is not None:
        if picture.suffix.lower() != ".svg":
            raise DataError("a map must be an .svg file", path=picture, hint="use a file name that ends in .svg")
        check_absent(picture, force=force)
    with context.open(read_only=True) as store:
        base_model, tasks = tasks_of_one_base(store, base_model)
        found = map_of(store, base_model, tasks, view, clusters)
    if picture is not None:
        with writing_file(picture, force=force) as stream:
            stream.write(draw_map(found.map, base_model, view).encode())
    return found
