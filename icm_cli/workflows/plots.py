"""Pictures of the store; they need matplotlib, the extra `plot`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icm_cli.text import counted
from icmlora.errors import DataError
from icmlora.output_file import check_absent, writing_file

if TYPE_CHECKING:
    from icm_cli.workflows.accounting import Bill, FleetBill

_MEBIBYTE = 2**20
# Without the date: the same store gives the same bytes.
_METADATA = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": None}


def check_plot(path: Path, *, force: bool = False) -> None:
    """Check that a plot can be drawn to a file, before the work of finding out what is on it.

    Raises:
        DataError: The file's ending is not svg, png or pdf, or matplotlib is not installed.
        OutputExists: The file exists and `force` is not given.
    """
    if path.suffix.lower() not in _METADATA:
        raise DataError("a plot is an .svg, .png or .pdf file", path=path, hint="give it one of these endings")
    check_absent(path, force=force)
    _pyplot()


def plot_bill(found: Bill, path: Path, *, force: bool = False) -> None:
    """Draw bytes against the number of tasks: every adapter in bf16, and generator plus codes and vectors.

    The file is written whole, or not at all.

    Raises:
        DataError: Nothing is encoded.
        OutputExists: The file exists and `force` is not given.
    """
    fleets = [fleet for fleet in found.fleets if fleet.encoded]
    if not fleets:
        raise DataError("nothing is encoded, so there is nothing to draw", hint="`icm train` makes codes")
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


def _draw(axis: Any, fleet: FleetBill) -> None:
    bf16 = sum(task.bf16_size for task in fleet.encoded) / len(fleet.encoded)
    marginal = fleet.marginal_size or 0.0
    tasks = len(fleet.encoded)
    last = max(tasks, 2 * (fleet.break_even or tasks))
    counts = list(range(last + 1))
    axis.plot(counts, [bf16 * count / _MEBIBYTE for count in counts], label="every adapter in bf16")
    compact = [(fleet.shared_size + marginal * count) / _MEBIBYTE for count in counts]
    axis.plot(counts, compact, label="generator + codes + vectors")
    axis.plot([tasks], [compact[tasks]], "o", color="C1", label=f"this fleet: {counted(tasks, 'task')}")
    if fleet.break_even is not None:
        axis.axvline(fleet.break_even, color="grey", linestyle=":", label=f"break-even at {fleet.break_even}")
    axis.set_title(fleet.base_model.replace("$", r"\$"), fontsize="medium")
    axis.set_xlabel("tasks")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("MiB on disk")
    axis.set_ylim(bottom=0)
    axis.legend()


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
