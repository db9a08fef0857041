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
    from icmlora.fleet.materialize import Materialized, MaterializeRequest


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
    typer.Option("--output", "-o", metavar="DIR", help="Folder to write; absent or empty.", show_default=False),
]
SourceOpt = Annotated[
    SourceName,
    typer.Option(
        "--source",
        help="auto: the best there is: original, residual, code. residual: the task's code with its residual. "
        "code: the code alone. generate: predict it from the task's vectors alone.",
    ),
]
DtypeOpt = Annotated[DtypeName, typer.Option("--dtype", help="Number format; an original keeps its own.")]
ErrorOpt = Annotated[
    float | None,
    typer.Option(
        "--max-error", metavar="X", min=0.0, help="Refuse (exit 14) above this relative dW error.", show_default=False
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
    dtype: DtypeOpt = DtypeName.BFLOAT16,
    max_error: ErrorOpt = None,
    force: ForceOpt = False,
) -> None:
    """Write TASK's adapter as a PEFT folder that loads anywhere.

    Needs neither the base model nor a GPU. The same command writes the same bytes. With --seed the latent of a
    generated adapter is sampled instead of taken at its mean. With --from no store is needed: the code is decoded from
    a bundle, every byte of which is checked first.

    Example:
      icm materialize dog-detection -o adapter/
    """
    from icmlora.fleet.materialize import MaterializeRequest
    from icmlora.fleet.materialize import materialize as write

    if bundle is not None and (seed is not None or source not in (SourceName.AUTO, SourceName.CODE)):
        raise UsageProblem("a bundle holds codes only", hint="without --seed, --from goes with --source auto or code")
    if seed is not None and source not in (SourceName.AUTO, SourceName.GENERATE):
        raise UsageProblem(f"--seed samples a generated adapter; --source {source.value} has nothing to sample")
    request = MaterializeRequest(
        task=task,
        directory=output,
        source=source.value,
        dtype=dtype.value,
        seed=seed,
        force=force,
        max_error=max_error,
    )
    done = write(session.context, request) if bundle is None else _from_bundle(bundle, request)
    if bundle is None and source is SourceName.AUTO and done.rung in ("residual", "code"):
        session.out.note(f"the original of {done.task} was evicted: decoded from {_FROM[done.rung]} instead")
    _tell(session, done)


def _from_bundle(bundle: Path, request: MaterializeRequest) -> Materialized:
    from icmlora.fleet.bundles import materialize_bundled

    return materialize_bundled(bundle, request)


def _tell(session: Session, done: Materialized) -> None:
    out = session.out
    out.document(
        {
            "task": done.task,
            "output": str(done.directory),
            "source": done.rung,
            "generator": done.generator,
            "dw_error": done.dw_error,
            "retained_gain": done.retained_gain,
            "weights": done.weights,
        }
    )
    out.answer(str(done.directory))
    known = [
        ("relative dW error", done.dw_error),
        ("retained gain", done.retained_gain),
    ]
    figures = "".join(f", {name} {value:.4f}" for name, value in known if value is not None)
    out.note(f"{done.task} from {_FROM[done.rung]}{figures}")


_FROM = {
    "original": "its original, byte for byte",
    "residual": "its code and residual",
    "code": "its code",
    "generate": "its task vectors",
}
