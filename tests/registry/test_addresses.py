"""Addresses of stores in user spelling; displayed ones have no credentials."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, strategies as st

from registry.errors import NotAStore
from registry.names import DatabaseUrl, absolute, address_of

words = st.text("abcxyz0189/?#!$&'()*+,;=-._~@:", min_size=1, max_size=12)


@pytest.mark.parametrize(
    "text", ["postgresql://host/fleet", "postgres://host/fleet", "postgresql+psycopg://host/fleet"]
)
def test_the_ways_to_write_a_database_mean_the_same(text: str) -> None:
    assert address_of(text) == DatabaseUrl("postgresql://host/fleet")


@pytest.mark.parametrize("text", ["store", "./a:b", "/a/postgresql:x", "~/icm", "C:/loras"])
def test_what_has_no_scheme_is_a_folder(text: str) -> None:
    assert address_of(text) == Path(text)


@pytest.mark.parametrize("text", ["s3://bucket/prefix", "mysql://me:secret@host/x", "https://host/store"])
def test_an_address_of_something_else_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(NotAStore, match="is not a valid store address") as refused:
        address_of(text)
    assert "secret" not in str(refused.value)


@given(user=words, password=words)
def test_a_user_and_a_password_are_never_shown(user: str, password: str) -> None:
    for text in (
        f"postgresql://{user}:{password}@host/fleet",  # as people write it, although some of these are to be quoted
        f"postgresql://{quote(user, safe='')}:{quote(password, safe='')}@host:5432/fleet?sslmode=require",
        f"postgresql://host/fleet?user={quote(user, safe='')}&password={quote(password, safe='')}&sslmode=require",
    ):
        url = address_of(text)
        assert isinstance(url, DatabaseUrl)
        shown = {str(url), f"{url}", absolute(url), repr(url)}
        expected = {"postgresql://host/fleet", "postgresql://host:5432/fleet?sslmode=require"}
        assert shown <= {*expected, "postgresql://host/fleet?sslmode=require", "DatabaseUrl()"}
