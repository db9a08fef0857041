"""Lay out a table: align the columns, and on a narrow terminal shorten or drop some of them.

Works on whole columns instead of single cells, so that ten thousand rows stay fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from icmlora.io.text import escape, shortened_inside, width

GAP = "  "
_MIN_WIDTH = 12  # of a shrinking column, in terminal cells


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    _: KW_ONLY
    right: bool = False  # align to the right, for numbers
    shrink: bool = False  # shorten long values in the middle on a narrow terminal
    spare: int = 0  # narrow terminals drop columns with the highest value first, 0 never


def laid_out(columns: Sequence[Column], cells: Sequence[Sequence[str]], limit: int | None) -> list[str]:
    """Return the lines of a table, starting with the heading.

    Args:
        columns: The columns.
        cells: The texts of each column. All columns have the same length.
        limit: Width in terminal cells. Exceeded if the columns cannot be shortened further.
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
    """Return the width of each text in terminal cells."""
    return list(map(len if "".join(texts).isascii() else width, texts))


def _kept(columns: Sequence[Column], full: Sequence[int], limit: int | None) -> list[int]:
    """Return the indices of the columns to print, after dropping columns until the rest can fit."""
    least = [_least(column, size) if column.shrink else size for column, size in zip(columns, full, strict=True)]
    kept = list(range(len(columns)))
    while limit is not None and sum(least[index] + len(GAP) for index in kept) - len(GAP) > limit:
        spare = max(kept, key=lambda index: columns[index].spare)
        if not columns[spare].spare:
            break
        kept.remove(spare)
    return kept


def _least(column: Column, full: int) -> int:
    return min(full, max(_MIN_WIDTH, width(column.title)))


def _widths(columns: Sequence[Column], full: Sequence[int], limit: int | None) -> list[int]:
    widths = list(full)
    excess = 0 if limit is None else sum(widths) + len(GAP) * (len(widths) - 1) - limit
    shrinking = [index for index, column in enumerate(columns) if column.shrink]
    while excess > 0 and shrinking:
        # Always shorten the widest column, so a long module list shrinks before a name.
        widest = max(shrinking, key=widths.__getitem__)
        if widths[widest] <= _least(columns[widest], widths[widest]):
            shrinking.remove(widest)
            continue
        widths[widest] -= 1
        excess -= 1
    return widths


def _aligned(column: Column, texts: Sequence[str], sizes: Sequence[int], cells_wide: int) -> list[str]:
    """Return texts padded to the width of their column, or shortened in the middle."""
    if max(sizes) > cells_wide:
        texts = [shortened_inside(text, cells_wide) for text in texts]
        sizes = _sizes(texts)
    if column.right:
        return [" " * (cells_wide - size) + text for text, size in zip(texts, sizes, strict=True)]
    return [text + " " * (cells_wide - size) for text, size in zip(texts, sizes, strict=True)]
