"""`icm generate`: an adapter for a task that was never ingested."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.commands.materialize import DtypeName, DtypeOpt, OutputOpt
from icm_cli.errors import Interrupted
from icm_cli.options import BaseModelOpt, DeviceOpt, ForceOpt
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from icmlora.fleet.generate import Generated
    from icmlora.task_vectors.distances import Familiarity, Neighbour

_NEAREST = 5
_MOST_SAMPLES = 64

NameArg = Annotated[str, typer.Argument(metavar="NAME", help="Name of the new task.", show_default=False)]
SamplesOpt = Annotated[
    Path,
    typer.Option(
        "--samples",
        metavar="FILE",
        help=(
            'JSON lines: {"text": ...}, or {"prompt": ..., "completion": ...} where only completions count. '
            "Of each, 128 tokens are read."
        ),
        show_default=False,
    ),
]
CountOpt = Annotated[
    int,
    typer.Option("-n", "--count", metavar="K", min=1, max=_MOST_SAMPLES, help="Samples to read of the file, at most."),
]
DescriptionOpt = Annotated[
    str | None,
    typer.Option("--description", metavar="TEXT", help="For the model card; nothing is learned from it."),
]
RegisterOpt = Annotated[
    bool, typer.Option("--register", help="Keep the task in the store: its code and its vector, no weights.")
]
RefineOpt = Annotated[
    int, typer.Option("--refine", metavar="STEPS", min=0, help="Gradient steps on the samples after generating.")
]
RankOpt = Annotated[
    int | None,
    typer.Option(
        "--rank", metavar="R", min=1, max=256, help="Rank to write; else the fleet's largest.", show_default=False
    ),
]


@command
def generate(
    session: Session,
    name: NameArg,
    samples: SamplesOpt,
    output: OutputOpt,
    count: CountOpt = _MOST_SAMPLES,
    description: DescriptionOpt = None,
    refine: RefineOpt = 0,
    rank: RankOpt = None,
    register: RegisterOpt = False,
    base_model: BaseModelOpt = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = DtypeName.BFLOAT16,
    force: ForceOpt = False,
) -> None:
    """Make an adapter for a task that has none, from a few samples of it.

    It starts at what the fleet's adapters have in common and takes the steps that `icm train --objective functional`
    learned. The base model has to be on this machine. What the adapter keeps is not known: measure it on text of your
    own. A task unlike all known ones is said to be outside of what the generator knows.

    Example:
      icm generate cat-detection --samples cats.jsonl -o adapter/
    """
    from icmlora.fleet.generate import GenerateRequest
    from icmlora.fleet.generate import generate as make

    request = GenerateRequest(
        name=name,
        samples=samples,
        directory=output,
        count=count,
        description=description,
        refine=refine,
        rank=rank,
        base_model=base_model,
        device=session.device(device),
        dtype=dtype.value,
        register=register,
        force=force,
    )
    with session.stoppable() as stop:
        done = session.follow(make(session.context, request, stop), "generate", lambda event: None)
    if done is None:
        raise Interrupted("interrupted; nothing was written", hint="run the same command again")
    _tell(session, done, rank)


def _tell(session: Session, done: Generated, rank: int | None) -> None:
    from icmlora.fleet.meta_train import SAMPLE_TOKENS

    out, known = session.out, done.known
    out.document(
        {
            "task": done.task,
            "output": str(done.directory),
            "base_model": done.base_model,
            "generator": done.generator,
            "samples_count": done.samples,
            "samples_at_limit": done.reaching,
            "rank": done.rank,
            "base_nats_per_token": done.base_nats,
            "nats_per_token": done.nats,
            "nearest": [{"task": one.task, "distance": one.distance} for one in _nearest(known)],
            "farther_than": None if known is None else known.farther_than,
            "outside": None if known is None else known.is_outside,
            "code_size": done.code_size,
            "code_dw_error": done.code_error,
            "weights": done.weights,
        }
    )
    out.answer(str(done.directory))
    out.note(f"{done.task} from {counted(done.samples, 'sample')}, rank {done.rank}")
    if done.reaching:
        out.note(f"{done.reaching} of them reach {SAMPLE_TOKENS} tokens, which is all that is read of one")
    if rank is not None and done.rank < rank:
        out.note(f"rank {done.rank} is all that it has; {rank} was asked for")
    out.note(f"nats per token on these very samples: {done.base_nats:.3f} without it, {done.nats:.3f} with it")
    _tell_familiarity(session, known)
    if done.code_size is not None:
        out.note(f"registered with a code of {human_size(done.code_size)}, relative dW error {done.code_error:.4f}")
    else:
        out.hint("it has seen these samples; measure it on other text of the task before you rely on it")


def _nearest(known: Familiarity | None) -> Sequence[Neighbour]:
    return () if known is None else known.neighbours[:_NEAREST]


def _tell_familiarity(session: Session, known: Familiarity | None) -> None:
    out = session.out
    if known is None:
        out.note("how far it lies from known tasks is not known: fewer than three have vectors that can be compared")
        return
    out.note("nearest tasks: " + ", ".join(f"{one.task} {one.distance:.2f}" for one in _nearest(known)))
    if known.is_outside:
        out.warn(
            f"outside of what the generator knows: {known.distance:.2f} from the nearest task, which is farther than "
            f"{known.farther_than:.0%} of the known tasks lie from theirs",
            kind="outside",
        )
        out.hint("expect less of it than usual; an adapter that is trained for the task may serve better")
