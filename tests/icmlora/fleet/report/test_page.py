"""The page: well-formed whatever is in the store, closed to everything else, and the same each time."""

import base64
import hashlib
import re
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from icmlora.fleet.report.page import shown_text
from icmlora.io.text import escape
from tests.icmlora.fleet.report.made_up import Made, Read, html_of, page_of

FLEET = [Made("apples", tags=("fruit",)), Made("pears", tags=("fruit", "prod"), note="green"), Made("ships")]
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "-->",
    "</style>",
    "</title>",
    "</text></svg>",
    "{{ 7 * 7 }}{% raw %}",
    "\"'><img src=x onerror=alert(1)>",
    "&lt;&amp;&#60;",
    "javascript:alert(1)",
    "\u2028\u2029",
    "\u202etxt.exe",
    "\x1b[31m",
    "\x00",
    "\\u003c/script>",
    "__proto__",
    "ü 漢字 🐟",
)
DRAWN = {"title", "style", "rect", "text", "path", "line", "g", "circle"}
texts = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=30),
    st.lists(st.sampled_from(HOSTILE), min_size=2, max_size=3).map("".join),
).filter(lambda text: text.encode("utf-8", "replace").decode() == text and text.strip() != "")


def structure(html: str) -> list[str]:
    """Return the elements of a page in order, without pictures; sentences may set words in <code>."""
    return [name for name in Read.of(html).elements if name != "code"]


def fleet_with(name: str, base: str, tag: str, note: str, target: str, reason: str) -> list[Made]:
    first = Made(name, base, (tag,), note, (target,))
    return [
        first,
        *(Made(f"task-{number}", base) for number in range(3)),
        Made("other", base, original_only=reason, code=None),
    ]


@pytest.mark.slow
@given(texts, texts, texts, texts, texts, texts, texts, texts)
def test_no_text_of_a_store_changes_what_the_page_is_made_of(
    name: str, base: str, tag: str, note: str, target: str, reason: str, one: str, other: str
) -> None:
    plain = fleet_with("a", "b", "c", "d", "e", "f")
    hostile = fleet_with(name, base, tag, note, target, reason)
    page, same = (page_of(made, texts=("prompt", "x", "y"), failure="why") for made in (hostile, plain))
    written = page_of(hostile, texts=(one, other, one + other), failure=other)
    html = html_of(page)
    assert structure(html) == structure(html_of(same))
    assert set(Read.of(html).drawn) <= DRAWN
    assert Read.of(html).attributes <= Read.of(html_of(same)).attributes | {"x1", "x2", "y1", "y2"}  # lines to labels
    assert set(structure(html_of(written))) <= {*structure(html), "small"}
    assert not {"\x00", "\x1b", "\u202e", "\u2028", "\u2029"} & set(html + html_of(written))


@given(texts, texts, texts, texts)
def test_the_table_has_every_text_as_it_was(name: str, base: str, tag: str, note: str) -> None:
    tag = "_".join(tag.split())  # a tag is one word
    read = Read.of(html_of(page_of(fleet_with(name, base, tag, note, "q_proj", "why"))))
    row = read.column("name").index(escape(name))
    assert read.data["lists"]["base"] == [escape(base)]
    assert [read.data["lists"]["tags"][tag] for tag in read.column("tags")[row]] == [escape(tag)]
    assert read.column("note")[row].replace("\n", "") == escape(note.replace("\n", ""))


def test_only_what_the_policy_names_could_run() -> None:
    html = html_of(page_of(FLEET))
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    allowed = dict(part.split(" ", 1) for part in policy.replace("&#39;", "'").split("; "))
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert allowed["default-src"] == "'none'"
    assert [digest(script) for script in scripts] == allowed["script-src"].split()
    assert {digest(style) for style in styles} == set(allowed["style-src"].split())
    assert not re.search(r"\s(on\w+|style)=", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_nothing_on_the_page_points_outside_of_it() -> None:
    html = html_of(page_of(FLEET, texts=("p", "a", "b")))
    places = re.findall(r'(?:href|src|action|xlink:href)="([^"]*)"', html)
    assert places
    assert all(place.startswith("#") or place == "data:," for place in places)
    assert "url(" not in html
    assert "@import" not in html


def test_every_link_leads_to_a_part_of_the_page() -> None:
    html = html_of(page_of(FLEET, texts=("p", "a", "b")))
    targets = re.findall(r'href="#([^"]+)"', html)
    assert set(targets) <= set(re.findall(r'id="([^"]+)"', html))
    assert len(set(re.findall(r'id="([^"]+)"', html))) == len(re.findall(r'id="([^"]+)"', html))


def test_the_same_facts_give_the_same_bytes() -> None:
    assert html_of(page_of(FLEET)) == html_of(page_of(list(FLEET)))


def test_an_empty_store_has_a_page_that_says_what_to_do() -> None:
    html = html_of(page_of([]))
    read = Read.of(html)
    assert "icm ingest PATH" in read.texts
    assert ("table" in read.elements, "script" in read.elements, "svg" in read.elements) == (True, False, False)


def test_a_large_fleet_is_rows_of_data_and_two_paths() -> None:
    made = [Made(f"task-{number}", gain=0.9 + number % 100 / 1000, code=10_000 + number) for number in range(2000)]
    html = html_of(page_of(made, with_map=False))
    read = Read.of(html)
    assert len(read.column("name")) == 2000
    assert (read.drawn.count("circle"), read.drawn.count("path"), read.elements.count("tr")) == (0, 2, 6)
    assert len(html) < 1_000_000


def test_both_grounds_and_paper_have_colours_of_their_own() -> None:
    html = html_of(page_of(FLEET))
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert "@media print" in html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\r\nb\tc", "a\nb\tc"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\u202eabc\x07", "\\u202eabc\\x07"),
    ],
)
def test_a_longer_text_keeps_its_lines_and_joiners_only(text: str, shown: str) -> None:
    assert shown_text(text) == shown


def test_parts_that_differ_are_marked_and_equal_texts_are_called_so() -> None:
    differs = html_of(page_of(FLEET, texts=("p", "one two three", "one 2 three")))
    assert differs.count("<mark>two</mark>") == differs.count("<mark>2</mark>") == 1
    assert "same as the original" not in differs
    assert "same as the original" in html_of(page_of(FLEET, texts=("p", "one", "one")))


def test_a_task_that_misses_its_limits_is_counted_in_words() -> None:
    html = html_of(page_of([*FLEET, replace(FLEET[0], name="plums", gain=0.2)]))
    assert "1 task keeps its original: no code meets relative error at most 0.1." in html


def test_pictures_are_in_the_page_with_what_they_show() -> None:
    html = html_of(page_of(FLEET, drawing=True))
    pictures = re.findall(r'<img src="([^"]*)" alt="([^"]*)">', html)
    assert all(source.startswith("data:image/webp;base64,") for source, _ in pictures)
    assert [text for _, text in pictures][:3] == [
        f"ships: {source}, prompt 1, seed 0" for source in ("base model", "original", "code")
    ]
    assert len(pictures) == 6


def test_the_distance_of_a_code_stands_next_to_that_of_two_seeds() -> None:
    words = " ".join(Read.of(html_of(page_of(FLEET, drawing=True))).texts).split()
    assert "code to original 0.020 , two seeds of the original 0.250" in " ".join(words)


def test_a_page_of_texts_says_nothing_of_pictures_and_the_other_way_round() -> None:
    written, drawn = (html_of(page_of(FLEET, **kind)) for kind in ({"texts": ("p", "a", "b")}, {"drawing": True}))
    assert ("greedy decoding" in written, "the same prompts and seeds" in written) == (True, False)
    assert ("greedy decoding" in drawn, "the same prompts and seeds" in drawn) == (False, True)


def test_errors_of_kinds_of_modules_are_a_table() -> None:
    texts = Read.of(html_of(page_of(FLEET, drawing=True))).texts
    place = texts.index("attention")
    assert texts[place : place + 4] == ["attention", "3", "90.0%", "0.310"]


def test_hostile_text_next_to_pictures_adds_no_element() -> None:
    hostile = page_of([replace(FLEET[0], name=HOSTILE[8])], texts=(HOSTILE[0], "x", "y"), drawing=True)
    plain = page_of([FLEET[0]], texts=("prompt", "x", "y"), drawing=True)
    assert structure(html_of(hostile)) == structure(html_of(plain))
