"""Read the documents: their console blocks, links, headings and tables."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (icm [a-z].*)$", re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Command:
    """A command line of a console block, and the lines that the block shows after it."""

    line: str
    output: str


def name_of(page: Path) -> str:
    """Return a page's path inside the repository."""
    return str(page.relative_to(ROOT))


def commands_of(page: Path) -> Iterator[Command]:
    """Yield every command line that a page shows; one may go on in the next line after a backslash."""
    text = page.read_text(encoding="utf-8")
    yield from (Command(line, "") for line in _INDENTED.findall(text))
    for block in _BLOCK.findall(text):
        for part in re.split(r"^\$ ", block.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            yield Command(line, output)


def links_of(page: Path) -> list[str]:
    """Return the targets of a page's links within the repository."""
    targets = _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8")))
    return [target for target in targets if "://" not in target and not target.startswith("mailto:")]


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section_of(page: Path, heading: str) -> str:
    """Return the text of one `##` section."""
    _, _, rest = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    return rest.partition("\n## ")[0]


def cells_of(section: str) -> list[list[str]]:
    """Return the rows of a section's tables, without headings and rules."""
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    rules = [number for number, row in enumerate(rows) if set("".join(row)) <= set("-: ")]
    heads = {number - 1 for number in rules} | set(rules)
    return [[cell.strip() for cell in row] for number, row in enumerate(rows) if number not in heads]


def codes_in(text: str) -> list[str]:
    """Return what a text sets in backticks."""
    return re.findall(r"`([^`]+)`", text)
