"""The commands of docs/guides/serving.md and gateway.md, as they are printed, against a stand-in for the engine."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from icmlora.serving.folders import AdapterFolders
from icmlora.serving.gateway.settings import GatewaySettings
from icmlora.serving.tasks import open_tasks
from tests.cli.conftest import Ran
from tests.docs.pages import ROOT
from tests.icmlora.serving.gateway.gateways import running_gateway
from tests.icmlora.serving.gateway.stub_engine import StubEngine, running
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
PAGES = {name: (ROOT / "docs" / "guides" / name).read_text(encoding="utf-8") for name in ("serving.md", "gateway.md")}


def printed(page: str, command: str) -> list[str]:
    """Return the lines that a page shows below a command."""
    return re.split(r"\n(?=\$|```)", PAGES[page].split(f"$ {command}", 1)[1])[0].splitlines()[1:]


def words(line: str) -> list[str]:
    """Return what of a line is the same for every store: programs and options."""
    return [re.sub("=.*", "=", word) for word in shlex.split(line) if not re.search(r"/|^\d+$", word)]


@pytest.mark.parametrize(
    ("page", "command"),
    [("serving.md", "icm serve --print-config vllm"), ("gateway.md", "icm serve --print-config vllm --gateway")],
)
def test_print_config_prints_what_the_page_shows(icm: Icm, trained: Path, page: str, command: str) -> None:
    found = [line for line in icm(*command.split()[1:]).out.splitlines() if "ICM_BASE_MODEL" not in line]
    found = [line.replace(f" --served-model-name {LABEL}", "") for line in found]  # the tiny model has a path instead
    assert [words(line) for line in found] == [words(line) for line in printed(page, command)]


@pytest.fixture
def address(trained: Path, tmp_path: Path) -> Iterator[str]:
    """A gateway that has the task of the pages."""
    engine, folders = StubEngine(model=LABEL), AdapterFolders(tmp_path / "adapters", alone=True)
    with (
        running(engine) as url,
        running_gateway(open_tasks(trained, None, command="test"), folders, GatewaySettings(engine_url=url)) as address,
    ):
        yield address.removeprefix("http://")
    assert engine.headers["content-type"] == "application/json", "engines refuse any other"
    assert engine.adapters.keys() == {"shakespeare"}
    folders.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("page", PAGES)
def test_the_request_of_the_page_is_answered(icm: Icm, trained: Path, address: str, page: str) -> None:
    icm("edit", "poems", "--name", "shakespeare")
    (request,) = re.findall(r"^\$ (curl .*?)(?=\n[`$])", PAGES[page], re.MULTILINE | re.DOTALL)
    here = re.sub(r"(localhost|127\.0\.0\.1):\d+", address, request)
    done = subprocess.run(["sh", "-c", f"{here} --fail --silent"], capture_output=True, text=True, check=True)
    assert '"model": "shakespeare"' in done.stdout
