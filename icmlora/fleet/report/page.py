"""Write the page: the facts of a report through the templates in page/, with autoescape.

The style sheets and the script are in the page itself. Its Content-Security-Policy allows exactly these, by their
digests, and nothing from anywhere else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from icmlora.fleet.map.picture import STYLE as MAP_STYLE
from icmlora.fleet.measure.metric_result import measured_in
from icmlora.fleet.report.task_table import COLUMNS
from icmlora.io.text import counted, escape, human_percent, human_size

if TYPE_CHECKING:
    from icmlora.fleet.report.facts import Facts
    from icmlora.fleet.report.outputs import TaskOutputs
    from icmlora.fleet.report.pictures import TaskPictures
    from icmlora.fleet.report.rate_picture import RatePicture
    from icmlora.fleet.report.task_table import TaskTable
    from icmlora.fleet.stats.bill import Bill, Spread

_KEPT = re.compile(r"([\n\t\u200c\u200d]+)")
"""What a longer text keeps of what does not print: line ends, tabs, and the joiners of several scripts."""


@dataclass(frozen=True)
class DrawnMap:
    """The task map of a base model: its picture, or why there is none."""

    base_model: str
    svg: str | None
    notes: Sequence[str]  # which tasks are not on it, and why


@dataclass(frozen=True)
class Page:
    """Everything that a page shows."""

    facts: Facts
    bill: Bill
    table: TaskTable
    rate: RatePicture | None
    maps: Sequence[DrawnMap]
    outputs: Sequence[TaskOutputs | TaskPictures]
    failures: Mapping[str, str]  # task -> why it has no outputs
    made_by: str

    @property
    def has_pictures(self) -> bool:
        """Whether a task draws."""
        return any(hasattr(found, "sources") for found in self.outputs)

    @property
    def has_texts(self) -> bool:
        """Whether a task writes; so says the page too where no task has outputs."""
        return not self.outputs or not all(hasattr(found, "sources") for found in self.outputs)


def render(page: Page) -> Iterator[bytes]:
    """Yield the page in pieces; the same facts give the same bytes."""
    css, script = _asset("page.css"), _asset("page.js")
    template = _environment().get_template("page.html")
    answering = {page.table.numbers[found.task]: number for number, found in enumerate(page.outputs, start=1)}
    chunks = template.generate(
        page=page,
        css=css,
        script=script,
        policy=_policy([css, MAP_STYLE], script),
        columns=COLUMNS,
        answering=answering,
    )
    for chunk in chunks:
        yield chunk.encode()


def _policy(styles: Sequence[str], script: str) -> str:
    """Return a Content-Security-Policy for these style sheets and this script alone."""
    parts = {
        "default-src": "'none'",
        "style-src": " ".join(map(_source, styles)),
        "script-src": _source(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",  # the script can set text, and never HTML
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> Environment:
    loader = PackageLoader("icmlora.fleet.report", "page")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {
        "counted": counted,
        "percent": human_percent,
        "shown": escape,
        "shown_text": shown_text,
        "size": human_size,
        "spread": _spread,
    }
    return found


def shown_text(text: str) -> str:
    """Return a text of several lines without anything that could reorder or hide a part of it."""
    return "".join(part if _KEPT.fullmatch(part) else escape(part) for part in _KEPT.split(text.replace("\r\n", "\n")))


def _spread(found: Spread | None) -> str:
    if found is None:
        return "not measured"
    return f"{found.mean:.3f} / {found.worst:.3f}{measured_in(found.precisions)}"


def _asset(name: str) -> str:
    return resources.files("icmlora.fleet.report").joinpath("page", name).read_text(encoding="utf-8")
