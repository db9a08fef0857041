"""Add the global options to a command and pass it a `Session` (output, settings, store).

@command
def ls(session: Session, limit: ...) -> None:      ->  icm ls [--limit N] [--store ...] [--json] [-q] ...
"""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

from icm_cli.config import Settings, cache_folder, load_settings
from icm_cli.options import JsonOpt, LockTimeoutOpt, NoProgressOpt, QuietOpt, StoreOpt, VerboseOpt
from icm_cli.output import Output
from icmlora.errors import Cancelled
from icmlora.fleet.context import Context, Progress, StageBegun, TaskDamaged, Waiting, address_of
from icmlora.io.text import counted, some

if TYPE_CHECKING:  # commands without a store, such as --help, do not import the library
    from icmlora.fleet.context import Event

_STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and the signal that batch systems and containers send before SIGKILL."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class GlobalOptions:
    """The global options of one call. Field names are parameter names."""

    store: StoreOpt = None
    json: JsonOpt = False
    quiet: QuietOpt = False
    verbose: VerboseOpt = 0
    no_progress: NoProgressOpt = False
    lock_timeout: LockTimeoutOpt = None

    def over(self, outer: GlobalOptions) -> GlobalOptions:
        """Return these options; unset ones come from the options before the command name."""
        return GlobalOptions(
            store=self.store if self.store is not None else outer.store,
            json=self.json or outer.json,
            quiet=self.quiet or outer.quiet,
            verbose=max(self.verbose, outer.verbose),
            no_progress=self.no_progress or outer.no_progress,
            lock_timeout=self.lock_timeout if self.lock_timeout is not None else outer.lock_timeout,
        )


@dataclass(frozen=True)
class Session:
    """A single run of a command."""

    out: Output
    settings: Settings
    command: str
    damaged: dict[str, str] = field(default_factory=dict)  # skipped tasks with damaged rows -> reason
    _shown: set[str] = field(default_factory=set, init=False)  # messages about locks that were already printed

    @property
    def context(self) -> Context:
        """The store, for work without a progress display."""
        store, timeout = address_of(self.settings.store.value), self.settings.lock_timeout.value
        return Context(store, cache_folder, timeout, self.command, self._hear)

    @contextmanager
    def working(self, label: str, on_event: Callable[[Event], None] | None = None) -> Iterator[Context]:
        """Yield the store and show progress. Ctrl-C stops the work after the current step."""
        with self.listening(label, on_event) as listen:
            yield replace(self.context, on_event=listen)

    @contextmanager
    def listening(
        self, label: str, on_event: Callable[[Event], None] | None = None
    ) -> Iterator[Callable[[Event], None]]:
        """Yield an event handler for a use case and show progress. Ctrl-C stops the work at the next event."""
        with ExitStack() as shown, self._catching_signals() as received:
            display = shown.enter_context(self.out.progress(label))

            def listen(event: Event) -> None:
                nonlocal display
                if isinstance(event, Progress):
                    display.update(event.done, event.total, event.note)
                elif isinstance(event, StageBegun):
                    shown.close()  # lines of the last stage stay above the next display
                    if on_event is not None:
                        on_event(event)
                    display = shown.enter_context(self.out.progress(event.label))
                elif isinstance(event, TaskDamaged | Waiting):
                    self._hear(event)
                elif on_event is not None:
                    on_event(event)
                if received:
                    raise Cancelled

            yield listen

    def run(
        self, label: str, work: Callable[[Context], R], on_event: Callable[[Event], None] | None = None
    ) -> tuple[R, bool]:
        """Run a use case as in `working`. Return its report and whether the user stopped it."""
        try:
            with self.working(label, on_event) as context:
                return work(context), False
        except Cancelled as stop:
            if stop.report is None:
                raise
            return cast(R, stop.report), True

    def _hear(self, event: Event) -> None:
        """Handle the events of all commands: a task with damaged rows, or another process that holds a lock."""
        if isinstance(event, TaskDamaged) and event.task not in self.damaged:
            self.damaged[event.task] = event.message
            if self.out.is_json:
                self.out.warn(f"skipped {event.task}: {event.message}", kind="task_damaged", task=event.task)
        elif isinstance(event, Waiting) and event.text not in self._shown:  # the event repeats every second
            self._shown.add(event.text)
            self.out.note(event.text)

    def warn_damaged(self) -> None:
        """Print one warning for all skipped tasks with damaged rows. JSON mode has printed a line for each."""
        if self.damaged and not self.out.is_json:
            names, reason = list(self.damaged), next(iter(self.damaged.values()))
            count = "" if len(names) == 1 else f"{counted(len(names), 'damaged task')}: "
            self.out.warn(f"skipped {count}{some(names, most=3)}: {reason}")

    def device(self, flag: str | None) -> str:
        """Return the device from the flag, the environment or the configuration."""
        return str(self.setting("device", flag))

    def setting(self, name: str, flag: object) -> object:
        """Return a setting from the flag, the environment or the configuration."""
        return flag if flag is not None else getattr(self.settings, name).value

    @contextmanager
    def _catching_signals(self) -> Iterator[list[int]]:
        """Yield a list that receives the first Ctrl-C or SIGTERM; the second one raises `KeyboardInterrupt`."""
        received: list[int] = []
        stderr = sys.stderr  # redirected while a model loads

        def receive(number: int, frame: FrameType | None) -> None:
            if received:
                raise KeyboardInterrupt
            received.append(number)
            with redirect_stderr(stderr):
                self.out.note("stopping after the current step; press Ctrl-C again to stop immediately")

        before = {number: signal.signal(number, receive) for number in _STOPPING}
        try:
            yield received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def global_parameters() -> list[inspect.Parameter]:
    """Return the global options as parameters for Typer."""
    own = inspect.signature(GlobalOptions, eval_str=True).parameters.values()
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]


def start(options: GlobalOptions, name: str) -> Session:
    """Begin the run of a command."""
    out = Output(as_json=options.json, quiet=options.quiet, verbosity=options.verbose, progress=not options.no_progress)
    return Session(out, load_settings(store=options.store, lock_timeout=options.lock_timeout), name)
