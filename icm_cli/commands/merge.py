"""`icm merge`: combine several adapters into one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from icm_cli.command import plain_command as command
from icm_cli.errors import Interrupted, UsageProblem
from icm_cli.options import DtypeName, ForceOpt, TasksArg, option
from icm_cli.session import Session
from icm_cli.text import as_fields
from icmlora.errors import Cancelled
from icmlora.io.text import human_size

if TYPE_CHECKING:
    from icmlora.fleet.write.merge import Merged

MethodName = Literal[
    "svd",
    "cat",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
MaybeOutputOpt = Annotated[Path | None, option("--output -o DIR", "Folder to write. Must be absent or empty.")]
NameOpt = Annotated[
    str | None, option("--as NAME", "Store the merged adapter as a new task. Can be combined with --output.")
]
MethodOpt = Annotated[
    MethodName,
    option(
        "--method",
        "PEFT merge method. cat: the exact weighted sum; ranks add up. svd: the sum, reduced to --rank. linear, ties, "
        "dare_linear, dare_ties, magnitude_prune: merge A and B separately; all adapters need the same rank. Other "
        "methods ending in _svd: merge the full dW and reduce it to --rank; slow.",
    ),
]
WeightsOpt = Annotated[
    str | None,
    option("--weights W,W,...", "Weight of each adapter, as 0.7,0.3. Default: equal weights that sum to 1."),
]
RankOpt = Annotated[
    int | None, option("--rank R", "Rank for svd methods. Default: the largest rank of the adapters.", min=1)
]
DensityOpt = Annotated[
    float, option("--density X", "Fraction of values that ties, dare and magnitude_prune keep.", min=0.0, max=1.0)
]
SeedOpt = Annotated[int, option("--seed N", "Random seed for dare methods.")]
SourceOpt = Annotated[
    Literal["auto", "original", "code"],
    option("--source", "Merge originals or decoded codes. auto: the original if the store has it."),
]


@command
def merge(
    session: Session,
    tasks: TasksArg,
    output: MaybeOutputOpt = None,
    name: NameOpt = None,
    method: MethodOpt = "svd",
    weights: WeightsOpt = None,
    rank: RankOpt = None,
    density: DensityOpt = 0.5,
    seed: SeedOpt = 0,
    source: SourceOpt = "auto",
    dtype: Annotated[DtypeName, option("--dtype", "Number format of the weights.")] = "bfloat16",
    force: ForceOpt = False,
) -> None:
    """Merge the adapters of several tasks into one.

    Uses PEFT's merge methods. The base model is not needed, but all adapters must fit in memory together. Store the
    result with --as, then check its quality with `icm eval NAME --data FILE`.

    Example:
      icm merge cats dogs -o pets/
      icm merge cats dogs --method ties_svd --weights 0.7,0.3 --density 0.2 --as pets
    """
    from icmlora.fleet.write.merge import merge

    try:
        with session.working("merge") as context:
            done = merge(
                context,
                tasks,
                output,
                name=name,
                method=method,
                weights=None if weights is None else _numbers(weights),
                rank=rank,
                density=density,
                seed=seed,
                source=source,
                dtype=dtype,
                force=force,
            )
    except Cancelled as stop:
        raise Interrupted("interrupted; wrote nothing", hint="run the same command again") from stop
    _print_result(session, done)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageProblem(f"--weights {text!r} is not a list of numbers", hint="write it as 0.7,0.3") from None


def _print_result(session: Session, done: Merged) -> None:
    out, where = session.out, None if done.directory is None else str(done.directory)
    out.document(
        {
            "output": where,
            "task": done.task,
            "base_model": done.base_model,
            "method": done.method,
            "density": done.density,
            "rank": done.rank,
            "size": done.size,
            "weights": done.weights,
            "parts": [as_fields(part) for part in done.parts],
        }
    )
    out.answer(where or str(done.task))
    some = ", ".join(f"{part.weight:.3g} of {part.task}" for part in done.parts)
    out.note(f"merged {some} with {done.method}: rank {done.rank}, {human_size(done.size)}")
    if done.task is not None:
        out.hint(
            f"run `icm train --update` to encode {done.task}, and `icm eval {done.task} --data FILE` to measure it"
        )
