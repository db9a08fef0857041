"""What the documents show exists: links, commands, exit codes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from icm_cli.app import app
from icm_cli.errors import ExitCode
from tests.docs.pages import PAGES, ROOT, anchors_of, commands_of, links_of, name_of

LINES = sorted(
    {
        command.line
        for page in PAGES
        for command in commands_of(page)
        if re.search(r"(^|[(\s])icm(\s|$)", command.line) and "$(" not in command.line
    }
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_parses(line: str) -> None:
    words = shlex.split(line.partition(" | ")[0].partition(" > ")[0], comments=True)
    parse(typer.main.get_command(app), "icm", words[words.index("icm") + 1 :])


def parse(command: Any, name: str, arguments: list[str]) -> None:
    """Parse a command line without running it; raises for an unknown command, option or value."""
    context = command.make_context(name, list(arguments))
    rest = [*context._protected_args, *context.args] if hasattr(context.command, "commands") else []
    if rest:
        _, found, others = context.command.resolve_command(context, rest)
        parse(found, f"{name} {rest[0]}", others)


def test_a_command_line_with_an_unknown_option_would_be_caught() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(typer.main.get_command(app), "icm", ["base", "ls", "--everything"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_exit_code_that_is_named_exists(page: Path) -> None:
    named = {int(code) for code in re.findall(r"exit code (\d+)", page.read_text(encoding="utf-8"))}
    assert named <= {int(code) for code in ExitCode}


def test_the_index_names_every_page() -> None:
    docs = ROOT / "docs"
    pages = [page.relative_to(docs) for page in PAGES if page.is_relative_to(docs)]
    written = {page.as_posix() for page in pages if page.parts[0] not in ("README.md", "example-fleet", "results")}
    assert written <= set(links_of(docs / "README.md"))
