"""Values in the database: as few bytes as they need, and refused where they are not what icm wrote."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import sqlite

from registry.errors import DamagedStore
from registry.schema import DIGEST, MOMENT, PACKED, choice
from registry.store import Store
from registry.values import compact_json
from tests.registry.examples import ingest
from tests.registry.pairs import damage

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
DIALECT = sqlite.dialect()
RUNGS = choice("base", "code")


def through(column: Any, value: object) -> object:
    return column.process_result_value(column.process_bind_param(value, DIALECT), DIALECT)


@given(st.binary(min_size=32, max_size=32).map(bytes.hex))
def test_a_digest_takes_32_bytes_and_comes_back(digest: str) -> None:
    assert len(DIGEST.form.pack(digest)) == 32
    assert through(DIGEST, digest) == digest


@given(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)))
def test_a_time_comes_back_to_the_second(moment: datetime) -> None:
    text = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert through(MOMENT, text) == text


@given(JSON)
def test_a_json_value_comes_back(value: object) -> None:
    assert through(PACKED, value) == value


@pytest.mark.parametrize("word", ["base", "code"])
def test_a_word_is_a_number(word: str) -> None:
    assert isinstance(RUNGS.form.pack(word), int)
    assert through(RUNGS, word) == word


def test_an_unknown_word_is_not_written() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        RUNGS.form.pack("original")


@pytest.mark.parametrize("column", [DIGEST, MOMENT, PACKED, RUNGS])
def test_nothing_is_null(column: Any) -> None:
    assert through(column, None) is None


@given(JSON)
def test_json_is_written_so_that_it_reads_back(value: object) -> None:
    assert json.loads(compact_json(value)) == value


@given(st.dictionaries(st.text(), st.integers()))
def test_equal_values_are_equal_texts(value: dict[str, int]) -> None:
    assert compact_json(dict(reversed(value.items()))) == compact_json(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        compact_json({"x": value})


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE documents SET body = x'0102'",
        "UPDATE documents SET body = 'text'",
        "UPDATE blobs SET digest = 7",
        "UPDATE tasks SET created_at = 'yesterday'",
        "UPDATE tasks SET created_at = 1 << 60",
    ],
)
@pytest.mark.kept_in("sqlite", reason="columns of PostgreSQL take no values of other types")
def test_a_value_that_icm_did_not_write_is_damage(store: Store, statement: str) -> None:
    ingest(store, "rust")
    damage(store, f"{statement} WHERE id = 1")
    with pytest.raises(DamagedStore):
        list(store.tasks.summaries())
