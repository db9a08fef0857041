"""The rule for names holds for every text: what may name a task, how a text is shown, how names are sorted."""

from __future__ import annotations

import string
import unicodedata

import pytest
from hypothesis import assume, given, strategies as st

from registry.errors import InvalidName
from registry.names import MAX_NAME, check_name, escape, is_module_name, natural_key, task_name_problem
from registry.store import Store
from tests.registry.examples import ingest

PLAIN = string.ascii_letters + string.digits
NAMES = st.builds(
    str.__add__, st.sampled_from(PLAIN), st.text(PLAIN + "._-", max_size=MAX_NAME - 1)
)  # fmt: skip
WINDOWS = st.sampled_from(["con", "prn", "aux", "nul", "com1", "com9", "lpt1", "lpt9"])


@given(NAMES)
def test_every_text_within_the_rule_names_a_task_unless_windows_reserves_it(name: str) -> None:
    problem = task_name_problem(name)
    assert problem in (None, "the name is reserved by Windows")
    if problem is None:
        assert check_name(name) is name


@given(WINDOWS, st.text(PLAIN, max_size=5), st.booleans(), st.booleans())
def test_a_device_of_windows_is_refused_with_any_extension_and_in_any_case(
    device: str, rest: str, dotted: bool, upper: bool
) -> None:
    device = device.upper() if upper else device
    refused = task_name_problem(f"{device}.{rest}" if dotted else device)
    assert refused == "the name is reserved by Windows"
    if rest and not dotted:
        assume(not rest[0].isdigit())
        assert task_name_problem(device + rest) is None


@given(st.text(min_size=1))
def test_a_refusal_shows_the_name_without_its_control_characters(name: str) -> None:
    assume(task_name_problem(name) is not None)
    with pytest.raises(InvalidName) as caught:
        check_name(name)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 10 * MAX_NAME + 200
    assert caught.value.hint == "choose another name"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "the name is empty"),
        ("x" * 129, "the name has 129 characters, more than 128"),
        ("e\u0301", "the name is not in Unicode's composed form (NFC)"),
        ("-x", "a name has letters, digits (of any script), '.', '_' and '-', and starts with a letter or digit"),
        ("\u732b" * 65, "the name takes 195 bytes, more than 192"),
    ],
)
def test_each_problem_is_said_in_words(name: str, problem: str) -> None:
    assert task_name_problem(name) == problem


@given(st.text(), st.integers(1, 40))
def test_a_shown_text_is_cut_before_it_is_written_out(text: str, limit: int) -> None:
    shown = escape(text, limit)
    assert shown.isprintable()
    if len(text) <= limit:
        assert shown == escape(text)
    else:
        assert shown == escape(text[: limit - 1]) + "…"


@given(st.text())
def test_what_is_shown_once_is_shown_the_same_again(text: str) -> None:
    assert escape(escape(text)) == escape(text)


@given(st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Cs"]), min_size=1))
def test_every_character_that_moves_or_hides_is_written_as_its_code_point(text: str) -> None:
    shown = escape(text)
    assert shown.isascii()
    assert [int(part[1:], 16) for part in shown.split("\\")[1:]] == [ord(char) for char in text]
    assert not any(unicodedata.category(char).startswith("C") for char in shown)


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_numbered_layers_are_sorted_by_their_number(numbers: list[int]) -> None:
    names = [f"layers.{number}.q_proj" for number in numbers]
    assert sorted(names, key=natural_key) == [f"layers.{number}.q_proj" for number in sorted(numbers)]


@given(st.lists(st.text(), max_size=8))
def test_any_names_have_an_order_that_does_not_depend_on_where_they_began(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


@given(st.lists(st.text(PLAIN + "_", min_size=1), min_size=1))
def test_identifiers_with_dots_between_them_are_a_module_name(parts: list[str]) -> None:
    assert is_module_name(".".join(parts))
    assert not is_module_name(".".join(["", *parts]))
    assert not is_module_name(".".join([*parts, ""]))
    assert not is_module_name("/".join([*parts, "x"]))


@pytest.mark.parametrize("name", ["a" * 128, "0", "A.b_c-D", "console.txt", "Über-猫", "ДОМ"])
def test_a_name_at_the_edge_of_the_rule_is_stored_and_found_in_any_case(store: Store, name: str) -> None:
    ingest(store, name)
    assert store.task(name.swapcase()).name == name
