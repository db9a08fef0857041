"""The page in a real browser: the table, the pictures, the keyboard, paper, and text that wants to be more than text.

The fixture `visit` also checks, after each test, that the console is empty and that nothing was requested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from icmlora import Fleet
from icmlora.io.text import escape, human_size
from tests.icmlora.fleet.report.made_up import Made, html_of, page_of
from tests.icmlora.fleet.report.test_page import HOSTILE

pytestmark = pytest.mark.browser
Visit = Callable[..., Any]

FLEET = [
    Made("apples", "acme/one", ("fruit",), code=30_000, gain=0.99),
    Made("pears", "acme/one", ("fruit", "prod"), note="a green one", code=20_000, gain=0.91),
    Made("ships", "acme/one", code=None),
    Made("trains-2", "acme/two", code=50_000, gain=0.95),
    Made("trains-10", "acme/two", ("prod",), code=10_000, gain=0.97),
    Made("rails", "acme/two", code=40_000, gain=None),
]
NAMES = ["apples", "pears", "rails", "ships", "trains-2", "trains-10"]


def texts(browser: Any, selector: str) -> list[str]:
    return list(
        browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)
    )


def names(browser: Any) -> list[str]:
    return texts(browser, ".tasks tr.row th")


def click(browser: Any, selector: str) -> None:
    browser.find_element("css selector", selector).click()


def sort_by(browser: Any, column: str) -> str:
    click(browser, f'.tasks th[data-name="{column}"] button')
    return str(browser.find_element("css selector", f'.tasks th[data-name="{column}"]').get_attribute("aria-sort"))


def search(browser: Any, text: str) -> None:
    field = browser.find_element("css selector", "[name=q]")
    field.clear()
    field.send_keys(text)


def test_a_page_of_a_real_store_shows_its_tasks(learned: Fleet, tmp_path: Path, visit: Visit) -> None:
    learned.report(tmp_path / "fleet.html", outputs=["ships"], max_new_tokens=4, device="cpu")
    browser = visit(tmp_path / "fleet.html")
    assert names(browser) == ["apples", "ships", "trains"]
    assert texts(browser, ".map [data-row]") != []
    assert texts(browser, ".answers h5")[:3] != []


def test_tasks_are_sorted_by_name_as_people_count(visit: Visit) -> None:
    assert names(visit(page_of(FLEET))) == NAMES


def test_a_heading_sorts_by_bytes_and_again_the_other_way(visit: Visit) -> None:
    browser = visit(page_of(FLEET))
    assert sort_by(browser, "size") == "descending"
    assert names(browser) == ["trains-2", "rails", "apples", "pears", "trains-10", "ships"]
    assert sort_by(browser, "size") == "ascending"
    assert names(browser) == ["trains-10", "pears", "apples", "rails", "trains-2", "ships"]


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("column", "first"),
    [("gain", "apples"), ("name", "trains-10"), ("base", "apples"), ("tags", "apples"), ("kept", "apples")],
)
def test_every_kind_of_column_can_be_sorted(visit: Visit, column: str, first: str) -> None:
    browser = visit(page_of(FLEET))
    sort_by(browser, column)
    assert names(browser)[0] == first


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("TRAINS", ["trains-2", "trains-10"]),
        ("green", ["pears"]),
        ("prod two", ["trains-10"]),
        ("nothing at all", []),
    ],
)
def test_a_search_looks_into_names_tags_notes_and_base_models(visit: Visit, words: str, found: list[str]) -> None:
    browser = visit(page_of(FLEET))
    search(browser, words)
    assert names(browser) == found
    said = texts(browser, ".count")[0]
    assert said.startswith(f"{len(found)} of 6 tasks" if found else "No task matches")


def test_what_is_searched_and_sorted_is_in_the_address(visit: Visit, tmp_path: Path) -> None:
    browser = visit(page_of(FLEET))
    search(browser, "trains")
    sort_by(browser, "size")
    address = browser.current_url
    assert address.endswith("#q=trains&sort=size%3Adesc")
    browser.get("about:blank")
    browser.get(address)
    assert names(browser) == ["trains-2", "trains-10"]
    assert browser.find_element("css selector", "[name=q]").get_attribute("value") == "trains"
    click(browser, "[type=reset]")
    assert len(names(browser)) == 6


@pytest.mark.slow
def test_an_address_that_nobody_wrote_here_is_no_harm(visit: Visit) -> None:
    browser = visit(page_of(FLEET), place="#sort=nonsense&page=-7&base=nobody&task=%3Cscript%3E&more=1")
    assert names(browser) == []
    click(browser, "[type=reset]")
    assert names(browser) == NAMES


def test_filters_choose_a_base_model_and_a_tag(visit: Visit) -> None:
    browser = visit(page_of(FLEET))
    click(browser, '[name=base] option[value="acme/two"]')
    assert names(browser) == ["rails", "trains-2", "trains-10"]
    click(browser, ".tasks .tag")
    assert names(browser) == ["trains-10"]


def test_a_row_opens_with_more_about_its_task(visit: Visit) -> None:
    browser = visit(page_of(FLEET))
    click(browser, '.tasks [data-row="1"] button')
    facts = dict(zip(texts(browser, ".more dt"), texts(browser, ".more dd"), strict=True))
    assert (facts["Note"], facts["Code"], facts["Base model"]) == ("a green one", "19.5 KiB", "acme/one")
    assert browser.switch_to.active_element.text == "pears"
    click(browser, '.tasks [data-row="1"] button')
    assert texts(browser, ".more") == []


def test_a_point_of_the_map_tells_of_its_task_and_leads_to_its_row(visit: Visit) -> None:
    from selenium.webdriver import ActionChains

    browser = visit(page_of(FLEET), place="#q=rails")
    point = browser.find_element("css selector", '.map [data-row="5"]')
    ActionChains(browser).scroll_to_element(point).move_to_element(point).perform()
    told = browser.execute_script("return arguments[0].closest('figure').querySelector('.told').textContent", point)
    assert told.startswith("trains-10, original + code, 976.6 KiB, replaced by 11.2 KiB")
    assert texts(browser, ".rate circle.code.near title")[0].startswith("trains-10")
    ActionChains(browser).click(point).perform()
    assert texts(browser, ".tasks tr.near th") == ["trains-10"]
    assert browser.switch_to.active_element.text == "trains-10"
    assert browser.find_element("css selector", "[name=q]").get_attribute("value") == ""


def test_points_are_reached_and_opened_with_the_keyboard(visit: Visit) -> None:
    from selenium.webdriver import Keys

    browser = visit(page_of(FLEET))
    assert len(browser.find_elements("css selector", '.rate [tabindex="0"]')) == 1
    browser.execute_script("document.querySelector('.rate [tabindex=\"0\"]').focus()")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    row = browser.switch_to.active_element.get_attribute("data-row")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.text == NAMES[int(row)]
    assert texts(browser, ".more") != []


@pytest.mark.slow
def test_the_row_under_the_pointer_shows_its_points(visit: Visit) -> None:
    from selenium.webdriver import ActionChains

    browser = visit(page_of(FLEET))
    row = browser.find_element("css selector", '.tasks [data-row="4"] td')
    ActionChains(browser).move_to_element(row).perform()
    assert {marker.get_attribute("data-row") for marker in browser.find_elements("css selector", "svg .near")} == {"4"}


def test_hostile_text_is_shown_and_does_nothing(visit: Visit) -> None:
    made = [Made(text, f"base {text}", (text,), text, (text,)) for text in HOSTILE]
    made += [Made(f"plain-{number}", made[0].base_model) for number in range(3)]
    for place in ("", "#task=__proto__"):
        browser = visit(page_of(made, texts=(HOSTILE[0], HOSTILE[4], HOSTILE[8]), failure=HOSTILE[1]), place=place)
        assert {escape(text) for text in HOSTILE} <= set(names(browser))
        assert browser.execute_script("return document.scripts.length") == 2
        assert browser.find_elements("css selector", "img") == []
        search(browser, "onerror")
        assert names(browser) == [escape(HOSTILE[8])]
        click(browser, ".tasks tr.row button")
        assert texts(browser, ".more .long dd") == [escape(HOSTILE[8])]


def test_the_browser_refuses_what_somebody_writes_into_the_page(visit: Visit, tmp_path: Path) -> None:
    added = "<script>window.ran = 1</script><style>body { color: red }</style>"
    (tmp_path / "changed.html").write_text(html_of(page_of(FLEET)).replace("</main>", f"{added}</main>"))
    browser = visit(tmp_path / "changed.html")
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert [word for word in ("script-src", "style-src") if not any(word in text for text in refused)] == []
    assert browser.execute_script("return window.ran") is None
    assert names(browser) == NAMES


@pytest.mark.slow
def test_sizes_are_those_that_every_command_prints(visit: Visit) -> None:
    sizes = [1, 17, 1023, 1024, 1280, 1281, 1792, 10_188, 1_047_000, 1_048_524, 1_048_525, 3 * 2**40, 2**50 + 1]
    sizes += [2**10 * n // 20 for n in range(21, 200, 2)]
    made = [Made(f"task-{number:03}", original=size) for number, size in enumerate(sizes)]
    browser = visit(page_of(made, with_map=False))
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")  # all rows at once
    place = texts(browser, ".tasks thead th").index("Original")
    assert texts(browser, f".tasks tr.row > :nth-child({place + 1})") == [human_size(size) for size in sizes]


@pytest.mark.slow
def test_ten_thousand_tasks_are_shown_a_page_at_a_time(visit: Visit) -> None:
    made = [
        Made(f"task-{number}", code=10_000 + 7919 * number % 10_000, tags=(f"t{number % 9}",))
        for number in range(10_000)
    ]
    browser = visit(page_of(made, with_map=False))
    assert (len(names(browser)), texts(browser, ".pages span")) == (50, ["Page 1 of 200"])
    click(browser, '.pages [data-step="1"]')
    assert names(browser)[0] == "task-50"
    sort_by(browser, "size")
    best = sorted(made, key=lambda task: (-(task.code or 0), int(task.name[5:])))
    assert names(browser) == [task.name for task in best[:50]]
    search(browser, "task-777")
    assert len(names(browser)) == 11
    assert texts(browser, ".count")[0].startswith("11 of 10,000 tasks")


def test_a_store_without_tasks_has_a_page(visit: Visit) -> None:
    browser = visit(page_of([]))
    assert "Empty store" in texts(browser, "h1")


@pytest.mark.one_case
@pytest.mark.parametrize("width", [400, 800, 1280])
def test_no_width_makes_the_page_itself_scroll_sideways(visit: Visit, width: int) -> None:
    long = replace(FLEET[0], name="a" * 128, base_model="/very/long/" * 20, note="n" * 4000)
    browser = visit(page_of([*FLEET, long], texts=("w" * 300, "a" * 300, "b " * 300)), width=width)
    click(browser, ".tasks tr.row button")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_light_and_dark_follow_the_browser(visit: Visit) -> None:
    ask = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    light, dark = (visit(page_of(FLEET), dark=dark).execute_script(ask) for dark in (False, True))
    assert (light[0], dark[0]) == ("rgb(255, 255, 255)", "rgb(13, 17, 23)")
    assert light[1] != dark[1]


def test_paper_gets_every_row_and_no_controls(visit: Visit) -> None:
    made = [Made(f"task-{number}") for number in range(120)]
    browser = visit(page_of(made, with_map=False))
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert len(names(browser)) == 120
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.find_element("css selector", ".search").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert len(names(browser)) == 50


def test_every_control_has_a_name(visit: Visit) -> None:
    browser = visit(page_of(FLEET, texts=("p", "a", "b")))
    browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [node for node in nodes if node["role"]["value"] in ("button", "combobox", "searchbox", "link", "table")]
    assert len(controls) > 20
    unnamed = [node for node in controls if not node["name"]["value"].strip() and node["role"]["value"] != "table"]
    assert unnamed == []


@pytest.mark.one_case
@pytest.mark.parametrize("width", [400, 1280])
def test_pictures_are_shown_side_by_side_at_any_width(visit: Visit, width: int) -> None:
    browser = visit(page_of(FLEET, drawing=True), width=width)
    script = "return [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().top])"
    images = browser.execute_script(script)
    assert [size for size, _ in images] == [512] * 6
    assert len({top for _, top in images[:3]}) == 1
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
