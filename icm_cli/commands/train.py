"""`icm train`: train the generator, encode the tasks and measure the codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer

from icm_cli import encode_report, eval_report
from icm_cli.errors import ExitCode, Interrupted, UsageProblem
from icm_cli.failures import tell_failure
from icm_cli.options import (
    BaseModelOpt,
    DeviceOpt,
    WorkersOpt,
    gain_option,
    keep_option,
    loss_option,
    option,
    quality_option,
    refine_option,
)
from icm_cli.output import Output
from icm_cli.session import Session, command
from icm_cli.text import as_fields
from icmlora.errors import OtherProcessFailed
from icmlora.fleet.measure.metric_result import measured_in
from icmlora.fleet.older import WAY_OUT
from icmlora.io.text import counted, human_duration, human_size
from icmlora.training import config
from icmlora.training.ranks import launched

if TYPE_CHECKING:
    from icmlora.fleet.context import Context, Event
    from icmlora.fleet.few_shot.train import FewShotTrained
    from icmlora.fleet.train.train import Trained, TrainReport
    from icmlora.fleet.train.update import Updated, UpdateReport

_MODEL = "Model"

QualityOpt = Annotated[
    int | None,
    quality_option(
        f"Default: {config.DEFAULT_QUALITY}, or whatever the current generator uses. In our "
        "measurements 4 keeps 97 % of the gain, and 6 keeps 98 % with four times the bytes."
    ),
]
SeedOpt = Annotated[int, option("--seed N", "Seed for all random numbers.")]
ResumeOpt = Annotated[bool, option("--resume/--no-resume", "Resume an interrupted training.")]
FreshOpt = Annotated[bool, option("--fresh", "Start from scratch instead of from the current generator.")]
UpdateOpt = Annotated[bool, option("--update", "Only encode tasks that have no code yet. Other tasks do not change.")]
RefineOpt = Annotated[
    int | None,
    refine_option(
        "Then fit each code to what its adapter does, in this many steps, if the base model is on this machine: "
        f"codes become several times smaller. 0: do not refine. Default: {config.REFINE_STEPS}."
    ),
]
EvalOpt = Annotated[
    bool, option("--eval/--no-eval", "Afterwards, measure the codes if the base model is on this machine.")
]
ErrorOpt = Annotated[
    float | None,
    loss_option(
        "--max-error", "Then re-encode to keep this relative error, ||dW' - dW|| / ||dW||, as `icm encode` does."
    ),
]
KeepOpt = Annotated[
    float | None,
    keep_option("Then re-encode to keep this share of each adapter's effect, as `icm encode` does."),
]
GainOpt = Annotated[
    float | None,
    gain_option("Then re-encode to keep this retained gain, as `icm encode` does. Needs the base model."),
]
ToleranceOpt = Annotated[
    float | None,
    loss_option(
        "--tolerance",
        "Largest squared error, weighted by how sensitive each channel is. Default: set by --quality. Most people want "
        "--max-error.",
        _MODEL,
    ),
]
WidthOpt = Annotated[
    int | None,
    option(
        "--width N",
        "Hidden width of a new generator's decoder. Default: depends on the number of tasks.",
        panel=_MODEL,
        min=4,
        max=4096,
    ),
]
StepsOpt = Annotated[
    int | None,
    option(
        "--steps N",
        f"Adapters to draw; a step sees one, on a card {config.STACKED}. "
        f"Default: {config.SMALL_STEPS_PER_TASK} per task, at least {config.LEAST_SMALL_STEPS}; "
        f"from {config.SMALL_FLEET} tasks on {config.STEPS_PER_ADAPTER} per adapter, "
        f"{config.LEAST_STEPS:,} to {config.MOST_STEPS:,}, but beyond {config.FREE_STEPS} at most "
        f"one per {config.PARAMETERS_PER_STEP:,} parameters. A card makes at least {config.LEAST_STACKED_STEPS}.",
        panel=_MODEL,
        min=1,
    ),
]
RateOpt = Annotated[
    float | None,
    option(
        "--lr X",
        f"Peak learning rate. Default: {config.RATE:g}; {config.SMALL_RATE:g} for fewer than {config.SMALL_FLEET} "
        "tasks without --steps.",
        panel=_MODEL,
        min=1e-6,
        max=1.0,
    ),
]


ObjectiveName = Literal["bits", "functional", "both"]
ObjectiveOpt = Annotated[
    ObjectiveName,
    option(
        "--objective",
        "bits: train the generator and encode the tasks. functional: train the few-shot start that `icm generate` "
        "needs; codes do not change. both: one after the other.",
    ),
]
EpisodesOpt = Annotated[
    int, option("--episodes N", "Episodes of training for the few-shot start.", panel=_MODEL, min=1)
]

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
    objective: ObjectiveOpt = "bits",
    refine: RefineOpt = None,
    keep: KeepOpt = None,
    evaluate: EvalOpt = True,
    max_error: ErrorOpt = None,
    min_gain: GainOpt = None,
    tolerance: ToleranceOpt = None,
    width: WidthOpt = None,
    steps: StepsOpt = None,
    lr: RateOpt = None,
    episodes: EpisodesOpt = 48,
    workers: WorkersOpt = None,
) -> None:
    """Train one generator per base model on all its tasks, store a code for every task, and measure the codes.

    Run the same command again to resume an interrupted training. If there is already a generator, training starts from
    it and encodes every task again, which needs all originals.

    After adding tasks, --update encodes only the new ones. It needs no other originals, leaves existing codes as they
    are, and takes as long as the new tasks take.

    Several GPUs or machines train together when torchrun starts icm in one process for each of them. Only training
    runs on several processes.

    To use `icm generate`, train with --objective both, or with --objective functional later.

    Example:
      icm train --device cuda
      torchrun --nproc-per-node 4 $(command -v icm) train --device cuda
    """
    from icmlora.fleet.few_shot.train import check_few_shot
    from icmlora.fleet.train.train import train
    from icmlora.fleet.train.update import update as add_tasks

    others = (quality, tolerance, width, steps, lr, keep, max_error, min_gain)
    _check_options(objective, update=update, anew=fresh or width is not None, others=others)
    where, few_shot = session.device(device), objective != "bits"
    if few_shot:  # fail now, not after hours of training the generator
        check_few_shot(session.context, base_model=base_model)

    options: dict[str, Any] = {"device": where, "base_model": base_model, "quality": quality, "tolerance": tolerance}
    options |= {"steps": steps, "learning_rate": lr, "seed": seed, "refine": refine, "workers": workers}
    options |= {"keep": keep, "max_error": max_error, "min_gain": min_gain, "evaluate": evaluate}

    def work(context: Context) -> TrainReport:
        return train(context, width=width, resume=resume, fresh=fresh, **options)

    if launched()[0]:
        raise typer.Exit(_help(session, None if update or objective == "functional" else work))
    partly = False
    if objective != "functional":
        printed = _Printed(session, max_error, min_gain, keep, few_shot=few_shot)
        report: TrainReport | UpdateReport
        if update:
            report, stopped = session.run("update", lambda context: add_tasks(context, **options), printed.tell)
        else:
            report, stopped = session.run("train", work, printed.tell)
        printed.catch_up(report, is_stopped=stopped)
        if stopped:
            printed.interrupted(report)
        partly = report.is_partial
    if few_shot:
        partly = _train_few_shot(session, where, base_model, episodes, seed) or partly
    if partly:  # only now: a task that misses a limit must not stop what comes after
        raise typer.Exit(ExitCode.PARTLY)


def _check_options(objective: ObjectiveName, *, update: bool, anew: bool, others: Sequence[float | None]) -> None:
    if update and anew:
        hint = "`icm train --fresh` trains a new one on all tasks"
        raise UsageProblem(
            "--update keeps the current generator, so it cannot be used with --fresh or --width", hint=hint
        )
    if objective == "functional" and (update or anew or any(value is not None for value in others)):
        fact = "--objective functional does not train the generator, so it cannot be used with options for that"
        raise UsageProblem(fact, hint="`icm train --objective both` trains both, one after the other")


@dataclass
class _Printed:
    """Prints each stage of a training or an update when the next one begins, or at the end."""

    session: Session
    max_error: float | None
    min_gain: float | None
    keep: float | None
    few_shot: bool  # whether a few-shot start is trained next
    is_summed_up: bool = False  # whether the generators are printed
    encoded: int = 0  # how many encodings are
    is_explained: bool = False  # whether it is printed what is not measured

    @property
    def is_refining(self) -> bool:
        """Whether codes are refined, without limits."""
        return self.keep is self.max_error is self.min_gain is None

    def tell(self, event: Event) -> None:
        """Print what an event says."""
        from icmlora.fleet.context import StageBegun

        if isinstance(event, StageBegun):
            self.catch_up(cast("TrainReport | UpdateReport", event.report))
            if event.label == "encode" and self.is_refining and not self.encoded:
                note = "refining codes where the base model is at hand; Ctrl-C stops that, and the store is complete"
                self.session.out.note(f"{note} without it")
        _tell(self.session, event)
        encode_report.tell_encoded(self.session, event, "refined" if self.is_refining else "task")
        eval_report.tell_measured(self.session, event)

    def catch_up(self, report: TrainReport | UpdateReport, *, is_stopped: bool = False) -> None:
        """Print what was done and is not printed yet."""
        from icmlora.fleet.train.train import TrainReport

        out = self.session.out
        if not self.is_summed_up:
            self.is_summed_up = True
            if isinstance(report, TrainReport):
                for trained in report.trained:
                    _sum_up(self.session, trained, few_shot=self.few_shot)
            else:
                for updated in report.updated:
                    _sum_up_update(self.session, updated)
        for encoded in report.encoded[self.encoded :]:
            encode_report.sum_up(self.session, encoded, brief=self.is_refining)
            if not self.is_refining and not is_stopped:
                encode_report.tell_next(self.session, encoded, self.max_error, self.min_gain)
        self.encoded = len(report.encoded)
        if report.measurable is not None and not self.is_explained:
            self.is_explained = True
            for reason in report.measurable.reasons:
                out.note(f"not measured: {reason}")
            if not report.measurable.tasks and report.measurable.elsewhere:
                out.hint("`icm eval` measures the codes, with the base model and held-out text")
        if report.evaluated is not None:  # the last stage
            eval_report.sum_up(self.session, report.evaluated)
        if report.measurable is not None and report.evaluate_error is not None:
            out.warn(f"not measured: {', '.join(report.measurable.tasks)}: {report.evaluate_error}")

    def interrupted(self, report: TrainReport | UpdateReport) -> NoReturn:
        """Say what the stage that the user stopped has left, and how to go on."""
        from icmlora.fleet.train.train import TrainReport

        if report.evaluated is not None:
            done = eval_report.measured(report.evaluated)
            raise Interrupted(f"interrupted; {done}", hint=eval_report.MEASURE_REST)
        if report.encoded:
            done = counted(len(report.encoded[-1].tasks), "task")
            go_on = "the store is complete without it; `icm encode` refines the rest"
            if not self.is_refining:
                go_on = "the generator is kept; `icm encode` with the same limits encodes the rest"
            raise Interrupted(f"interrupted; {done} encoded", hint=go_on)
        if not isinstance(report, TrainReport):
            unchanged = "interrupted; base models that are not listed did not change"
            raise Interrupted(unchanged, hint="run the same command again")
        saved = f"saved a training checkpoint at step {report.stopped_at}" if report.stopped_at else "nothing was lost"
        raise Interrupted(f"interrupted; {saved}", hint="run the same command to continue")


def _help(session: Session, work: Callable[[Context], TrainReport] | None) -> ExitCode:
    """Take part in the training of the first process, which prints and does all the rest; None: there is none."""
    if work is None:
        return ExitCode.DONE
    quiet = replace(session, out=Output(quiet=True, progress=False))
    try:
        _, stopped = quiet.run("train", work)
    except OtherProcessFailed:
        return ExitCode.FAILED
    return ExitCode.INTERRUPTED if stopped else ExitCode.DONE


def _train_few_shot(session: Session, device: str, base_model: str | None, episodes: int, seed: int) -> bool:
    """Train the few-shot starts, and return whether a base model failed or a task was left out."""
    from icmlora.fleet.few_shot.train import train_few_shot

    report, stopped = session.run(
        "episodes",
        lambda context: train_few_shot(context, device=device, base_model=base_model, episodes=episodes, seed=seed),
        partial(_tell_few_shot, session),
    )
    for trained in report.trained:
        _sum_up_few_shot(session, trained)
    if stopped:
        hint = "`icm train --objective functional` starts the episodes again; generators and codes do not change"
        raise Interrupted("interrupted; no few-shot start was stored", hint=hint)
    return bool(report.failed) or any(trained.left_out for trained in report.trained)


def _tell(session: Session, event: Event) -> None:
    from icmlora.fleet.train.run import StepDone
    from icmlora.fleet.train.train import CodeMade, Continued, Resumed, StartedOver, Trained
    from icmlora.fleet.train.update import Updated

    out = session.out
    if isinstance(event, StepDone):
        if event.at.step % _EVENT_EVERY == 0 or event.at.step == event.at.steps:
            out.event("step", **{**asdict(event.at), "base_model": event.base_model, "task": event.task})
    elif isinstance(event, Resumed):
        out.event("resumed", **asdict(event))
        out.note(f"resuming from step {event.step}")
    elif isinstance(event, Continued):
        out.event("continued", **asdict(event))
        new = f"{counted(event.new_tasks, 'task')} without a code" if event.new_tasks else "no new tasks"
        out.note(f"training from generator {event.version} of {event.base_model}: {new}; all tasks are encoded again")
    elif isinstance(event, StartedOver):
        out.event("started_over", **asdict(event))
        out.note(f"generator {event.version} of {event.base_model} has an older format: training from scratch")
        if event.without_vectors:
            out.hint("task vectors have a new format too: `icm vectors` makes them again, best before the training")
    elif isinstance(event, CodeMade):
        out.event("code", **as_fields(event))
        out.detail(f"{event.task}: code of {human_size(event.size)}, relative error {event.relative_error:.4f}")
    elif isinstance(event, Trained):
        out.event("trained", **asdict(event))
    elif isinstance(event, Updated):
        out.event("updated", **asdict(event))


def _tell_few_shot(session: Session, event: Event) -> None:
    from icmlora.fleet.few_shot.train import EpisodeDone, FewShotTrained

    tell_failure(session, event)
    if isinstance(event, EpisodeDone):
        session.out.event("episode", **{**asdict(event.at), "base_model": event.base_model, "task": event.task})
    elif isinstance(event, FewShotTrained):
        session.out.event("start", **asdict(event))


def _sum_up(session: Session, trained: Trained, *, few_shot: bool) -> None:
    out, metrics = session.out, trained.metrics
    bits = metrics["bits_per_parameter"]
    loss = "" if bits is None else f"{bits:.3f} bits per parameter after "
    out.line(
        f"generator {trained.version} of {trained.base_model}: {human_size(trained.generator_size)}; "
        f"{counted(trained.tasks, 'code')}, {human_size(trained.codes_size)} in total"
    )
    out.note(
        f"{loss}{metrics['steps']} steps; "
        f"trained in {human_duration(float(str(metrics['fit_seconds'])))} on {metrics['device']}, "
        f"peak memory {human_size(int(str(metrics['peak_memory'])))}"
    )
    seeds = f"{metrics['initial_a_known']} of {counted(trained.tasks, 'adapter')}"
    out.note(f"initialisation seed recovered for {seeds} (smaller codes)")
    _warn_of(session, trained.left_out)
    if trained.in_older_codes:
        names = ", ".join(trained.in_older_codes)
        out.warn(f"evicted, so their codes, which have an older format, stay as they are: {names}")
        out.hint(WAY_OUT)
    if trained.start_dropped and not few_shot:
        out.note("the new generator has no few-shot start; the earlier one had one")
        out.hint("`icm train --objective functional` trains one; codes do not change")


def _warn_of(session: Session, left_out: Mapping[str, str]) -> None:
    for name, reason in left_out.items():
        session.out.warn(f"{name} has no code and keeps its original: {reason}")


def _sum_up_update(session: Session, updated: Updated) -> None:
    out = session.out
    _warn_of(session, updated.left_out)
    if not updated.tasks:
        if not updated.left_out:
            out.line(f"every task of {updated.base_model} that can have a code has one: nothing to add")
        return
    networks = f", {counted(updated.epochs, 'network')}" if updated.epochs > 1 else ""
    out.line(
        f"generator {updated.version} of {updated.base_model}: {human_size(updated.generator_size)}{networks}; "
        f"{counted(len(updated.tasks), 'new code')}, {human_size(updated.codes_size)} in total"
    )
    if updated.kept_size is not None and updated.tuned_size is not None:
        kept, tuned = human_size(updated.kept_size), human_size(updated.tuned_size)
        done = "added a tuned network" if "tuned" in updated.added else "kept the network as it is"
        out.note(f"{done}: new codes take {kept} without tuning, {tuned} with it (tuned network included)")
    if "fresh" in updated.added:
        out.note("added a network for tasks with modules or ranks that the generator did not cover")
    out.note(f"took {human_duration(float(str(updated.metrics['update_seconds'])))}; earlier codes did not change")


def _sum_up_few_shot(session: Session, trained: FewShotTrained) -> None:
    size, tasks = human_size(trained.size), counted(trained.tasks, "task")
    session.out.line(f"few-shot start for {trained.base_model}: {size}, from {tasks}")
    gain = f"{1 - trained.loss:.2f} of the gain of their own adapters, on samples that were held out"
    took = f"{counted(trained.episodes, 'episode')} in {human_duration(trained.seconds)}"
    session.out.note(f"{took}; known tasks reach {gain}{measured_in([trained.precision])}")
    for name, reason in trained.left_out.items():
        session.out.warn(f"{name} took no part: {reason}")
