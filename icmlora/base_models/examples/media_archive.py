"""Rows of examples and the files that they name, stored as one uncompressed ZIP.

    rows.jsonl      the rows, with "image": "media/<SHA-256>" instead of each path
    media/<SHA-256> each image or recording once

Its digest covers rows and files, so a measurement stays valid when the folder of images changes. Equal rows and files
produce equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from icmlora.base_models.examples.media import MAX_FILE, MEDIA_KEYS, Media, Resolver
from icmlora.base_models.examples.rows import BadRow, read_rows
from icmlora.errors import DataError, located
from icmlora.formats.discovery.task_names import IMAGES
from icmlora.io.files import read_regular

MAX_BYTES = 256 * 2**20
"""Maximum bytes of all rows and files of an archive."""
_HEAD = 2**20  # leading bytes of a file, enough to hold its first row
_MAGIC = b"PK\x03\x04"
_ROWS = "rows.jsonl"
_FOLDER = "media/"
_METADATA = "metadata.jsonl"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def is_archive(data: bytes) -> bool:
    """Return whether the bytes are an archive."""
    return data.startswith(_MAGIC)


def has_media(path: Path) -> bool:
    """Return whether `path` is a folder of images, or a file whose first part has rows that name files."""
    if path.is_dir():
        return True
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError:  # the caller reports the error when it reads the file
        return False
    return not is_archive(head) and _names_media(head)


def read_examples(path: Path) -> bytes:
    """Read a file of rows or a folder of images; return an archive if they name files.

    Raises:
        UnsafeInput: The file is too large, a link or not a regular file.
        DataError: The rows and files together are too large, or the folder contains no image.
    """
    with located(path):
        if path.is_dir():
            return pack_rows(rows_of_folder(path), beside(path))
        data = read_regular(path, max_bytes=MAX_BYTES)
        if is_archive(data) or not _names_media(data[:_HEAD]):
            return data
        return pack_rows(_rows(data), beside(path.parent))


def pack_rows(rows: Iterable[Any], read: Callable[[str], bytes]) -> bytes:
    """Pack rows and the files that they name; raise `DataError` if they exceed `MAX_BYTES`.

    `read` returns the bytes of a named file. If it raises `DataError` or `OSError`, the row records the reason instead,
    so that it is skipped and counted like any other bad row.
    """
    files: dict[str, bytes] = {}
    lines: list[bytes] = []
    size = 0
    for row in rows:
        if isinstance(row, dict):
            row = dict(row)
            for key in MEDIA_KEYS:
                if not isinstance(row.get(key), str):
                    continue
                try:
                    data = read(row[key])
                except (DataError, OSError) as error:
                    row[key] = {"missing": str(getattr(error, "message", error.__class__.__name__))}
                    continue
                name = f"{_FOLDER}{hashlib.sha256(data).hexdigest()}"
                size += 0 if name in files else len(data)
                files[name] = data
                row[key] = name
        try:
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except ValueError:  # NaN or a lone surrogate, which Python parses but JSON does not allow
            lines.append(b"null\n")
        size += len(lines[-1])
        if size > MAX_BYTES:
            raise DataError(f"its rows and files have more than {MAX_BYTES} bytes", hint="keep a sample of the task")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in ({_ROWS: b"".join(lines)} | dict(sorted(files.items()))).items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)  # no date: equal files must give equal bytes
    return stream.getvalue()


def _rows(data: bytes) -> Iterator[Any]:
    """Yield the rows of a file; a bad row becomes None, which is later skipped and counted."""
    return (None if isinstance(row, BadRow) else row for _, row in read_rows(data).values)


def _names_media(head: bytes) -> bool:
    return any(f'"{key}"'.encode() in head for key in MEDIA_KEYS)


def open_archive(data: bytes) -> tuple[bytes, Resolver]:
    """Return an archive's rows and a resolver for their files; raise `DataError` if it is damaged or not icm's."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = {entry.filename: entry for entry in archive.infolist()}
        if sum(entry.file_size for entry in entries.values()) > len(data) or any(
            entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()
        ):
            raise DataError("is a ZIP that icm did not write")
        rows = archive.read(entries[_ROWS])
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"is a damaged archive: {error}") from error

    def find(name: str) -> Media:
        entry = entries.get(name)
        if entry is None or not name.startswith(_FOLDER):
            raise DataError(f"names the file {name!r}, which does not exist")

        def read() -> bytes:
            try:
                return archive.read(entry)
            except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
                raise DataError(f"has a damaged file: {error}") from error

        return Media(name, read)

    return rows, find


def beside(folder: Path) -> Callable[[str], bytes]:
    """Return a reader for the files that rows name in a folder; it raises `DataError` for files outside the folder."""
    root = folder.resolve()

    def read(name: str) -> bytes:
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\0" in name:
            raise DataError(f"names the file {name!r}, which is outside its folder")
        path = root / place
        if not path.resolve().is_relative_to(root):
            raise DataError(f"names the file {name!r}, which links outside its folder")
        if not path.is_file():
            raise DataError(f"names the file {name!r}, which does not exist")
        return read_regular(path, max_bytes=MAX_FILE)

    return read


def rows_of_folder(folder: Path) -> list[Mapping[str, Any] | None]:
    """Return the rows of a folder in the `imagefolder` convention of `datasets`.

    LABEL/NAME.png is an image and its label. If there is a `metadata.jsonl`, folder names are ignored: its rows are
    used and name their files in `file_name`.

    Raises:
        DataError: The folder contains no image.
    """
    metadata = folder / _METADATA
    if metadata.is_file():
        found: list[Mapping[str, Any] | None] = []
        for row in _rows(read_regular(metadata, max_bytes=MAX_BYTES)):
            if not isinstance(row, dict):
                found.append(None)
                continue
            named = {("image" if key == "file_name" else key): value for key, value in row.items() if key != "objects"}
            if isinstance(objects := row.get("objects"), dict):  # COCO boxes
                named |= {"boxes": objects.get("bbox"), "labels": objects.get("categories", objects.get("category"))}
            found.append(named)
        return found
    images = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMAGES and path.is_file())
    if not images:
        raise DataError("has no LABEL/IMAGE and no metadata.jsonl", path=folder)
    return [{"image": path.relative_to(folder).as_posix(), "label": path.parent.name} for path in images]
