"""Pages of fleets that exist in memory only, with texts that no store would take; and a reader of pages."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from html.parser import HTMLParser
from typing import Any

import numpy as np

from icmlora.adapter.metrics import GroupError
from icmlora.fleet.map.task_map import MapReport
from icmlora.fleet.report.content import assembled
from icmlora.fleet.report.outputs import Answers, TaskAnswer, TaskOutputs, differing
from icmlora.fleet.report.page import Page, render
from icmlora.fleet.report.pictures import Distances, Drawn, Row, TaskPictures, data_uri
from icmlora.fleet.resources.stored_vectors import LeftOut
from icmlora.fleet.stats.bill import BaseModelBill, Bill, TaskBill
from icmlora.task_vectors.map import map_tasks
from registry.manifests import Code, CodeLimits, File, Generator, Measurement, StoredAdapter, Task, Vector
from registry.tables import TaskRow, index_of
from registry.usage import Usage

DAY = "2026-11-26T10:00:00Z"
NETWORK = File("f" * 64, 40_000)


@dataclass(frozen=True)
class Made:
    """A task to make up; texts are taken as they are, whatever a store would say."""

    name: str
    base_model: str = "acme/tiny"
    tags: tuple[str, ...] = ()
    note: str | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 8
    original: int = 1_000_000
    code: int | None = 20_000
    gain: float | None = 0.97
    error: float | None = 0.4
    original_only: str | None = None
    evicted: bool = False

    def bill(self) -> TaskBill:
        """Return the bill of the task."""
        final = StoredAdapter(
            weights=File("a" * 64, self.original - 1000), config=File("c" * 64, 1000), dtype="BF16", rank_max=self.rank,
            parameters=self.original // 2, target_modules=self.targets, layout=(), source="made up",
            original_only=self.original_only, evicted_at=DAY if self.evicted else None,
        )  # fmt: skip
        measured = Measurement(
            source="code", generator=str(NETWORK), data="d" * 64, value=1.0, count=1, utf8_bytes=1,
            retained_gain=self.gain, settings={},
        )  # fmt: skip
        task = Task(
            name=self.name, base_model=self.base_model, final=final, tags=self.tags, note=self.note, created_at=DAY,
            vectors=(Vector(view="adapted", support_set=0, blob=File("b" * 64, 1500), dim=8, extractor={}),),
            code=self._code(), measured=(measured,),
        )  # fmt: skip
        columns = index_of(task, "e" * 64)
        row = TaskRow(**{one.name: columns[one.name] for one in fields(TaskRow)})
        return TaskBill(row, self.original)

    def _code(self) -> Code | None:
        if self.code is None:
            return None
        asked = CodeLimits(max_error=0.1, is_kept=False) if (self.gain or 1) < 0.5 else None
        squared = None if self.error is None else self.error**2
        return Code(blob=File("1" * 64, self.code), generator=NETWORK, squared_error=squared, asked=asked)


def page_of(
    made: list[Made],
    *,
    texts: tuple[str, str, str] | None = None,
    failure: str | None = None,
    with_map: bool = True,
    drawing: bool = False,
) -> Page:
    """Return the page of a fleet; `texts` are a prompt, and what original and code of the first task write.

    With `drawing`, the last task has pictures.
    """
    labels = sorted({task.base_model for task in made})
    fleets = tuple(
        BaseModelBill(
            label,
            Generator(base_model=label, blob=NETWORK, config={}, metrics={}, created_at=DAY),
            tuple(task.bill() for task in made if task.base_model == label),
            0,
        )
        for label in labels
    )
    usage = Usage(**dict.fromkeys(Usage.__dataclass_fields__, 0) | {"originals": 9_000_000, "database": 40_000})
    maps = {label: _map(label, made) if with_map else None for label in labels}
    outputs: list[TaskOutputs | TaskPictures] = []
    outputs += [] if texts is None else [TaskOutputs(made[0].name, [_answers(*texts)])]
    outputs += [_pictures(made[-1].name, "pear" if texts is None else texts[0])] if drawing else []
    failures = {} if failure is None else {made[-1].name: failure}
    return assembled(Bill(usage, fleets), maps, outputs, failures)


def html_of(page: Page) -> str:
    """Return the text of a page."""
    return b"".join(render(page)).decode()


def _map(label: str, made: list[Made]) -> MapReport | str:
    names = [task.name for task in made if task.base_model == label]
    if len(set(names)) < 3:
        return "too few"
    random = np.random.default_rng(len(names))
    vectors = {name: random.standard_normal((2, 8)) for name in names}
    return MapReport(label, "adapted", map_tasks(vectors), 2 * len(names), (LeftOut(names[0], "made up"),))


def _answers(prompt: str, original: str, code: str) -> Answers:
    first, second = differing(original, code)
    return Answers(prompt, prompt, [TaskAnswer("original", first), TaskAnswer("code", second)], original == code)


def _pictures(task: str, prompt: str) -> TaskPictures:
    shades = {"base model": 0, "original": 120, "code": 125}
    pictures = {name: data_uri(np.full((600, 900, 3), shade, np.uint8)) for name, shade in shades.items()}
    distances = Distances({"base model": 120 / 255, "code": 5 / 255}, 0.25)
    errors = [GroupError("attention", 3, 900, {"code": 0.31}), GroupError("convolution", 1, 100, {"code": 0.05})]
    rows = [Row(0, pictures), Row(1, pictures)]
    return TaskPictures(task, list(shades), [Drawn(prompt, rows)], distances, errors, ["original: half of it"])


@dataclass
class Read(HTMLParser):
    """What a browser would see of a page: its elements in order, its texts, and the data of its table."""

    elements: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)  # elements inside of pictures
    attributes: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    data: Any = None

    def __post_init__(self) -> None:
        self._depth = 0
        super().__init__(convert_charrefs=True)

    @classmethod
    def of(cls, html: str) -> Read:
        found = cls()
        found.feed(html)
        found.close()
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        (self.drawn if self._depth else self.elements).append(tag)
        self._depth += tag == "svg"
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "svg"

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] == ["script"] and self.data is None:
            self.data = json.loads(data)
        elif data.strip():
            self.texts.append(data.strip())

    def column(self, name: str) -> list[Any]:
        """Return one value of each row."""
        place = self.data["columns"].index(name)
        return [row[place] for row in self.data["rows"]]
