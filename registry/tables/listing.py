"""Selections of tasks as SQL, so that a fleet of thousands is filtered and sorted without being loaded.

Each field is one scalar subquery of a task: a statement computes only those that it filters or sorts by.
"""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, cast

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from registry.filters import Filter, Selection
from registry.names import UNKNOWN_BASE
from registry.records import Description
from registry.schema import Adapter, BaseLabel, BaseModel, Blob, Code, Document, Evaluation, Extra, Generator, Task

Expression = ColumnElement[Any]


def selected(session: Session, selection: Selection, without: Collection[int]) -> Sequence[int]:
    """Return the numbers of the selected tasks in the order asked for, `without` some that no limit counts."""
    if selection.filters or selection.sort is not None:
        _add_functions(session)
    found = select(Task.id)
    if selection.base_model is not None:
        number = select(BaseModel.id).where(BaseModel.name == selection.base_model).scalar_subquery()
        found = found.where(Task.base_model_id == number)
    found = found.where(*map(_condition, selection.filters))
    if without:
        numbers: BindParameter[int] = bindparam(None, list(without), expanding=True, literal_execute=True)
        found = found.where(Task.id.not_in(numbers))
    if (sort := selection.sort) is not None:
        value = _FIELDS[sort.field.name]()
        found = found.order_by(value.is_(None), value.desc() if sort.descending else value.asc())
    return session.scalars(found.order_by(Task.name).limit(selection.limit)).all()


def _condition(one: Filter) -> ColumnElement[bool]:
    if one.field.name == "base":
        return _base_condition(one)
    field, value = _FIELDS[one.field.name](), one.value
    if one.field.kind == "words" and one.operator != "~":
        # Words have a space on either side.
        has_word = func.instr(field, f" {value} ") > 0
        return has_word if one.operator == "=" else ~has_word
    match one.operator:
        case "~":
            return func.instr(field, value) > 0
        case "!=":
            return field.is_distinct_from(value)
        case "=":
            return field == value
        case _:
            return cast(ColumnElement[bool], field.op(one.operator, is_comparison=True)(literal(value)))


def _base_condition(one: Filter) -> ColumnElement[bool]:
    """Compare all names of a task's base model: one of them has to pass, or for `!=` all."""

    def passes(name: Expression) -> ColumnElement[bool]:
        return func.instr(name, one.value) > 0 if one.operator == "~" else name == one.value

    labels = select(BaseLabel.id).where(BaseLabel.base_model_id == Task.base_model_id).correlate(Task)
    found = or_(passes(_base()), labels.where(passes(func.icm_casefold(BaseLabel.label))).exists())
    return ~found if one.operator == "!=" else found


# What each field is, for the task of the row.


def _base() -> Expression:
    name = select(BaseModel.name).where(BaseModel.id == Task.base_model_id).scalar_subquery()
    return func.icm_casefold(name)


def _size() -> Expression:
    weights, config, card = aliased(Blob), aliased(Blob), aliased(Blob)
    size = select(weights.size + config.size + func.coalesce(card.size, 0)).select_from(Adapter)
    size = size.join(weights, weights.id == Adapter.weights_id).join(config, config.id == Adapter.config_id)
    return _final(size.outerjoin(card, card.id == Adapter.card_id)).scalar_subquery()


def _extras() -> Expression:
    size = select(func.coalesce(func.sum(Blob.size), 0)).select_from(Adapter)
    size = size.join(Extra, Extra.adapter_id == Adapter.id).join(Blob, Blob.id == Extra.blob_id)
    return _final(size).scalar_subquery()


def _code_size() -> Expression:
    code, residual = aliased(Blob), aliased(Blob)
    size = select(code.size + func.coalesce(residual.size, 0)).select_from(Code).join(code, code.id == Code.blob_id)
    return _current(size.outerjoin(residual, residual.id == Code.residual_id)).scalar_subquery()


def _error() -> Expression:
    squared = case((Code.residual_id.is_(None), Code.squared_error), else_=Code.residual_squared_error)
    return func.icm_root(_current(select(squared).select_from(Code)).scalar_subquery())


def _measured(column: InstrumentedAttribute[Any]) -> Expression:
    """Return a column of the measurement that has the retained gain."""
    source = Evaluation.rung.type
    better = case((Code.residual_id.is_(None), literal("code", source)), else_=literal("residual", source))
    found = select(column).select_from(Code)
    found = found.join(
        Evaluation, and_(Evaluation.task_id == Code.task_id, Evaluation.generator_id == Code.generator_id)
    )
    # As `evaluations.latest`: on the task's own text, else the latest on any; one with a gain if there is one.
    same = aliased(Task)  # SQLite cannot order by a column of the outer query
    found = found.where(Evaluation.rung == better).join(same, same.id == Code.task_id)
    own = func.coalesce(Evaluation.data_id == same.eval_id, 0)
    order = own.desc(), Evaluation.retained_gain.is_not(None).desc(), Evaluation.id.desc()
    return _current(found).order_by(*order).limit(1).scalar_subquery()


def _status() -> Expression:
    is_coded = _current(select(Code.id).select_from(Code)).exists()
    states: dict[str, Expression] = {
        "evicted": _of_final(Adapter.evicted_at).is_not(None),
        "pinned": Task.pinned.is_(True),
        "coded": is_coded,
        "original-only": or_(_described("original_only").is_not(None), _base() == UNKNOWN_BASE),
        "does-nothing": _described("does_nothing").is_(True),
        "generated": _of_final(Adapter.is_generated).is_(True),
    }
    text: Expression = literal(" ")
    for word, holds in states.items():
        text = text.concat(case((holds, f"{word} "), else_=""))
    return text


_FIELDS: dict[str, Callable[[], Expression]] = {
    "name": lambda: func.icm_casefold(Task.name),
    "base": _base,
    "rank": lambda: _described("rank_max"),
    "size": _size,
    "code": _code_size,
    "extras": _extras,
    # Of what the task decodes to: code and residual, or the code.
    "gain": lambda: _measured(Evaluation.retained_gain),
    "error": _error,
    "tag": lambda: func.lower(literal(" ").concat(func.coalesce(Task.tags.cast(String), "")).concat(" ")),
    "status": _status,
    "source": lambda: func.icm_casefold(func.coalesce(_of_final(Adapter.source), Task.folder)),
    "note": lambda: func.icm_casefold(func.coalesce(Task.note, "")),
}


def _final(statement: Select[Any]) -> Select[Any]:
    """Restrict a statement about adapters to the final one of the row's task."""
    return statement.where(Adapter.task_id == Task.id, Adapter.is_final).correlate(Task)


def _of_final(column: InstrumentedAttribute[Any]) -> Expression:
    return _final(select(column)).scalar_subquery()


def _described(name: str) -> Expression:
    """Return a field of the final adapter's description, which is JSON that SQLite cannot read."""
    body = _final(select(Document.body).select_from(Adapter).join(Document, Document.id == Adapter.description_id))
    return func.icm_described(body.scalar_subquery(), Description._fields.index(name), type_=Integer)


def _current(statement: Select[Any]) -> Select[Any]:
    """Restrict a statement about codes to the one of the row's task under the current generator."""
    is_current = exists().where(Generator.id == Code.generator_id, Generator.is_current)
    return statement.where(Code.task_id == Task.id, is_current).correlate(Task)


# Functions that SQLite lacks: `lower` knows ASCII only, and roots are an option of its build.


def _add_functions(session: Session) -> None:
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, sqlite3.Connection)
    functions: dict[str, tuple[int, Callable[..., Any]]] = {
        "icm_casefold": (1, lambda text: None if text is None else text.casefold()),
        "icm_root": (1, lambda value: None if value is None else math.sqrt(max(value, 0.0))),
        "icm_described": (2, _field_of),
    }
    for name, (arguments, function) in functions.items():
        connection.create_function(name, arguments, function, deterministic=True)


def _field_of(body: bytes | None, place: int) -> Any:
    if body is None:
        return None
    values = _unpacked(body)
    return values[place] if place < len(values) else None


# Most tasks share their description with others.
@lru_cache(maxsize=256)
def _unpacked(body: bytes) -> list[Any]:
    # Lists, such as the layout of a thousand modules, are no value of SQL.
    return [None if isinstance(value, list) else value for value in json.loads(zlib.decompress(body))]
