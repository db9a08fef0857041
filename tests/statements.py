"""SQL that is compiled once for all stores of a session: each test has a store, but their statements are the same.

An engine of SQLAlchemy keeps what it compiled, by dialect and statement ("SQL Compilation Caching" in its
documentation). Compiling takes longer than running on a store as small as these.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sqlalchemy import Engine

from registry.storage import sqlite

_made = sqlite._engine.__wrapped__
_first: list[Engine] = []


def share_statements() -> None:
    """Let the engines of all stores have one dialect and one cache."""
    sqlite._engine = lru_cache(maxsize=16)(_sharing)


def forget_statements() -> None:
    """Let engines that are made from now on compile again."""
    _first.clear()
    sqlite._engine.cache_clear()


def _sharing(*arguments: Any, **options: Any) -> Engine:
    engine: Engine = _made(*arguments, **options)
    if not _first:
        _first.append(engine)
    engine.dialect, engine._compiled_cache = _first[0].dialect, _first[0]._compiled_cache
    return engine
