"""How a table is laid out: aligned, and cut or with fewer columns where a terminal is narrow.

Column by column, not cell by cell: a fleet of ten thousand tasks is a table too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from icmlora.io.text import escape, shortened_inside, width

GAP = "  "
_NARROWEST = 12  # terminal cells that a shrinking column keeps


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    _: KW_ONLY
    right: bool = False  # whether values are aligned to the right, as numbers are
    shrink: bool = False  # whether values may be cut in the middle when the terminal is narrow
    # Whether the column may be left out there, and in which order: the highest number goes first, 0 never.
    spare: int = 0


def laid_out(columns: Sequence[Column], cells: Sequence[Sequence[str]], limit: int | None) -> list[str]:
    """Return the lines of a table, its head first, at most `limit` terminal cells wide as far as that can be.

    `cells` has the texts of each column, as many in each.
    """
    texts = [[column.title.upper(), *_escaped(shown)] for column, shown in zip(columns, cells, strict=True)]
    sizes = [_sizes(shown) for shown in texts]
    full = [max(size) for size in sizes]
    kept = _kept(columns, full, limit)
    wide = _widths([columns[index] for index in kept], [full[index] for index in kept], limit)
    aligned = [
        _aligned(columns[index], texts[index], sizes[index], cells_wide)
        for index, cells_wide in zip(kept, wide, strict=True)
    ]
    return [line.rstrip() for line in map(GAP.join, zip(*aligned, strict=True))]


def _escaped(texts: Sequence[str]) -> Sequence[str]:
    together = "".join(texts)
    return texts if together.isascii() and together.isprintable() else [escape(text) for text in texts]


def _sizes(texts: Sequence[str]) -> list[int]:
    """Return how many terminal cells each text takes."""
    return list(map(len if "".join(texts).isascii() else width, texts))


def _kept(columns: Sequence[Column], full: Sequence[int], limit: int | None) -> list[int]:
    """Return the places of the columns that stay: some go until the others fit, cut as far as they may be."""
    least = [_least(column, size) if column.shrink else size for column, size in zip(columns, full, strict=True)]
    kept = list(range(len(columns)))
    while limit is not None and sum(least[index] + len(GAP) for index in kept) - len(GAP) > limit:
        spare = max(kept, key=lambda index: columns[index].spare)
        if not columns[spare].spare:
            break
        kept.remove(spare)
    return kept


def _least(column: Column, full: int) -> int:
    return min(full, max(_NARROWEST, width(column.title)))


def _widths(columns: Sequence[Column], full: Sequence[int], limit: int | None) -> list[int]:
    widths = list(full)
    excess = 0 if limit is None else sum(widths) + len(GAP) * (len(widths) - 1) - limit
    shrinking = [index for index, column in enumerate(columns) if column.shrink]
    while excess > 0 and shrinking:
        # A long list of modules gives way before a name does.
        widest = max(shrinking, key=widths.__getitem__)
        if widths[widest] <= _least(columns[widest], widths[widest]):
            shrinking.remove(widest)
            continue
        widths[widest] -= 1
        excess -= 1
    return widths


def _aligned(column: Column, texts: Sequence[str], sizes: Sequence[int], cells_wide: int) -> list[str]:
    """Return texts, each as wide as their column, cut in the middle where they are wider."""
    if max(sizes) > cells_wide:
        texts = [shortened_inside(text, cells_wide) for text in texts]
        sizes = _sizes(texts)
    if column.right:
        return [" " * (cells_wide - size) + text for text, size in zip(texts, sizes, strict=True)]
    return [text + " " * (cells_wide - size) for text, size in zip(texts, sizes, strict=True)]
