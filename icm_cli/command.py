"""Turn a use case into a command: its options, checks and help come from its signature and docstring.

    @command(encode)
    def show(session: Session, call: Call[EncodeReport]) -> None:
        report = call.run(partial(print_encoded, session))
        ...

The function shows the result. Parameters of its own, such as `yes`, are further options.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

import typer

from icm_cli.errors import INTERRUPTED, ExitCode, Interrupted, StdoutClosed, UsageProblem
from icm_cli.options import argument, option
from icm_cli.report import print_event
from icm_cli.session import GlobalOptions, Session, global_parameters, start
from icmlora.errors import Cancelled, DataError
from icmlora.fleet.params import Param, param_of, parameters_of

if TYPE_CHECKING:
    from icmlora.fleet.context import Event, HasContext

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_SECTIONS = re.compile(r"\n+(Raises|Returns|Yields):\n.*", re.DOTALL)  # for Python; the last sections of a docstring


@dataclass(frozen=True)
class Call(Generic[R]):
    """A use case with the values of the command line."""

    session: Session
    use_case: Callable[..., R]
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Return the value of a parameter, which may be its default."""
        return self.values[name]

    def of(self, use_case: Callable[Concatenate[HasContext, ...], T], option: str, **more: Any) -> Call[T]:
        """Return a call of another use case with the same values, and more.

        Raises:
            UsageProblem: A value was given that the other one does not take; `option` is what selects it.
        """
        here, there = parameters_of(self.use_case, skip=1), parameters_of(use_case, skip=1)
        for name, value in self.values.items():
            param = param_of(here[name].annotation)
            is_setting = param is not None and param.setting is not None  # which nobody may have typed
            if name not in there and value != here[name].default and not is_setting:
                given = spelling_of(name, param).split()[0].split("/")[0]
                raise UsageProblem(f"{option} cannot be combined with {given}", hint=f"omit {option} or {given}")
        return Call(self.session, use_case, {name: self.values[name] for name in there if name in self.values} | more)

    def now(self, **changes: Any) -> R:
        """Return the result, without a progress display."""
        return self.use_case(self.session.context, **{**self.values, **changes})

    def run(self, on_event: Callable[[Event], None] | None = None, label: str | None = None, **changes: Any) -> R:
        """Return the result; show progress and print events. If the user stops it, the report is `stopped`."""

        def listen(event: Event) -> None:
            print_event(self.session, event)
            if on_event is not None:
                on_event(event)

        try:
            with self.session.working(label or self.use_case.__name__, listen) as context:
                return self.use_case(context, **{**self.values, **changes})
        except Cancelled as stop:
            if stop.report is None:
                raise
            report: Any = stop.report
            report.stopped = True
            return cast(R, report)


def command(
    use_case: Callable[Concatenate[HasContext, P], R], *, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that makes a command of a use case and the function that shows its result.

    Args:
        use_case: Every parameter has a `Param`.
        without: Parameters that the command line does not offer.
    """
    declared = {name: found for name, found in parameters_of(use_case, skip=1).items() if name not in without}

    def decorate(show: Callable[..., None]) -> Callable[..., None]:
        own = parameters_of(show, skip=2)

        def body(session: Session, values: dict[str, Any]) -> None:
            extra = {name: values.pop(name) for name in own}
            show(session, Call(session, use_case, _converted(session, declared, values)), **extra)

        return _typer_command(show, [*declared.values(), *own.values()], show.__doc__ or use_case.__doc__ or "", body)

    return decorate


def plain_command(function: Callable[Concatenate[Session, P], None]) -> Callable[..., None]:
    """Return a command without a use case of its own. It takes the session and its options."""
    own = parameters_of(function, skip=1)

    def body(session: Session, values: dict[str, Any]) -> None:
        cast(Callable[..., None], function)(session, **_converted(session, own, values))

    return _typer_command(function, list(own.values()), function.__doc__ or "", body)


def spelling_of(name: str, param: Param | None) -> str:
    """Return the option names and the value of a parameter, as the help prints them."""
    return (param and param.spelling) or f"--{name.replace('_', '-')}"


def _typer_command(
    named: Callable[..., Any],
    parameters: Sequence[inspect.Parameter],
    doc: str,
    body: Callable[[Session, dict[str, Any]], None],
) -> Callable[..., None]:
    """Return a function for Typer: the parameters and the global options, which also work before the command name."""

    def run(*, ctx: typer.Context, **values: Any) -> None:
        options = GlobalOptions(**{field.name: values.pop(field.name) for field in fields(GlobalOptions)}).over(ctx.obj)
        if ctx.invoked_subcommand is not None:  # a group that is also a command, called with a subcommand
            ctx.obj = options
            return
        session = start(options, ctx.command_path)
        try:
            try:
                body(session, values)
                sys.stdout.flush()
            finally:
                session.warn_damaged()  # also if the command fails
            if session.damaged:
                session.out.hint("run `icm verify` to see what is damaged and how to repair it")
                raise typer.Exit(ExitCode.DAMAGED)
        except (KeyboardInterrupt, Cancelled) as error:
            raise Interrupted(INTERRUPTED) from error
        except BrokenPipeError as error:
            raise StdoutClosed("stdout was closed") from error

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    shown = [context, *map(_for_typer, parameters), *global_parameters()]
    functools.update_wrapper(run, named, assigned=("__module__", "__name__", "__qualname__"))
    run.__doc__ = _reflowed(_SECTIONS.sub("", inspect.cleandoc(doc)))
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def _for_typer(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter as Typer reads it."""
    param = param_of(parameter.annotation)
    if param is None:  # declared for Typer already
        return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    kind, default = get_args(parameter.annotation)[0], parameter.default
    if default is inspect.Parameter.empty and not param.is_argument and NoneType in get_args(kind):
        default = None
    is_required = default is inspect.Parameter.empty
    if param.parse is not None:
        kind = str if is_required else str | None
    elif _is_sequence(kind):
        item: Any = get_args(_without_none(kind))[0]
        item = Path if Path in get_args(item) else item  # str | Path
        if get_origin(item) is Literal:  # Typer cannot repeat one
            choices = [(choice.upper(), choice) for choice in get_args(item)]
            item = StrEnum("Choice", choices)  # type: ignore[misc, no-redef]
        kind = list[item] if is_required else list[item] | None
        default = default if is_required else None
    elif Path in get_args(kind):  # str | Path
        kind = Path | None if NoneType in get_args(kind) else Path
    elif param.setting is not None:
        kind, default = str | None, None
    return parameter.replace(
        kind=inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, _declared(parameter.name, param)],
        default=default,
    )


def _declared(name: str, param: Param) -> Any:
    if param.is_argument:
        return argument(str(param.spelling), param.help, completes=param.completes)
    rules = {"min": param.min, "max": param.max} if param.parse is None else {}
    rules = {rule: value for rule, value in rules.items() if value is not None}
    return option(spelling_of(name, param), param.help, panel=param.panel, completes=param.completes, **rules)


def _converted(
    session: Session, declared: Mapping[str, inspect.Parameter], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of the command line as the use case takes them."""
    found: dict[str, Any] = {}
    for name, parameter in declared.items():
        param, value = param_of(parameter.annotation), values[name]
        if param is None:
            found[name] = value
        elif param.setting is not None:
            found[name] = session.setting(param.setting, value)
        elif value is None or value == []:
            found[name] = value if parameter.default is inspect.Parameter.empty else parameter.default
        else:
            plain = [getattr(item, "value", item) for item in value] if isinstance(value, list) else value
            found[name] = plain if param.parse is None else _parsed(param.parse, value)
    return found


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except DataError as error:
        raise UsageProblem(error.message, hint=error.hint) from error


def _without_none(kind: Any) -> Any:
    kinds = [one for one in get_args(kind) if one is not NoneType] if get_origin(kind) in (Union, UnionType) else [kind]
    return kinds[0]


def _is_sequence(kind: Any) -> bool:
    origin = get_origin(_without_none(kind))
    return isinstance(origin, type) and issubclass(origin, Sequence)


def _reflowed(text: str) -> str:
    """Join the lines of each paragraph without indented lines, so that the help fits any width."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(part if "\n " in part else part.replace("\n", " ") for part in paragraphs)
