"""Pictures of the store; they need matplotlib, the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from icmlora.errors import DataError

if TYPE_CHECKING:
    from icm_cli.workflows.accounting import Bill, FleetBill

_MEBIBYTE = 2**20


def plot_bill(found: Bill, path: Path) -> None:
    """Draw bytes against the number of tasks: every adapter in bf16, and generator plus codes and vectors.

    Raises:
        DataError: matplotlib is not installed, the file's ending is not svg, png or pdf, or nothing is encoded.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise DataError("a plot is an .svg, .png or .pdf file", path=path)
    fleets = [fleet for fleet in found.fleets if fleet.encoded]
    if not fleets:
        raise DataError("nothing is encoded, so there is nothing to draw", hint="`icm train` makes codes")
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(fleets), squeeze=False, figsize=(6.4 * len(fleets), 4.2), layout="constrained"
    )
    for axis, fleet in zip(axes[0], fleets, strict=True):
        _draw(axis, fleet)
    # Fixed metadata and ids: the same store gives the same bytes.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _draw(axis: Any, fleet: FleetBill) -> None:
    bf16 = sum(task.bf16_size for task in fleet.encoded) / len(fleet.encoded)
    marginal = fleet.marginal_size or 0.0
    tasks = len(fleet.encoded)
    last = max(tasks, 2 * (fleet.break_even or tasks))
    counts = list(range(last + 1))
    axis.plot(counts, [bf16 * count / _MEBIBYTE for count in counts], label="every adapter in bf16")
    compact = [(fleet.shared_size + marginal * count) / _MEBIBYTE for count in counts]
    axis.plot(counts, compact, label="generator + codes + vectors")
    axis.plot([tasks], [compact[tasks]], "o", color="C1", label=f"this fleet: {tasks} tasks")
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
