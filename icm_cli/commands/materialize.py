"""`icm materialize`: write a task's adapter as a PEFT folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import UsageProblem
from icm_cli.options import ForceOpt, FromOpt, SeedOpt, TaskArg
from icm_cli.session import Session, command

if TYPE_CHECKING:
    from icmlora.fleet.materialize import MaterializeReport


class SourceName(StrEnum):
    """Where the adapter comes from."""

    AUTO = "auto"
    ORIGINAL = "original"
    RESIDUAL = "residual"
    CODE = "code"
    GENERATE = "generate"


class DtypeName(StrEnum):
    """Number format of the written weights."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


OutputOpt = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Folder to write. Must be absent or empty.", show_default=False),
]
SourceOpt = Annotated[
    SourceName,
    typer.Option(
        "--source",
        help="original: the ingested files. residual: the code, corrected by its residual. code: the code alone. "
        "generate: predicted from the task vectors. auto: the first of original, residual and code that is there.",
    ),
]
DtypeOpt = Annotated[
    DtypeName | None,
    typer.Option(
        "--dtype", help="Number format of decoded weights. Default: that of the original.", show_default=False
    ),
]
PadOpt = Annotated[
    int | None,
    typer.Option(
        "--pad-rank",
        metavar="N",
        min=1,
        help="Write decoded weights with rank N for all modules, filled with zeros, for engines that need one rank. "
        "Default: the ranks of the original.",
        show_default=False,
    ),
]
ErrorOpt = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        metavar="X",
        min=0.0,
        help="Exit with code 14 and write nothing if the relative error, ||dW' - dW|| / ||dW||, is above X.",
        show_default=False,
    ),
]


@command
def materialize(
    session: Session,
    task: TaskArg,
    output: OutputOpt,
    bundle: FromOpt = None,
    source: SourceOpt = SourceName.AUTO,
    seed: SeedOpt = None,
    dtype: DtypeOpt = None,
    pad_rank: PadOpt = None,
    max_error: ErrorOpt = None,
    force: ForceOpt = False,
) -> None:
    """Write the adapter of TASK as a folder.

    A decoded adapter has the form of its original: configuration, names, ranks and number formats. Neither the base
    model nor a GPU is needed. The same command writes the same bytes. With --seed, the adapter is
    generated from a sampled latent instead of the mean. With --from, the adapter is decoded from a bundle and no store
    is needed; every byte of the bundle is checked first.

    Example:
      icm materialize dog-detection -o adapter/
    """
    if bundle is not None and (seed is not None or source not in (SourceName.AUTO, SourceName.CODE)):
        raise UsageProblem(
            "a bundle holds codes only", hint="use --from without --seed, and with --source auto or code"
        )
    if seed is not None and source not in (SourceName.AUTO, SourceName.GENERATE):
        raise UsageProblem(f"--seed is for generated adapters, not for --source {source.value}")
    if bundle is not None:
        from icmlora.fleet.bundles import Bundle

        kind = dtype and dtype.value
        done = Bundle(bundle).materialize(task, output, dtype=kind, pad_rank=pad_rank, max_error=max_error, force=force)
    else:
        done = session.fleet.materialize(
            task,
            output,
            source=source.value,
            dtype=dtype and dtype.value,
            pad_rank=pad_rank,
            seed=seed,
            max_error=max_error,
            force=force,
        )
        if source is SourceName.AUTO and done.source in ("residual", "code"):
            session.out.note(f"the original of {done.task} was evicted; decoding {_FROM[done.source]} instead")
    _tell(session, done)


def _tell(session: Session, done: MaterializeReport) -> None:
    out = session.out
    out.document(
        {
            "task": done.task,
            "output": str(done.directory),
            "source": done.source,
            "generator": done.generator,
            "relative_error": done.relative_error,
            "squared_error": done.squared_error,
            "retained_gain": done.retained_gain,
            "weights": done.weights,
        }
    )
    out.answer(str(done.directory))
    known = [("relative error", done.relative_error), ("retained gain", done.retained_gain)]
    if done.source == "original":
        known = []  # nothing was lost
    figures = "".join(f", {name} {value:.4f}" for name, value in known if value is not None)
    out.note(f"wrote {done.task} from {_FROM[done.source]}{figures}")


_FROM = {
    "original": "its original, byte for byte",
    "residual": "its code and residual",
    "code": "its code",
    "generate": "its task vectors",
}
