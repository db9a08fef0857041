"""Take words of the command line that need no conversion as they are.

Typer lets pydantic convert each value, and importing that takes as long as all else that a short command imports.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import typer.core

if TYPE_CHECKING:
    from typer import _click as click

_KNOWN = "0.29."
"""Beginning of the versions of Typer that convert in the method that is replaced here. Another one does it all."""

_NUMBER = re.compile("[0-9]{1,9}")


def spare_pydantic() -> None:
    """Let all parameters convert without pydantic what is a text, a path or a whole number."""
    if typer.__version__.startswith(_KNOWN):
        asked: Any = typer.core._TyperParameter
        asked.get_runtime_param = lambda parameter: _PlainValues()


class _PlainValues:
    """What Typer asks for the value of a parameter."""

    def coerce(self, value: Any, param: Any, ctx: click.Context) -> Any:
        """Return the value of a parameter from its word, its words or its default."""
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        kind, rules = param.type_descriptor.annotation, param.type_descriptor.parameter_info
        if type(value) is kind and kind in (str, int, bool):
            return value
        if kind is Path and isinstance(value, str | Path):
            return Path(value)
        if kind == list[str] and isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
            return list(value)
        if kind is int and isinstance(value, str) and _NUMBER.fullmatch(value):
            number = int(value)
            if (rules.min is None or number >= rules.min) and (rules.max is None or number <= rules.max):
                return number
        from typer._coercion import build_runtime_param  # imports pydantic, which also says what is wrong with a value

        return build_runtime_param(param.type_descriptor).coerce(value, param=param, ctx=ctx)
