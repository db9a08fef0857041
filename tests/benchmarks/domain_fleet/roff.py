"""Turn the roff source of a manual page into plain text, well enough to train a language model on it."""

import re

HEADINGS = {"SH", "Sh", "SS", "Ss"}
BREAKS = {"TP", "PP", "P", "LP", "br", "sp", "Pp"}
FONTS = {"B", "I", "R", "SM", "SB", "Nm", "Nd", "Xr", "Ar", "Fl", "Pa"}
ALTERNATING = {"BR", "BI", "IB", "IR", "RB", "RI"}  # their arguments are set without spaces between them
GLYPHS = {"aq": "'", "dq": '"', "lq": "“", "rq": "”", "Fo": "«", "Fc": "»", "em": "—", "en": "–", "bu": "•"}
COMMENT = re.compile(r'^[.\']\s*\\".*\n', re.MULTILINE)
MACRO = re.compile(r"[.']\s*(\w+)\s*(.*)")
ESCAPES = (
    (r"\\f(\[[^\]]*\]|\(..|.)", ""),  # fonts
    (r"\\\*?\((\w\w|\S\S)", lambda found: GLYPHS.get(found[1], "")),
    (r"\\\[[^\]]*\]", ""),
    (r"\\-", "-"),
    (r"\\[&|^/,%c:]", ""),  # breaks and spaces of no width
    (r"\\e", lambda _: "\\"),
    (r"\\(.)", r"\1"),
)


def plain(source: str) -> str:
    """Return the text of a page: headings and paragraphs on lines of their own, macros and escapes gone."""
    lines: list[str] = []
    for line in COMMENT.sub("", source).split("\n"):
        if found := MACRO.match(line):
            lines += _set(found[1], found[2].replace('"', ""))
        elif not line.startswith((".", "'")):
            lines.append(line)
    text = "\n".join(lines)
    for pattern, replacement in ESCAPES:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"\n{3,}", "\n\n", text)


def _set(macro: str, argument: str) -> list[str]:
    """Lines that a macro leaves."""
    if macro in HEADINGS or macro == "IP":
        return ["", argument]
    if macro in BREAKS:
        return [""]
    if macro in FONTS:
        return [argument]
    if macro in ALTERNATING:
        return ["".join(argument.split())]
    return []
