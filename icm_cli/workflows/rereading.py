"""Rows and the files that they name, used together.

row ──▶ files ──gone?──▶ row again ──┬─ another one: its files
                                     └─ the same: the store is damaged

The file of a code, a start or a checkpoint goes as soon as its row names another one. A reader that has the earlier row
then finds no file, and that is no damage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from registry.errors import MissingBlob

Row = TypeVar("Row")
Result = TypeVar("Result")


def with_files(read: Callable[[], Row], use: Callable[[Row], Result]) -> Result:
    """Read a row and use the files that it names; once more where another process replaced them in between.

    Args:
        read: Reads the row, or several.
        use: Is called with it again if a file was gone, so it changes nothing before it has read them all.

    Raises:
        MissingBlob: A file is gone, and the row is as it was: the store is damaged.
    """
    row = read()
    while True:
        try:
            return use(row)
        except MissingBlob as missing:
            row = as_it_is_now(read, row, missing)


def as_it_is_now(read: Callable[[], Row], seen: object, missing: MissingBlob) -> Row:
    """Read a row again, since a file that it named is gone.

    Raises:
        MissingBlob: That which is given, if the row is as it was.
    """
    row = read()
    if row == seen:
        raise missing
    return row
