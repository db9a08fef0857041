"""Turn an extract of Wikipedia into plain articles."""

import html
import re

PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
NESTED = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}", re.DOTALL)  # templates and tables
MARKUP = (
    (re.compile(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]"), ""),
    (re.compile(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]"), r"\1"),
    (re.compile(r"'{2,}|<[^>]+>"), ""),
    (re.compile(r"\[https?://\S+ ?([^\]]*)\]"), r"\1"),
    (re.compile(r"\n{3,}"), "\n\n"),
)
SHORTEST = 2000  # characters of markup; below are stubs and redirects
DEPTH = 6  # templates nest about so deep


def articles(dump: str) -> list[str]:
    """Return the longer articles of an XML dump, each its title and its text."""
    pages = ((title, html.unescape(text)) for title, text in PAGE.findall(dump))
    return [f"{title}\n{_plain(text)}" for title, text in pages if len(text) >= SHORTEST and text[0] != "#"]


def _plain(text: str) -> str:
    for _ in range(DEPTH):
        text = NESTED.sub("", text)
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()
