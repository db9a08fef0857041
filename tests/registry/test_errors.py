"""Errors travel between processes as they are."""

from __future__ import annotations

import pickle

import pytest

from icmlora.errors import AdapterRefused
from registry.errors import IcmError, SourceRefused, StoreLocked, TaskConflict, TaskNotFound


@pytest.mark.parametrize(
    "error",
    [
        StoreLocked("in use", path="/store/lock", hint="wait"),
        TaskNotFound("poem", ("poems",)),
        TaskConflict("poems", choices=None),
        SourceRefused("too long", reason="limits", path="/samples.jsonl"),
        AdapterRefused("no", kind="dora", hint="train a LoRA"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_was_pickled_says_the_same(error: IcmError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
