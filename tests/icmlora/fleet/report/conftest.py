"""A real Chromium without a window, where there is one: Debian's packages `chromium` and `chromium-driver`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from icmlora.fleet.report.page import Page
from tests.icmlora.fleet.report.made_up import html_of

# It runs as root in a container, offers no page to the GPU, and asks nobody for anything.
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser, started once."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    # A folder of its own: the drivers of parallel runs must not share a profile.
    with tempfile.TemporaryDirectory(prefix="icm-chromium-", ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(driver)
        browser = webdriver.Chrome(options=options, service=service)
        try:
            yield browser
        finally:
            browser.quit()


@pytest.fixture
def visit(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a page; at the end, the browser must have complained of nothing and asked nobody."""
    opened: list[str] = []

    def call(page: Page | Path, *, width: int = 1280, dark: bool = False, place: str = "") -> Any:
        if isinstance(page, Page):
            path = tmp_path / f"page-{len(opened)}.html"
            path.write_text(html_of(page), encoding="utf-8")
            page = path
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        chromium.get("about:blank")
        chromium.get(f"{page.as_uri()}{place}")
        opened.append(page.as_uri())
        return chromium

    for kind in ("browser", "performance"):
        chromium.get_log(kind)  # what an earlier test left
    yield call
    assert [entry["message"] for entry in chromium.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own first page asks for things too.
    asked = [each["request"]["url"] for each in sent if each["documentURL"].startswith("file:")]
    assert opened
    outside = {url.partition("#")[0] for url in asked if not url.startswith("data:")}  # pictures in the page itself
    assert outside == set(opened)
