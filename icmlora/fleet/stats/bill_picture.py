"""Draw what a fleet takes on disk against the number of tasks. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icmlora.errors import DataError
from icmlora.io.staging import check_absent, writing_file
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.stats.bill import BaseModelBill, Bill

_MEBIBYTE = 2**20
# Without the date: the same store gives the same bytes.
_METADATA = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": None}
_GREY, _BLUE = "#6e7781", "#0072b2"  # both are readable on white and on black


def check_plot(path: Path, *, force: bool = False) -> None:
    """Check that a plot can be drawn to a file; raises `DataError` or `OutputExists`."""
    if path.suffix.lower() not in _METADATA:
        raise DataError("a plot must be an .svg, .png or .pdf file", path=path, hint="use one of these endings")
    check_absent(path, force=force)
    _pyplot()


def plot_bill(found: Bill, path: Path, *, force: bool = False) -> None:
    """Draw bytes against tasks, as adapters in bf16 and as generator and codes; raises `DataError` without a code."""
    fleets = [fleet for fleet in found.fleets if fleet.encoded]
    if not fleets:
        raise DataError("no task has a code, so there is nothing to draw", hint="run `icm train`")
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(fleets), squeeze=False, figsize=(6.4 * len(fleets), 4.2), layout="constrained"
    )
    for axis, fleet in zip(axes[0], fleets, strict=True):
        _draw(axis, fleet)
    picture, ending = io.BytesIO(), path.suffix.lower()
    figure.savefig(picture, format=ending[1:], metadata=_METADATA[ending])
    pyplot.close(figure)
    with writing_file(path, force=force) as stream:
        stream.write(picture.getvalue())


def _draw(axis: Any, fleet: BaseModelBill) -> None:
    """Draw the two lines of a fleet, each with its name at its end."""
    bf16 = sum(task.bf16_size for task in fleet.encoded) / len(fleet.encoded) / _MEBIBYTE
    shared, marginal = fleet.shared_size / _MEBIBYTE, (fleet.marginal_size or 0.0) / _MEBIBYTE
    tasks = len(fleet.encoded)
    last = max(tasks, 2 * (fleet.break_even or tasks))
    axis.plot([0, last], [0, bf16 * last], color=_GREY)
    axis.plot([0, last], [shared, shared + marginal * last], color=_BLUE)
    axis.plot([tasks], [shared + marginal * tasks], "o", color=_BLUE)
    _label(axis, last, bf16 * last, "all adapters in bf16", _GREY, align="right")
    _label(axis, last, shared + marginal * last, "generator + codes + vectors", _BLUE, align="right")
    _label(axis, tasks, shared + marginal * tasks, f"this fleet: {counted(tasks, 'task')}", _BLUE, below=True)
    if fleet.break_even is not None:
        axis.axvline(fleet.break_even, color=_GREY, linestyle=":", linewidth=1)
        _label(axis, fleet.break_even, 0, f"break-even: {counted(fleet.break_even, 'task')}", _GREY)
    axis.set_title(fleet.base_model.replace("$", r"\$"), fontsize="medium")
    axis.set_xlabel("tasks")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("MiB on disk")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)


def _label(axis: Any, x: float, y: float, text: str, colour: str, *, align: str = "left", below: bool = False) -> None:
    """Write a text next to a point, 5 typographic points away from it."""
    axis.annotate(
        text,
        (x, y),
        xytext=(-5 if align == "right" else 5, -5 if below else 5),
        textcoords="offset points",
        color=colour,
        horizontalalignment=align,
        verticalalignment="top" if below else "bottom",
    )


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[plot]'"
        raise DataError("drawing needs matplotlib, which is not installed", hint=hint) from error
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "icm"
    from matplotlib import pyplot

    return pyplot
