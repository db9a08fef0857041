"""Cut what packages hold into documents: quotations, dictionary entries, manual pages, files without licence heads."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks.domain_fleet.roff import plain
from tests.benchmarks.example_fleet.texts import files, read_text

HEAD_LINES = 25
"""Licence headers are looked for in this many first lines."""
LEGAL = re.compile(r"copyright|licen[sc]e|all rights reserved", re.IGNORECASE)
DOCUMENT = 2000
"""Characters that short entries are gathered to."""


def gathered(entries: Iterable[str], separator: str = "\n\n", size: int = DOCUMENT) -> list[str]:
    """Join neighbouring entries to documents of about `size` characters.

    Neighbours are alike (one author, one headword, one shape filled and empty), so they stay in one document.
    """
    documents: list[str] = []
    current: list[str] = []
    length = 0
    for entry in (entry.strip("\n") for entry in entries):
        if not entry.strip():
            continue
        current.append(entry)
        length += len(entry)
        if length >= size:
            documents.append(separator.join(current))
            current, length = [], 0
    return [*documents, separator.join(current)] if current else documents


def without_heads(documents: list[str]) -> list[str]:
    """Drop first lines that are blank, legal or shared by many documents: a domain is not its licence header."""
    heads = ({line.strip() for line in document.split("\n")[:HEAD_LINES]} for document in documents)
    seen = Counter(line for head in heads for line in head)
    often = max(5.0, 0.06 * len(documents))
    shared = {line for line, count in seen.items() if count > often}
    return [_without_head(document, shared) for document in documents]


def _without_head(document: str, shared: set[str]) -> str:
    lines = document.split("\n")
    first = 0
    while first < min(HEAD_LINES, len(lines)):
        line = lines[first].strip()
        if line and line not in shared and not LEGAL.search(line):
            break
        first += 1
    return "\n".join(lines[first:]).strip("\n")


def quotations(package: Path) -> list[str]:
    """Documents of a package of fortunes, whose files hold quotations between lines of `%`."""
    folder = package / "usr/share/games/fortunes"
    texts = files(folder, r"(^|/)[^./]+$|\.fortunes$", r"-u8$")
    quoted = (re.split(r"^%\s*$", re.sub(r"\x1b\[[0-9;]*m", "", text), flags=re.MULTILINE) for text in texts)
    return [document for entries in quoted for document in gathered(entries)]


def manual(package: Path, language: str) -> list[str]:
    """Plain text of every manual page of a package in one language."""
    return [plain(page) for page in files(package / "usr/share/man" / language, r"man\d/")]


def dictionary(path: Path) -> list[str]:
    """Documents of a dictd database, an entry of which begins at the start of a line."""
    return gathered(re.split(r"\n(?=\S)", read_text(path)), "\n")


def entries(texts: Iterable[str], start: str) -> list[str]:
    """Documents of texts whose entries begin with the pattern `start` at the start of a line."""
    return [document for text in texts for document in gathered(re.split(rf"\n(?={start})", text))]
