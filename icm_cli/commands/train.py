"""`icm train`: fit the generator and keep a code per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import typer

from icm_cli.commands import encode
from icm_cli.commands import eval as evaluation
from icm_cli.commands.train_options import (
    EpisodesOpt,
    ErrorOpt,
    EvalOpt,
    FreshOpt,
    GainOpt,
    ObjectiveName,
    ObjectiveOpt,
    QualityOpt,
    RateOpt,
    ResumeOpt,
    SeedOpt,
    StepsOpt,
    ToleranceOpt,
    UpdateOpt,
    WidthOpt,
)
from icm_cli.errors import ExitCode, Interrupted, UsageProblem
from icm_cli.options import BaseModelOpt, DeviceOpt
from icm_cli.session import Session, command
from icmlora.io.text import counted, human_duration, human_size

if TYPE_CHECKING:
    from icmlora.fleet.api import Fleet
    from icmlora.fleet.context import Event
    from icmlora.fleet.encode import EncodeReport
    from icmlora.fleet.meta_train import StartRequest
    from icmlora.fleet.training_run import Trained, TrainRequest
    from icmlora.fleet.update import Updated

_EVENT_EVERY = 10  # steps between two JSON lines


@command
def train(
    session: Session,
    device: DeviceOpt = None,
    quality: QualityOpt = None,
    base_model: BaseModelOpt = None,
    seed: SeedOpt = 0,
    resume: ResumeOpt = True,
    fresh: FreshOpt = False,
    update: UpdateOpt = False,
    objective: ObjectiveOpt = ObjectiveName.BITS,
    evaluate: EvalOpt = True,
    max_error: ErrorOpt = None,
    min_gain: GainOpt = None,
    tolerance: ToleranceOpt = None,
    width: WidthOpt = None,
    steps: StepsOpt = None,
    lr: RateOpt = None,
    episodes: EpisodesOpt = 48,
) -> None:
    """Fit one generator per base model over all its tasks, encode every task, and measure what the codes kept.

    A fit that was stopped goes on with the same command. After further ingests the present generator is trained on,
    and every task is encoded again, for which all originals are needed.

    With --update the present generator is continued instead: that takes as long as the new tasks take, and every code
    that was there decodes to the same adapter as before.

    With --objective both it also learns where adapters for unseen tasks start, which `icm generate` needs.

    Example:
      icm train --device cuda
    """
    others = (quality, tolerance, width, steps, lr, max_error, min_gain)
    _check_options(objective, update=update, anew=fresh or width is not None, others=others)
    from icmlora.fleet.meta_train import StartRequest, check_learnable
    from icmlora.fleet.training_run import TrainRequest

    request = TrainRequest(
        device=session.device(device),
        base_model=base_model,
        quality=quality,
        tolerance=tolerance,
        width=width,
        steps=steps,
        learning_rate=lr,
        seed=seed,
        resume=resume,
        fresh=fresh,
    )
    if learns := objective is not ObjectiveName.BITS:
        check_learnable(session.context, base_model)
    partly = False
    if objective is not ObjectiveName.FUNCTIONAL:
        made = _update(session, request) if update else _train(session, request, learns=learns)
        partly = _encode_and_measure(session, request, made, (max_error, min_gain), evaluate=evaluate)
    if learns:
        _learn_starts(session, StartRequest(request.device, base_model, episodes, seed))
    if partly:  # only now: one task that falls short must not cost the others what comes after
        raise typer.Exit(ExitCode.PARTLY)


def _check_options(objective: ObjectiveName, *, update: bool, anew: bool, others: Sequence[float | None]) -> None:
    if update and anew:
        hint = "`icm train --fresh` makes another one, of all tasks"
        raise UsageProblem("--update continues the present generator: --fresh and --width do not go with it", hint=hint)
    if objective is ObjectiveName.FUNCTIONAL and (update or anew or any(value is not None for value in others)):
        fact = "--objective functional leaves generator and codes as they are: no option about those goes with it"
        raise UsageProblem(fact, hint="`icm train --objective both` does one after the other")


@dataclass(frozen=True)
class _Made:
    """Which tasks have new codes: all of some base models, or only those that are named."""

    base_models: Sequence[str]
    tasks: Sequence[str] = ()
    partly: bool = False
    """Whether a task was left out."""

    @property
    def nothing(self) -> bool:
        """Whether none has."""
        return not self.base_models


def _train(session: Session, request: TrainRequest, *, learns: bool) -> _Made:
    from icmlora.fleet.train import train as fit

    with session.stoppable() as stop:
        report = session.follow(fit(session.context, request, stop), "train", partial(_tell, session))
    if report.stopped_at is not None:
        kept = f"interrupted; the run is kept at step {report.stopped_at}"
        raise Interrupted(kept, hint="run the same command to continue")
    for trained in report.trained:
        _sum_up(session, trained)
        if trained.start_dropped and not learns:
            session.out.note("the new generator has no start for unseen tasks, which the one before had")
            session.out.hint("`icm train --objective functional` learns it, and leaves all codes as they are")
    partly = any(trained.left_out for trained in report.trained)
    return _Made([trained.base_model for trained in report.trained], partly=partly)


def _update(session: Session, request: TrainRequest) -> _Made:
    from icmlora.fleet.update import update

    with session.stoppable() as stop:
        report = session.follow(update(session.context, request, stop), "update", partial(_tell, session))
    for updated in report.updated:
        _sum_up_update(session, updated)
    if report.stopped:
        raise Interrupted("interrupted; what is not listed is as it was", hint="run the same command again")
    partly = any(updated.left_out for updated in report.updated)
    return _Made([updated.base_model for updated in report.updated if updated.tasks], report.tasks, partly)


def _encode_and_measure(
    session: Session, request: TrainRequest, made: _Made, limits: tuple[float | None, float | None], *, evaluate: bool
) -> bool:
    """Encode once more if there is a limit of the error or of the gain, and measure.

    Returns:
        Whether a task fell short, or was left out before.
    """
    short = made.partly
    if made.nothing:
        return short
    max_error, min_gain = limits
    if limits != (None, None):

        def work(fleet: Fleet) -> EncodeReport:
            base_model, device = request.base_model, request.device
            return fleet.encode(
                made.tasks, max_error=max_error, min_gain=min_gain, base_model=base_model, device=device
            )

        go_on = "the generator is kept; `icm encode` with the same limits encodes the rest"
        short = encode.run(session, work, encode.evict_hint(*limits), go_on=go_on) or short
    if evaluate:
        _evaluate(session, request.device, made)
    return short


def _learn_starts(session: Session, request: StartRequest) -> None:
    from icmlora.fleet.meta_train import EpisodeDone, StartLearned, learn_starts

    def tell(event: Event) -> None:
        if isinstance(event, EpisodeDone):
            session.out.event("episode", **{**asdict(event.at), "base_model": event.base_model, "task": event.task})
        elif isinstance(event, StartLearned):
            session.out.event("start", **asdict(event))

    with session.stoppable() as stop:
        report = session.follow(learn_starts(session.context, request, stop), "episodes", tell)
    for learned in report.learned:
        of = f"{human_size(learned.size)}, from {counted(learned.tasks, 'task')}"
        session.out.line(f"start for unseen tasks of {learned.base_model}: {of}")
        kept = f"{1 - learned.loss:.2f} of what their own adapters gain on samples that were not read"
        session.out.note(
            f"after {counted(learned.episodes, 'episode')} in {human_duration(learned.seconds)}: known tasks get {kept}"
        )
    if report.stopped:
        hint = "`icm train --objective functional` begins the episodes again, and leaves generator and codes"
        raise Interrupted("interrupted; no start was kept", hint=hint)


def _tell(session: Session, event: Event) -> None:
    from icmlora.fleet.train import Continued, Progressed, Resumed
    from icmlora.fleet.training_run import CodeMade, Trained
    from icmlora.fleet.update import Updated

    out = session.out
    if isinstance(event, Progressed):
        if event.at.step % _EVENT_EVERY == 0 or event.at.step == event.at.steps:
            out.event("step", **{**asdict(event.at), "base_model": event.base_model, "task": event.task})
    elif isinstance(event, Resumed):
        out.event("resumed", **asdict(event))
        out.note(f"going on from step {event.step}")
    elif isinstance(event, Continued):
        out.event("continued", **asdict(event))
        new = f"{counted(event.new_tasks, 'task')} without a code so far" if event.new_tasks else "no new task"
        out.note(f"training generator {event.version} of {event.base_model} on: {new}; every task is encoded again")
    elif isinstance(event, CodeMade):
        out.event("code", **asdict(event))
        out.detail(f"{event.task}: code of {human_size(event.size)}, relative dW error {event.dw_error:.4f}")
    elif isinstance(event, Trained):
        out.event("trained", **asdict(event))
    elif isinstance(event, Updated):
        out.event("updated", **asdict(event))


def _sum_up(session: Session, trained: Trained) -> None:
    metrics = trained.metrics
    bits = metrics["bits_per_parameter"]
    loss = "" if bits is None else f"{bits:.3f} bits per parameter "
    session.out.line(
        f"generator {trained.version} of {trained.base_model}: {human_size(trained.generator_size)}, "
        f"{counted(trained.tasks, 'code')} of together {human_size(trained.codes_size)}"
    )
    session.out.note(
        f"{loss}after {metrics['steps']} steps; "
        f"fitted in {human_duration(float(str(metrics['fit_seconds'])))} on {metrics['device']}, "
        f"peak memory {human_size(int(str(metrics['peak_memory'])))}"
    )
    session.out.note(f"the initial A of {metrics['initial_a_known']} of them is drawn again from its seed")
    _warn_of(session, trained.left_out)


def _warn_of(session: Session, left_out: Mapping[str, str]) -> None:
    for name, reason in left_out.items():
        session.out.warn(f"{name} has no code and keeps its original: {reason}")


def _sum_up_update(session: Session, updated: Updated) -> None:
    out = session.out
    _warn_of(session, updated.left_out)
    if not updated.tasks and updated.left_out:
        return
    if not updated.tasks:
        out.line(f"every task of {updated.base_model} has a code: nothing to add")
        return
    out.line(
        f"generator {updated.version} of {updated.base_model}: {human_size(updated.generator_size)} in "
        f"{counted(updated.epochs, 'epoch')}, {counted(len(updated.tasks), 'new code')} of together "
        f"{human_size(updated.codes_size)}"
    )
    if updated.kept_size is not None and updated.tuned_size is not None:
        kept, tuned = human_size(updated.kept_size), human_size(updated.tuned_size)
        why = f"codes under the network as it was take {kept}, codes and epoch of a tuned one {tuned}"
        out.note(f"the network was {'tuned' if 'tuned' in updated.added else 'kept'}: {why}")
    if "fresh" in updated.added:
        out.note("tasks with modules or ranks that the network does not know got one of their own, as an epoch")
    out.note(f"done in {human_duration(float(str(updated.metrics['update_seconds'])))}; earlier codes are as they were")


def _evaluate(session: Session, device: str, made: _Made) -> None:
    """Measure the codes; a missing base model or missing texts are worth a word, not a failure."""
    found = session.fleet.measurable(made.base_models, made.tasks)
    for reason in found.reasons:
        session.out.note(f"not measured: {reason}")
    if not found.tasks:
        session.out.hint("`icm eval` measures what the codes kept, with the base model and held-out text")
        return
    evaluation.run(session, lambda fleet: fleet.evaluate(found.tasks, sources=("code",), device=device))
