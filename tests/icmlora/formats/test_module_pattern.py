"""Keys of `rank_pattern` and `alpha_pattern`, matched as PEFT does without running a regular expression."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icmlora.formats.peft_config import ModulePattern

NAMES = st.text(alphabet="ab.0_", min_size=1, max_size=8)


@given(key=st.builds("".join, st.tuples(st.sampled_from(["", "^"]), NAMES)), module=NAMES)
def test_a_plain_pattern_matches_exactly_what_peft_matches(key: str, module: str) -> None:
    pattern = ModulePattern.parse(key)
    assert pattern is not None
    assert pattern.matches(module) == bool(re.match(rf"(.*\.)?({key})$", module))


def test_an_escaped_dot_matches_only_a_dot() -> None:
    pattern = ModulePattern.parse(r"layers\.0\.q")
    assert pattern is not None
    assert pattern.matches("model.layers.0.q")
    assert not pattern.matches("model.layersx0.q")


@pytest.mark.parametrize("key", ["", "(a|a)*b", "q.*", "a|b", "a$", "[ab]", "a+", "q_proj\n", "a\\d", "^"])
def test_any_other_regular_expression_is_not_taken(key: str) -> None:
    assert ModulePattern.parse(key) is None
