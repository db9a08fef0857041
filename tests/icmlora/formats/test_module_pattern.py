"""Keys of `rank_pattern` and `alpha_pattern`, matched as PEFT matches them, without Python's regular expressions."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import example, given, strategies as st

from icmlora.formats.peft.name_patterns import ModulePattern, NameExpression, PatternRefused, Steps, parse_pattern

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
def test_any_other_key_is_not_a_plain_name(key: str) -> None:
    assert ModulePattern.parse(key) is None


def peft_matches(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


CHARACTERS = st.sampled_from(
    ["a", "b", "0", "_", ".", r"\.", r"\d", r"\w", r"\D", "[ab]", "[^a]", "[0-9_-]", r"[^\d.]"]
)
QUANTIFIERS = st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{0,1}?"])
EXPRESSIONS = st.recursive(
    st.builds("".join, st.tuples(CHARACTERS, QUANTIFIERS)),
    lambda inner: st.one_of(
        st.builds("".join, st.lists(inner, max_size=4)),
        st.builds("({}){}".format, inner, QUANTIFIERS),
        st.builds("(?:{}|{}){}".format, inner, inner, QUANTIFIERS),
        st.builds("{}|{}".format, inner, inner),
        st.builds("(?P<n>^{})".format, CHARACTERS),
        st.builds("{}$".format, inner),
    ),
    max_leaves=8,
)
MODULES = st.text(alphabet="ab0_.", max_size=10)


@example(key="($)*", modules=["", "a"])
@example(key="a(^|$)+", modules=["a", "ab"])
@given(key=EXPRESSIONS, modules=st.lists(MODULES, min_size=1, max_size=8))
def test_an_expression_matches_exactly_what_peft_matches(key: str, modules: list[str]) -> None:
    try:
        wanted = [peft_matches(key, module) for module in modules]
    except re.error:  # two groups of one name
        return
    pattern = NameExpression(key, Steps())
    assert [pattern.matches(module) for module in modules] == wanted


@given(key=st.text(alphabet="ab.*+?()[]{}|^$\\dw0,1-:", max_size=12), module=MODULES)
def test_whatever_is_read_is_an_expression_that_python_reads_the_same_way(key: str, module: str) -> None:
    try:
        pattern = parse_pattern(key, Steps())
    except PatternRefused:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a meaning that is about to change is not one to rely on
        assert pattern.matches(module) == peft_matches(key, module)


@pytest.mark.parametrize(
    ("key", "module", "matches"),
    [
        (r".*\.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj", True),
        (r".*\.gate_up_proj", "model.layers.0.mlp.experts.down_proj", False),
        (r"layers\.[0-3]\..*q_proj", "model.layers.3.self_attn.q_proj", True),
        (r"layers\.[0-3]\..*q_proj", "model.layers.4.self_attn.q_proj", False),
        (r"layers\.(0|1|1[0-9])\.(self_attn|mlp)\.\w+", "model.layers.12.mlp.up_proj", True),
        (r"^model\.layers\.\d+\.mlp\..*$", "base.model.layers.1.mlp.up_proj", False),
        (r".*", "lm_head", True),
    ],
)
def test_expressions_that_people_write_are_read(key: str, module: str, matches: bool) -> None:
    assert parse_pattern(key, Steps()).matches(module) is matches


@pytest.mark.parametrize(
    "key",
    [
        *(
            "(?i)q",
            "(?=q)q",
            "(?!v).*q",
            r"(a)\1",
            "(?P=n)",
            r"\bq",
            r"\Aq",
            "a**",
            "a++",
            "a{3}{2}",
            "*a",
            "^*",
            "(a",
            "a)",
        ),
        *("[a", "[z-a]", r"[\d-x]", "[[:alpha:]]", "[a&&b]", "a{2,1}", r"\p{L}", "a\\"),
        *(
            "(" * 100 + ")" * 100,
            "a" * 600 + ".*",
            "(a|b)" * 90 + "{9}{9}",
        ),
    ],
)
def test_a_key_outside_the_subset_is_refused(key: str) -> None:
    with pytest.raises(PatternRefused):
        parse_pattern(key, Steps())


_NESTED = "((((a?){99}){99}){9}){9}b"


@pytest.mark.parametrize(
    "key", ["(a*)*b", "(a|a)*b", "(a|aa)+$b", "(.*a){12}b", "(a?){40}a{40}b", ".*.*.*.*.*b", _NESTED]
)
def test_a_key_that_keeps_a_backtracking_engine_busy_takes_a_moment(key: str) -> None:
    pattern, started = NameExpression(key, Steps()), time.process_time()
    for length in range(100, 110):
        assert not pattern.matches("a" * length)
    assert time.process_time() - started < 2


def test_a_key_that_takes_many_steps_for_each_of_many_names_is_given_up() -> None:
    pattern, started = NameExpression(_NESTED, Steps()), time.process_time()
    with pytest.raises(PatternRefused, match="too long"):
        [pattern.matches("a" * 200 + str(number)) for number in range(10_000)]
    assert time.process_time() - started < 10


def test_a_name_of_other_characters_matches_no_expression() -> None:
    assert not NameExpression(".*", Steps()).matches("a b")
