"""`icm train`: train the generator, encode the tasks and evaluate the codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from icm_cli import encode_report, eval_report
from icm_cli.encode_report import print_replaced
from icm_cli.errors import ExitCode, Interrupted, UsageProblem
from icm_cli.failures import print_failure
from icm_cli.options import (
    BaseModelOpt,
    DeviceOpt,
    WorkersOpt,
    keep_option,
    max_error_option,
    option,
    quality_option,
    refine_option,
)
from icm_cli.output import Output
from icm_cli.session import Session, command
from icm_cli.text import as_fields
from icmlora.errors import OtherProcessFailed
from icmlora.fleet.measure.metric_result import measured_in
from icmlora.io.text import counted, human_duration, human_size
from icmlora.training import config
from icmlora.training.ranks import launched

if TYPE_CHECKING:
    from icmlora.fleet.context import Context, Event
    from icmlora.fleet.few_shot.train import FewShotTrained
    from icmlora.fleet.train.train import Trained, TrainReport
    from icmlora.fleet.train.update import Updated, UpdateReport

_MODEL = "Model"
_EPISODES = 48

QualityOpt = Annotated[
    int | None,
    quality_option(
        f"Default: the current generator's, or {config.DEFAULT_QUALITY}. In our measurements 4 keeps 97 % of the "
        "gain, and 6 keeps 98 % with four times the bytes."
    ),
]
SeedOpt = Annotated[int, option("--seed N", "Seed for all random numbers.")]
ResumeOpt = Annotated[bool, option("--resume/--no-resume", "Resume an interrupted training.")]
FreshOpt = Annotated[bool, option("--fresh", "Train a new generator from scratch.")]
UpdateOpt = Annotated[bool, option("--update", "Only encode tasks without a code. Existing codes do not change.")]
RefineOpt = Annotated[
    int | None,
    refine_option(
        "Refine each code for this many steps, so that it does the same as its adapter in a fraction of the bytes. "
        f"Needs the base model. 0 disables refinement. Default: {config.REFINE_STEPS}."
    ),
]
EvalOpt = Annotated[
    bool, option("--eval/--no-eval", "Evaluate the codes afterwards, if the base model is on this machine.")
]
ErrorOpt = Annotated[
    float | None,
    max_error_option("Encode to at most this relative error, ||dW' - dW|| / ||dW||, without refinement."),
]
KeepOpt = Annotated[
    float | None,
    keep_option("Encode to keep this share of each adapter's effect."),
]
WidthOpt = Annotated[
    int | None,
    option(
        "--width N",
        "Hidden width of a new decoder. Default: chosen by the number of tasks.",
        panel=_MODEL,
        min=4,
        max=4096,
    ),
]
StepsOpt = Annotated[
    int | None,
    option(
        "--steps N",
        f"Training steps. Default: {config.SMALL_STEPS_PER_TASK} per task, at least {config.MIN_SMALL_STEPS}; "
        f"with {config.SMALL_FLEET} tasks or more, {config.STEPS_PER_ADAPTER} per adapter, "
        f"{config.MIN_STEPS:,} to {config.MAX_STEPS:,}, and fewer for very small adapters.",
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
FewShotOpt = Annotated[
    bool,
    option(
        "--few-shot",
        "Train the few-shot start for `icm generate` instead of the generator. Codes do not change.",
    ),
]
EpisodesOpt = Annotated[
    int | None,
    option("--episodes N", f"Training episodes of the few-shot start. Default: {_EPISODES}.", panel=_MODEL, min=1),
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
    few_shot: FewShotOpt = False,
    refine: RefineOpt = None,
    keep: KeepOpt = None,
    evaluate: EvalOpt = True,
    max_error: ErrorOpt = None,
    width: WidthOpt = None,
    steps: StepsOpt = None,
    lr: RateOpt = None,
    episodes: EpisodesOpt = None,
    workers: WorkersOpt = None,
) -> None:
    """Train a generator per base model, encode every task and evaluate the codes.

    Run the same command again to resume an interrupted training. If a generator exists, training continues from it and
    encodes every task again. Evicted tasks keep their codes and the earlier generator that decodes them.

    After adding tasks, use --update. It encodes only the new tasks, needs no other originals and leaves existing codes
    unchanged.

    To train on several GPUs or machines, start icm with torchrun.

    `icm generate` needs a few-shot start as well: train it afterwards with --few-shot.

    Example:
      icm train --device cuda
      icm train --few-shot --device cuda
      torchrun --nproc-per-node 4 $(command -v icm) train --device cuda
    """
    from icmlora.fleet.train.train import train
    from icmlora.fleet.train.update import update as add_tasks

    others = (quality, width, steps, lr, refine, keep, max_error, workers)
    _check_options(few_shot=few_shot, update=update, anew=fresh or width is not None, episodes=episodes, others=others)
    where = session.device(device)

    options: dict[str, Any] = {"device": where, "base_model": base_model, "quality": quality, "steps": steps}
    options |= {"learning_rate": lr, "seed": seed, "refine": refine, "resume": resume}
    options |= {"keep": keep, "max_error": max_error, "evaluate": evaluate, "workers": workers}

    def work(context: Context) -> TrainReport:
        return train(context, width=width, fresh=fresh, **options)

    if launched()[0]:
        raise typer.Exit(_help(session, None if update or few_shot else work))
    if few_shot:
        partly = _train_few_shot(session, where, base_model, episodes or _EPISODES, seed)
    else:
        printed = _Printed(session, max_error, keep)
        report: TrainReport | UpdateReport
        if update:
            report, stopped = session.run("update", lambda context: add_tasks(context, **options), printed.show)
        else:
            report, stopped = session.run("train", work, printed.show)
        printed.catch_up(report, is_stopped=stopped)
        if stopped:
            printed.interrupted(report)
        partly = report.is_partial
    if partly:
        raise typer.Exit(ExitCode.PARTLY)


def _check_options(
    *, few_shot: bool, update: bool, anew: bool, episodes: int | None, others: Sequence[float | str | None]
) -> None:
    if update and anew:
        hint = "run `icm train --fresh` to train a new generator on all tasks"
        raise UsageProblem("--update keeps the current generator and excludes --fresh and --width", hint=hint)
    if few_shot and (update or anew or any(value is not None for value in others)):
        fact = "--few-shot trains no generator and excludes the options for it"
        raise UsageProblem(fact, hint="run `icm train`, then `icm train --few-shot`")
    if episodes is not None and not few_shot:
        raise UsageProblem("--episodes is only for --few-shot", hint="run `icm train --few-shot --episodes N`")


@dataclass
class _Printed:
    """Prints each stage of a training or an update when the next one begins, or at the end."""

    session: Session
    max_error: float | None
    keep: float | None
    is_summed_up: bool = False  # whether the generators are printed
    encoded: int = 0  # number of encodings printed
    is_explained: bool = False  # whether the reasons for skipped evaluations are printed

    @property
    def is_refining(self) -> bool:
        """Whether codes are refined to the default quality."""
        return self.keep is self.max_error is None

    def show(self, event: Event) -> None:
        """Print an event."""
        from icmlora.fleet.context import StageBegun

        if isinstance(event, StageBegun):
            self.catch_up(cast("TrainReport | UpdateReport", event.report))
            if event.label == "encode" and self.is_refining and not self.encoded:
                self.session.out.note("refining codes; the store is already complete, so Ctrl-C is safe")
        _print_event(self.session, event)
        encode_report.print_encoded(self.session, event, "refined" if self.is_refining else "task")
        eval_report.print_measured(self.session, event)

    def catch_up(self, report: TrainReport | UpdateReport, *, is_stopped: bool = False) -> None:
        """Print the finished stages that are not printed yet."""
        from icmlora.fleet.train.train import TrainReport

        out = self.session.out
        if not self.is_summed_up:
            self.is_summed_up = True
            if isinstance(report, TrainReport):
                for trained in report.trained:
                    _sum_up(self.session, trained)
            else:
                for updated in report.updated:
                    _sum_up_update(self.session, updated)
        for encoded in report.encoded[self.encoded :]:
            encode_report.sum_up(self.session, encoded, brief=self.is_refining)
            if not self.is_refining and not is_stopped:
                encode_report.print_evict_hint(self.session, encoded, self.max_error)
        self.encoded = len(report.encoded)
        if report.measurable is not None and not self.is_explained:
            self.is_explained = True
            for reason in report.measurable.reasons:
                out.note(f"not evaluated: {reason}")
            if not report.measurable.tasks and report.measurable.elsewhere:
                out.hint("run `icm eval` to evaluate the codes; it needs the base model and held-out text")
        if report.evaluated is not None:  # the last stage
            eval_report.sum_up(self.session, report.evaluated)
        if report.measurable is not None and report.evaluate_error is not None:
            out.warn(f"not evaluated: {', '.join(report.measurable.tasks)}: {report.evaluate_error}")

    def interrupted(self, report: TrainReport | UpdateReport) -> NoReturn:
        """Print the state that an interrupted stage leaves, and how to continue."""
        from icmlora.fleet.train.train import TrainReport

        if report.evaluated is not None:
            done = eval_report.measured(report.evaluated)
            raise Interrupted(f"interrupted; {done}", hint=eval_report.MEASURE_REST)
        if report.encoded:
            done = counted(len(report.encoded[-1].tasks), "task")
            hint = "every task has a code; run `icm encode` to refine the rest"
            if not self.is_refining:
                hint = "the generator is stored; run `icm encode` with the same limits to encode the rest"
            raise Interrupted(f"interrupted; encoded {done}", hint=hint)
        if not isinstance(report, TrainReport):
            unchanged = "interrupted; base models not listed above did not change"
            raise Interrupted(unchanged, hint="run the same command again to continue")
        saved = f"saved a training checkpoint at step {report.stopped_at}" if report.stopped_at else "nothing was lost"
        raise Interrupted(f"interrupted; {saved}", hint="run the same command again to continue")


def _help(session: Session, work: Callable[[Context], TrainReport] | None) -> ExitCode:
    """Run as a non-zero rank: join the training and print nothing. `work=None` does nothing."""
    if work is None:
        return ExitCode.DONE
    quiet = replace(session, out=Output(quiet=True, progress=False))
    try:
        _, stopped = quiet.run("train", work)
    except OtherProcessFailed:
        return ExitCode.FAILED
    return ExitCode.INTERRUPTED if stopped else ExitCode.DONE


def _train_few_shot(session: Session, device: str, base_model: str | None, episodes: int, seed: int) -> bool:
    """Train the few-shot starts; return whether a base model failed or a task was skipped."""
    from icmlora.fleet.few_shot.train import train_few_shot

    report, stopped = session.run(
        "episodes",
        lambda context: train_few_shot(context, device=device, base_model=base_model, episodes=episodes, seed=seed),
        partial(_print_few_shot, session),
    )
    for trained in report.trained:
        _sum_up_few_shot(session, trained)
    if stopped:
        hint = "run `icm train --few-shot` to start again; generators and codes did not change"
        raise Interrupted("interrupted; no few-shot start was stored", hint=hint)
    return bool(report.failed) or any(trained.left_out for trained in report.trained)


def _print_event(session: Session, event: Event) -> None:
    from icmlora.fleet.train.run import StepDone
    from icmlora.fleet.train.train import CodeMade, Continued, Resumed, Trained
    from icmlora.fleet.train.update import Updated

    out = session.out
    if isinstance(event, StepDone):
        if event.at.step % _EVENT_EVERY == 0 or event.at.step == event.at.steps:
            names = {"base_model": event.base_model, "task": event.task, "mean_bits": event.mean_bits}
            out.event("step", **{**asdict(event.at), **names})
    elif isinstance(event, Resumed):
        out.event("resumed", **asdict(event))
        out.note(f"resuming from step {event.step}")
    elif isinstance(event, Continued):
        out.event("continued", **asdict(event))
        new = f"{counted(event.new_tasks, 'new task')}" if event.new_tasks else "no new tasks"
        out.note(f"continuing from generator {event.version} of {event.base_model}: {new}; encoding every task again")
    elif isinstance(event, CodeMade):
        out.event("code", **as_fields(event))
        out.detail(f"{event.task}: code of {human_size(event.size)}, relative error {event.relative_error:.4f}")
    elif isinstance(event, Trained):
        out.event("trained", **asdict(event))
    elif isinstance(event, Updated):
        out.event("updated", **asdict(event))


def _print_few_shot(session: Session, event: Event) -> None:
    from icmlora.fleet.few_shot.train import EpisodeDone, FewShotTrained

    print_failure(session, event)
    if isinstance(event, EpisodeDone):
        session.out.event("episode", **{**asdict(event.at), "base_model": event.base_model, "task": event.task})
    elif isinstance(event, FewShotTrained):
        session.out.event("start", **asdict(event))


def _sum_up(session: Session, trained: Trained) -> None:
    out, metrics = session.out, trained.metrics
    bits = metrics["bits_per_parameter"]
    before = metrics["bits_per_parameter_before"]
    measured = counted(int(str(metrics["measured_adapters"])), "adapter")
    fall = "" if bits is None else f"; {before:.3f} to {bits:.3f} bits per parameter over {measured}"
    out.line(
        f"generator {trained.version} of {trained.base_model}: {human_size(trained.generator_size)}; "
        f"{counted(trained.tasks, 'code')}, {human_size(trained.codes_size)} in total"
    )
    out.note(
        f"trained {counted(int(str(metrics['steps'])), 'step')} in "
        f"{human_duration(float(str(metrics['fit_seconds'])))} on {metrics['device']}, "
        f"peak memory {human_size(int(str(metrics['peak_memory'])))}{fall}"
    )
    if known := int(str(metrics["initial_a_known"])):
        out.note(f"recovered the initialisation seed of {known} of {counted(trained.tasks, 'adapter')}: smaller codes")
    else:
        out.note("recovered no initialisation seeds; codes are larger without them")
    _warn_of(session, trained.left_out)
    if trained.earlier_codes:
        out.note(f"{counted(trained.earlier_codes, 'task')} not encoded again: codes of earlier generators stay")
    print_replaced(out, trained.replaced_bytes)
    if trained.start_dropped:
        out.note("the new generator has no few-shot start; the previous generator had one")
        out.hint("run `icm train --few-shot` to train one; codes do not change")


def _warn_of(session: Session, left_out: Mapping[str, str]) -> None:
    for name, reason in left_out.items():
        session.out.warn(f"{name} was not encoded: {reason}")


def _sum_up_update(session: Session, updated: Updated) -> None:
    out = session.out
    _warn_of(session, updated.left_out)
    if not updated.tasks:
        if not updated.left_out:
            out.line(f"nothing to do: every task of {updated.base_model} that can have a code has one")
        return
    networks = f" with {counted(updated.epochs, 'network')}" if updated.epochs > 1 else ""
    out.line(
        f"generator {updated.version} of {updated.base_model}: {human_size(updated.generator_size)}{networks}; "
        f"{counted(len(updated.tasks), 'new code')}, {human_size(updated.codes_size)} in total"
    )
    if updated.kept_size is not None and updated.tuned_size is not None:
        kept, tuned = human_size(updated.kept_size), human_size(updated.tuned_size)
        done = "added a tuned network" if "tuned" in updated.added else "kept the network unchanged"
        out.note(f"{done}: new codes take {kept} without tuning, {tuned} with it, tuned network included")
    if "fresh" in updated.added:
        out.note("added a network for modules or ranks that the generator did not cover")
    out.note(f"took {human_duration(float(str(updated.metrics['update_seconds'])))}; existing codes did not change")
    print_replaced(out, updated.replaced_bytes)


def _sum_up_few_shot(session: Session, trained: FewShotTrained) -> None:
    size, tasks = human_size(trained.size), counted(trained.tasks, "task")
    session.out.line(f"few-shot start for {trained.base_model}: {size}, from {tasks}")
    gain = f"{1 - trained.loss:.2f} of the gain of the trained adapters on held-out samples"
    took = f"{counted(trained.episodes, 'episode')} in {human_duration(trained.seconds)}"
    session.out.note(f"{took}; generated adapters reach {gain}{measured_in([trained.precision])}")
    for name, reason in trained.left_out.items():
        session.out.warn(f"skipped {name}: {reason}")
