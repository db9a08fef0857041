"""Where two texts differ."""

from hypothesis import given, strategies as st

from icmlora.fleet.report.outputs import differing

texts = st.text(alphabet="ab c.\n漢", max_size=40)


@given(texts, texts)
def test_parts_make_up_the_texts_and_the_rest_is_common(one: str, other: str) -> None:
    first, second = differing(one, other)
    assert ("".join(part.text for part in first), "".join(part.text for part in second)) == (one, other)
    common = ["".join(part.text for part in parts if not part.differs) for parts in (first, second)]
    assert common[0] == common[1]


@given(texts)
def test_equal_texts_have_no_differing_part(text: str) -> None:
    assert not any(part.differs for parts in differing(text, text) for part in parts)


def test_a_word_is_marked_as_a_whole() -> None:
    first, second = differing("the cat sat", "the car sat")
    assert [part.text for part in first if part.differs] == ["cat"]
    assert [part.text for part in second if part.differs] == ["car"]
