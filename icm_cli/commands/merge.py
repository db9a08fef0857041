"""`icm merge`: one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from icm_cli.errors import Interrupted, UsageProblem
from icm_cli.options import DtypeName, ForceOpt, TasksArg, option
from icm_cli.session import Session, command
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
    str | None, option("--as NAME", "Store the merged adapter as the new task NAME; with --output, do both.")
]
MethodOpt = Annotated[
    MethodName,
    option(
        "--method",
        "How to merge, under PEFT's names. cat: the weighted sum, exactly; the ranks add up. svd: the sum, cut to "
        "--rank. linear, ties, dare_linear, dare_ties, magnitude_prune: A with A and B with B, for adapters of one "
        "rank. ties_svd and the others: of the whole dW, cut to --rank, which takes long.",
    ),
]
WeightsOpt = Annotated[
    str | None,
    option("--weights W,W,...", "What each adapter is multiplied with, as 0.7,0.3. Default: equal parts of 1."),
]
RankOpt = Annotated[
    int | None, option("--rank R", "Rank of svd methods. Default: the largest of these adapters.", min=1)
]
DensityOpt = Annotated[
    float, option("--density X", "Share of the values that ties, dare and magnitude_prune keep.", min=0.0, max=1.0)
]
SeedOpt = Annotated[int, option("--seed N", "Seed of the values that dare drops.")]
SourceOpt = Annotated[
    Literal["auto", "original", "residual", "code"],
    option("--source", "What to merge: originals, or what codes decode to. auto: the original where there is one."),
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
    """Merge the adapters of several tasks into one, with PEFT's own methods.

    The base model is not needed, and all adapters of the merge are in memory at once. Nobody trained what comes out, so
    measure it: `icm eval NAME --data FILE` on a merged adapter that was stored with --as.

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
        raise Interrupted("interrupted; nothing was written", hint="run the same command again") from stop
    _tell(session, done)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageProblem(f"--weights takes numbers, not {text!r}", hint="as 0.7,0.3") from None


def _tell(session: Session, done: Merged) -> None:
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
    out.note(f"merged {some} by {done.method}: rank {done.rank}, {human_size(done.size)}")
    if done.task is not None:
        out.hint(
            f"`icm train --update` makes a code of {done.task}; measure it with `icm eval {done.task} --data FILE`"
        )
