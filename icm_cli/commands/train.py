"""`icm train`: train the generator, encode the tasks and evaluate the codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer

from icm_cli import eval_report
from icm_cli.command import Call, command
from icm_cli.commands.encode import print_codes, print_encoded, print_evict_hint, print_replaced
from icm_cli.errors import ExitCode, Interrupted, UsageProblem
from icm_cli.output import Output
from icm_cli.session import Session
from icmlora.errors import OtherProcessFailed
from icmlora.fleet.context import StageBegun
from icmlora.fleet.few_shot.train import Episodes, train_few_shot
from icmlora.fleet.measure.metric_result import measured_in
from icmlora.fleet.params import Param
from icmlora.fleet.train import train as use_cases
from icmlora.fleet.train.report import CodeMade, Continued, EpisodeDone, Resumed, StepDone
from icmlora.fleet.train.update import update as add_tasks
from icmlora.io.text import counted, human_duration, human_size
from icmlora.training.ranks import launched

if TYPE_CHECKING:
    from icmlora.fleet.context import Event
    from icmlora.fleet.train.report import FewShotTrained, Trained, TrainReport, Updated

FewShotOpt = Annotated[
    bool,
    Param("Train the few-shot start for `icm generate` instead of the generator. Codes do not change.", "--few-shot"),
]
UpdateOpt = Annotated[bool, Param("Only encode tasks without a code. Existing codes do not change.", "--update")]

_EVENT_EVERY = 10  # steps between two JSON lines


@command(use_cases.train)
def train(
    session: Session,
    call: Call[TrainReport],
    update: UpdateOpt = False,
    few_shot: FewShotOpt = False,
    episodes: Episodes = None,
) -> None:
    if launched()[0]:
        raise typer.Exit(_help(session, None if update or few_shot else call))
    if episodes is not None and not few_shot:
        raise UsageProblem("--episodes is only for --few-shot", hint="run `icm train --few-shot --episodes N`")
    if update and few_shot:
        raise UsageProblem("--update cannot be combined with --few-shot", hint="run `icm train`, then --few-shot")
    if few_shot:
        learning = call.of(train_few_shot, "--few-shot", episodes=episodes)
        report = learning.run(partial(_print_episode, session), "episodes")
        for trained in report.done:
            _sum_up_few_shot(session, cast("FewShotTrained", trained))
        if report.stopped:
            hint = "run `icm train --few-shot` to start again; generators and codes did not change"
            raise Interrupted("interrupted; no few-shot start was stored", hint=hint)
    else:
        printed = _Printed(session, call["max_error"], call["keep"])
        chosen = call.of(add_tasks, "--update") if update else call
        report = chosen.run(printed.show, "update" if update else "train")
        printed.catch_up(report)
        if report.stopped:
            printed.interrupted(report, is_update=update)
    if report.is_partial:
        raise typer.Exit(ExitCode.PARTLY)


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
        """Print an event, and the stages before it."""
        out = self.session.out
        if isinstance(event, StageBegun):
            self.catch_up(cast("TrainReport", event.report))
            if event.label == "encode" and self.is_refining and not self.encoded:
                out.note("refining codes; the store is already complete, so Ctrl-C is safe")
        _print_step(self.session, event)
        print_encoded(self.session, event, "refined" if self.is_refining else "task")
        eval_report.print_measured(self.session, event)

    def catch_up(self, report: TrainReport) -> None:
        """Print the finished stages that are not printed yet."""
        out = self.session.out
        if not self.is_summed_up:
            self.is_summed_up = True
            for trained in report.trained:
                _sum_up(self.session, trained)
            for updated in report.updated:
                _sum_up_update(self.session, updated)
        for encoded in report.encoded[self.encoded :]:
            print_codes(self.session, encoded, brief=self.is_refining)
            if not self.is_refining and not report.stopped:
                print_evict_hint(self.session, encoded, self.max_error)
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

    def interrupted(self, report: TrainReport, *, is_update: bool) -> NoReturn:
        """Print the state that an interrupted stage leaves, and how to continue."""
        if report.evaluated is not None:
            raise Interrupted(f"interrupted; {eval_report.measured(report.evaluated)}", hint=eval_report.MEASURE_REST)
        if report.encoded:
            done = counted(len(report.encoded[-1].done), "task")
            hint = "every task has a code; run `icm encode` to refine the rest"
            if not self.is_refining:
                hint = "the generator is stored; run `icm encode` with the same limits to encode the rest"
            raise Interrupted(f"interrupted; encoded {done}", hint=hint)
        saved = f"saved a training checkpoint at step {report.stopped_at}" if report.stopped_at else "nothing was lost"
        if is_update:
            saved = "base models not listed above did not change"
        raise Interrupted(f"interrupted; {saved}", hint="run the same command again to continue")


def _help(session: Session, call: Call[TrainReport] | None) -> ExitCode:
    """Run as a non-zero rank: join the training and print nothing. `call=None` does nothing."""
    if call is None:
        return ExitCode.DONE
    quiet = replace(session, out=Output(quiet=True, progress=False))
    try:
        report = replace(call, session=quiet).run()
    except OtherProcessFailed:
        return ExitCode.FAILED
    return ExitCode.INTERRUPTED if report.stopped else ExitCode.DONE


def _print_step(session: Session, event: Event) -> None:

    out = session.out
    if isinstance(event, StepDone):
        if event.at.step % _EVENT_EVERY == 0 or event.at.step == event.at.steps:
            names = {"base_model": event.base_model, "task": event.task, "mean_bits": event.mean_bits}
            out.event("step", **{**asdict(event.at), **names})
    elif isinstance(event, Resumed):
        out.note(f"resuming from step {event.step}")
    elif isinstance(event, Continued):
        new = f"{counted(event.new_tasks, 'new task')}" if event.new_tasks else "no new tasks"
        out.note(f"continuing from generator {event.version} of {event.base_model}: {new}; encoding every task again")
    elif isinstance(event, CodeMade):
        out.detail(f"{event.task}: code of {human_size(event.size)}, relative error {event.relative_error:.4f}")


def _print_episode(session: Session, event: Event) -> None:

    if isinstance(event, EpisodeDone):
        session.out.event("episode", **{**asdict(event.at), "base_model": event.base_model, "task": event.task})


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
