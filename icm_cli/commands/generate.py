"""`icm generate`: make an adapter for a new task from a few samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icm_cli.errors import Interrupted
from icm_cli.guard_report import guard_json, guard_text
from icm_cli.options import BaseModelOpt, DeviceOpt, DtypeName, ForceOpt, OutputOpt, argument, option
from icm_cli.session import Session, command
from icmlora.errors import Cancelled
from icmlora.fleet.measure.metric_result import measured_in
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from icmlora.fleet.few_shot.generate import Generated
    from icmlora.task_vectors.distances import Familiarity, Neighbour

_NEAREST = 5
_MOST_SAMPLES = 64

NameArg = Annotated[str, argument("NAME", "Name of the new task.")]
SamplesOpt = Annotated[
    Path | None,
    option(
        "--samples FILE",
        'Samples of the task as JSON lines: {"text": ...}, or {"prompt": ..., "completion": ...}, where only '
        "completions count. icm reads 128 tokens of each. Without it the base model writes samples from --description.",
    ),
]
CountOpt = Annotated[
    int, option("--count K", "Read at most K samples, spread over the file.", min=1, max=_MOST_SAMPLES)
]
DescriptionOpt = Annotated[
    str | None,
    option("--description TEXT", "What the task is, in a sentence: for the model card, or in place of samples."),
]
RegisterOpt = Annotated[bool, option("--register", "Also store the task as code and vector.")]
RefineOpt = Annotated[int, option("--refine STEPS", "Then take this many gradient steps on the samples.", min=0)]
DistilOpt = Annotated[
    int,
    option(
        "--distil STEPS",
        "Then take this many gradient steps towards what the base model predicts behind the samples. The adapter is "
        "served without them: no context is kept.",
        min=0,
    ),
]
RankOpt = Annotated[
    int | None, option("--rank R", "Rank of the adapter. Default: the largest in the fleet.", min=1, max=256)
]
ContextOpt = Annotated[
    int,
    option(
        "--context N",
        "Tokens of the samples that are kept to stand before requests. 0: none, and no measurement.",
        min=0,
    ),
]


@command
def generate(
    session: Session,
    name: NameArg,
    output: OutputOpt,
    samples: SamplesOpt = None,
    count: CountOpt = _MOST_SAMPLES,
    description: DescriptionOpt = None,
    refine: RefineOpt = 0,
    distil: DistilOpt = 0,
    rank: RankOpt = None,
    register: RegisterOpt = False,
    context_tokens: ContextOpt = 1536,
    base_model: BaseModelOpt = None,
    device: DeviceOpt = None,
    dtype: Annotated[DtypeName, option("--dtype", "Number format of the weights.")] = "bfloat16",
    force: ForceOpt = False,
) -> None:
    """Make an adapter for a new task from a few samples, without training one.

    It starts from what the adapters of the fleet have in common, and takes a few steps whose lengths were learned by
    `icm train --objective functional`. It needs the base model on this machine.

    The samples are kept too, as the task's context: before a request they tell the base model as much again. The
    adapter is made to be served with them; --context 0 makes one that stands alone. icm leaves 4 of 8 or more samples
    out, and measures the adapter and the context on them, alone and together. Where samples are no help in a prompt, it
    keeps none. It warns if the task is unlike all known tasks.

    Example:
      icm generate cat-detection --samples cats.jsonl -o adapter/
      icm generate haiku --description "Haiku about the sea, in three lines" -o adapter/
    """
    from icmlora.fleet.few_shot.generate import generate

    try:
        with session.working("generate") as context:
            done = generate(
                context,
                name,
                samples,
                output,
                count=count,
                description=description,
                refine=refine,
                distil=distil,
                rank=rank,
                base_model=base_model,
                device=session.device(device),
                dtype=dtype,
                register=register,
                context_tokens=context_tokens,
                force=force,
            )
    except Cancelled as stop:
        raise Interrupted("interrupted; nothing was written", hint="run the same command again") from stop
    _tell(session, done, rank, is_distilled=distil > 0)


def _tell(session: Session, done: Generated, rank: int | None, *, is_distilled: bool) -> None:
    from icmlora.fleet.few_shot.train import SAMPLE_TOKENS

    out, known = session.out, done.known
    out.document(
        {
            "task": done.task,
            "output": str(done.directory),
            "base_model": done.base_model,
            "generator": done.generator,
            "described": done.is_described,
            "samples_count": done.samples,
            "samples_at_limit": done.reaching,
            "rank": done.rank,
            "base_nats_per_token": done.base_nats,
            "nats_per_token": done.nats,
            "precision": done.precision,
            "nearest": [{"task": one.task, "distance": one.distance} for one in _nearest(known)],
            "farther_than": None if known is None else known.farther_than,
            "outside": None if known is None else known.is_outside,
            "code_size": done.code_size,
            "code_relative_error": done.code_relative_error,
            "code_squared_error": done.code_squared_error,
            "context_samples": done.context_samples,
            "context_tokens": done.context_tokens,
            "measured": guard_json(done.guard),
            "weights": done.weights,
        }
    )
    out.answer(str(done.directory))
    written = " that the base model wrote" if done.is_described else ""
    out.note(f"{done.task} from {counted(done.samples, 'sample')}{written}, rank {done.rank}")
    if done.reaching:
        have = "sample has" if done.reaching == 1 else "samples have"
        out.note(f"{done.reaching} {have} {SAMPLE_TOKENS} tokens or more; icm reads {SAMPLE_TOKENS} tokens of each")
    if rank is not None and done.rank < rank:
        out.note(f"the adapter has rank {done.rank}, less than the requested {rank}: it has no more directions")
    losses = f"{done.base_nats:.3f} without the adapter, {done.nats:.3f} with it"
    out.note(f"nats per token on these samples: {losses}{measured_in([done.precision])}")
    _tell_familiarity(session, known)
    if done.is_described:
        out.hint("nobody has seen a text of this task: measure the adapter, and the description alone, on some")
    if done.context_samples:
        made = f"{counted(done.context_samples, 'sample')}, {counted(done.context_tokens, 'token')}"
        out.note(f"context: {made}, in context.txt of the same folder; the adapter is made to be served with it")
    elif done.guard is not None and not is_distilled:
        out.note("context: none is kept, for the samples in the prompt are no help here; the adapter stands alone")
    if done.context_samples or done.guard is not None:
        out.note(guard_text(done.guard))
    if done.guard is not None and done.guard.recommended == "adapter" and done.context_samples:
        out.hint("the context is no help here: --context 0 makes an adapter that stands alone")
    if is_distilled and done.guard is not None and done.guard.recommends_context:
        out.hint("the samples in the prompt do better: without --distil, icm keeps them as context")
    if done.code_size is not None:
        size = human_size(done.code_size)
        out.note(f"registered with a code of {size}, relative error {done.code_relative_error:.4f}")
    elif (done.guard is None or done.guard.adapter is None) and not done.is_described:
        out.hint("the adapter has seen these samples; measure it on other text of the task before you rely on it")


def _nearest(known: Familiarity | None) -> Sequence[Neighbour]:
    return () if known is None else known.neighbours[:_NEAREST]


def _tell_familiarity(session: Session, known: Familiarity | None) -> None:
    out = session.out
    if known is None:
        out.note("distance to known tasks unknown: fewer than three tasks have comparable vectors")
        return
    out.note("nearest tasks: " + ", ".join(f"{one.task} {one.distance:.2f}" for one in _nearest(known)))
    if known.is_outside:
        out.warn(
            f"unlike the known tasks: the nearest is at distance {known.distance:.2f}; "
            f"{known.farther_than:.0%} of the known tasks are closer to their nearest",
            kind="outside",
        )
        out.hint("expect less of this adapter; training one for the task may work better")
