"""One file that holds a generator with the codes of some tasks: made once, carried anywhere, read without a store.

    | "ICMB" 6 | length of directory (4) | SHA-256 (32) | directory | manifest | ... | generator | code | config | ...

The SHA-256 covers the bytes in front of it and the directory, which holds the SHA-256 of every part. So every byte of
the file is covered, and this digest identifies the whole file. docs/reference/bundle.md describes the format for
readers in other languages.
"""

from __future__ import annotations

import copy
import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from icmlora.bundle.index import MAX_DIRECTORY_BYTES, BundleIndex, contents, read_directory, read_index
from icmlora.errors import BundleError, OtherFormat, located
from icmlora.io.files import open_regular, read_exactly
from icmlora.io.staging import writing_file
from registry.files import identity
from registry.manifests import File, Generator, Task

MAGIC = b"ICMB\x06"
MAX_BUNDLE_BYTES = 64 * 1024**3

_HEAD = struct.Struct("<5sI32s")
_CHUNK = 8 * 1024 * 1024
_HINT = "download or copy the file again"


class BundleFile:
    """An open bundle file; `open_bundle` makes it, and has checked everything but the bytes of the blobs.

    Attributes:
        size: Its length in bytes.
        digest: SHA-256 that identifies the whole file.
        stamp: Which file it is, as it is now.
        index: Its manifests.
    """

    index: BundleIndex

    def __init__(self, descriptor: int, size: int, start: int, parts: Sequence[File], digest: str) -> None:
        self._descriptor, self._is_checked = descriptor, False
        self.size, self.digest, self.stamp = size, digest, _stamp(descriptor)
        begins = accumulate((part.size for part in parts), initial=start)
        self._places = {str(part): (part.size, begin) for part, begin in zip(parts, begins, strict=False)}

    def at(self, descriptor: int) -> BundleFile:
        """Return the same bundle, open once more under another descriptor."""
        again = copy.copy(self)
        again._descriptor = descriptor
        return again

    def read(self, digest: str) -> bytes:
        """Return the verified bytes of a part."""
        data = read_exactly(self._descriptor, *self._places[digest])
        if hashlib.sha256(data).hexdigest() != digest:
            raise _damaged(digest)
        return data

    def check(self) -> None:
        """Hash every part, holding a few megabytes at a time; once, while the file is the same."""
        for digest, (size, begin) in () if self._is_checked else self._places.items():
            hashed = hashlib.sha256()
            for at in range(0, size, _CHUNK):
                hashed.update(read_exactly(self._descriptor, min(_CHUNK, size - at), begin + at))
            if hashed.hexdigest() != digest:
                raise _damaged(digest)
        self._is_checked = True


@contextmanager
def open_bundle(path: Path, known: BundleFile | None = None) -> Iterator[BundleFile]:
    """Open a bundle and check its manifests, without reading its blobs.

    Args:
        path: The file.
        known: The bundle as it was opened before, whose index is taken where the file has not changed since.

    Raises:
        BundleError: It is none, or damaged or cut short, or of a newer format.
        OtherFormat: It has an earlier format.
        UnsafeInput: It breaks a limit.
    """
    # The user named this path, so a link is followed; its target must be a plain file.
    target = Path(os.path.realpath(path))
    with located(path), open_regular(target, max_bytes=MAX_BUNDLE_BYTES) as (descriptor, size):
        if known is not None and _stamp(descriptor) == known.stamp:
            yield known.at(descriptor)
            return
        length, digest = _head(read_exactly(descriptor, min(size, _HEAD.size), 0), size)
        text = read_exactly(descriptor, length, _HEAD.size)
        if _digest(text) != digest:
            raise BundleError("the bundle's directory is damaged", hint=_HINT)
        directory, start = read_directory(text), _HEAD.size + length
        # Parts follow each other without gaps, so the length alone shows a file that was cut short.
        expected = start + sum(part.size for part in directory.parts)
        if size != expected:
            raise BundleError(f"the bundle has {size:,} bytes, not {expected:,}", hint=_HINT)
        bundle = BundleFile(descriptor, size, start, directory.parts, digest)
        bundle.index = read_index(directory, bundle.read)
        yield bundle


class ReopenedBundle:
    """A bundle file that is opened again for each piece of work.

    Its index is read and its bytes are checked once, while the file stays the same.

    Attributes:
        path: The file.
        index: The manifests in the bundle: its generator and tasks.
        digest: SHA-256 that identifies the whole file.
        size: Length of the file in bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_bundle(self.path) as file:
            self.index, self.digest, self.size = file.index, file.digest, file.size
        self._known = file

    @contextmanager
    def open(self) -> Iterator[BundleFile]:
        """Open the file; raise `BundleError` if it is damaged or was replaced."""
        with open_bundle(self.path, self._known) as file:
            if file.digest != self.digest:
                raise BundleError("the bundle file was replaced", path=self.path)
            self._known = file  # it remembers whether its bytes were checked
            yield file


def write_bundle(
    path: Path, generator: Generator, tasks: Sequence[Task], read: Callable[[str], bytes], *, force: bool = False
) -> Iterator[File]:
    """Write a bundle; yields each part once it is written."""
    # The file appears when the last part is taken, complete and durable, or never.
    index, text, manifests = contents(generator, tasks)
    read_index(read_directory(text), manifests.__getitem__)  # readers would refuse a bundle beyond the limits
    with writing_file(path, force=force) as stream:
        stream.write(_prefix(text) + bytes.fromhex(_digest(text)) + text)
        for part in index.parts:
            data = manifests[part] if part in manifests else read(part)
            if (len(data), hashlib.sha256(data).hexdigest()) != (part.size, part):
                raise _damaged(part)
            stream.write(data)
            yield part


def bundle_digest(generator: Generator, tasks: Sequence[Task]) -> tuple[str, int, BundleIndex]:
    """Return the SHA-256 that identifies a whole bundle, its length and its index."""
    index, text, _ = contents(generator, tasks)
    return _digest(text), _HEAD.size + len(text) + sum(part.size for part in index.parts), index


def _head(data: bytes, size: int) -> tuple[int, str]:
    """Return length and digest of the directory."""
    if data[:4] != MAGIC[:4]:
        raise BundleError("not an icm bundle", hint="run `icm export FILE` to write one")
    if len(data) < _HEAD.size:
        raise BundleError(f"the bundle has only {size:,} bytes, less than its header", hint=_HINT)
    magic, length, digest = _HEAD.unpack(data)
    if magic != MAGIC:
        if 0 < magic[4] < MAGIC[4]:
            raise OtherFormat.of("bundle", magic[4], MAGIC[4])
        message = f"the bundle is damaged or has format {magic[4]}; this icm reads format {MAGIC[4]}"
        raise BundleError(message, hint="use the icm version that wrote it, or a newer one")
    if length > min(MAX_DIRECTORY_BYTES, size - _HEAD.size):
        raise BundleError(
            f"the bundle declares a directory of {length:,} bytes but has only {size:,} in total", hint=_HINT
        )
    return length, digest.hex()


def _stamp(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return *identity(found), found.st_ctime_ns


def _prefix(text: bytes) -> bytes:
    return MAGIC + struct.pack("<I", len(text))


def _digest(text: bytes) -> str:
    return hashlib.sha256(_prefix(text) + text).hexdigest()


def _damaged(digest: str) -> BundleError:
    return BundleError(f"part {digest[:12]} of the bundle is damaged", hint=_HINT)
