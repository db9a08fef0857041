"""Small bundles, valid and wrong on purpose; their blobs are any bytes, since the format does not look into them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icmlora.bundle.file import MAGIC, write_bundle
from registry.encoding import packed, unpacked
from registry.manifests import Claim, Code, File, Generator, StoredAdapter, Task, Vector

HEAD = 41
BASE = "acme/tiny"
LAYOUT = (("model.layers.0.q_proj", 4, 8, 6), ("model.layers.1.q_proj", 2, 8, 6))
CONTENT = {
    "generator": b"generator " * 20,
    "config": b'{"r": 4}',
    "card": b"# rust\n",
    "rust": b"code of rust" * 5,
    "sql": b"code of sql" * 7,
}
BLOBS = {hashlib.sha256(data).hexdigest(): data for data in CONTENT.values()}


def blob(name: str) -> File:
    """Return the reference to one of the blobs."""
    return File(hashlib.sha256(CONTENT[name]).hexdigest(), len(CONTENT[name]))


def adapter(**fields: Any) -> StoredAdapter:
    """Return what a bundle has of an original."""
    plain: dict[str, Any] = {
        "weights": File("5" * 64, 4096),
        "config": blob("config"),
        "source": "",
        "created_at": "",
        "evicted_at": "",
        "dtype": "F32",
        "rank_max": 4,
        "parameters": 84,
        "target_modules": ("q_proj",),
        "layout": LAYOUT,
    }
    return StoredAdapter(**plain | fields)


def task(name: str, *, claim: Claim | None = None, vectors: Sequence[Vector] = (), **fields: Any) -> Task:
    """Return a task whose code is the blob of its name."""
    code = Code(blob=blob(name.lower()), generator=blob("generator"), claim=claim or Claim(squared_error=0.11))
    final = adapter(**fields)
    return Task(name=name, base_model=BASE, final=final, code=code, vectors=tuple(vectors), created_at="")


def generator(**fields: Any) -> Generator:
    """Return the generator of a bundle."""
    plain: dict[str, Any] = {"base_model": BASE, "version": 3, "blob": blob("generator"), "created_at": ""}
    return Generator(**plain | {"config": {"width": 32}, "metrics": {"steps": 100}} | fields)


def tasks() -> list[Task]:
    """Return the tasks rust and sql."""
    figures = {"data": "d" * 64, "value": 2.5, "count": 1000, "utf8_bytes": 4000, "retained_gain": 0.98}
    figures |= {"squared_error": 0.11, "settings": {"dtype": "float32"}, "metric": "nats per token", "others": {}}
    claim = Claim(squared_error=0.11, measured=figures)
    return [task("rust", card=blob("card"), claim=claim, step=80), task("sql")]


def write(path: Path, given: Sequence[Task] | None = None) -> Path:
    """Write a bundle."""
    list(write_bundle(path, generator(), tasks() if given is None else given, BLOBS.__getitem__))
    return path


@dataclass
class Opened:
    """A bundle as JSON, with its shared documents inside of the manifests, to be changed and written again."""

    generator: dict[str, Any]
    tasks: list[dict[str, Any]]
    blobs: dict[str, bytes]
    extra_parts: list[list[Any]] = field(default_factory=list)
    directory: dict[str, Any] = field(default_factory=dict)  # keys that replace those of the directory
    raw: Callable[[str], str] = str  # changes the text of each manifest

    @property
    def final(self) -> dict[str, Any]:
        """The adapter of the first task."""
        return dict.__getitem__(self.tasks[0], "final")


def opened(path: Path) -> Opened:
    """Read a bundle without any check."""
    data = path.read_bytes()
    length = int.from_bytes(data[5:9], "little")
    directory, at = unpacked(data[HEAD : HEAD + length]), HEAD + length
    parts: dict[str, bytes] = {}
    for digest, size in directory["parts"]:
        parts[digest] = data[at : at + size]
        at += size

    def whole(digest: str) -> dict[str, Any]:
        body = unpacked(parts.pop(digest))
        for part in (body.get("final"), *body.get("vectors", ())):
            if part is not None:
                shared = part.pop("shared").split(":")[0]
                part |= unpacked(parts[shared])
                documents.add(shared)
        return dict(body)

    documents: set[str] = set()
    made = Opened(whole(directory["generator"]), [whole(digest) for digest in directory["tasks"]], parts)
    for digest in documents:
        parts.pop(digest)
    return made


def forge(path: Path, change: Callable[[Opened], object]) -> Path:
    """Give a bundle other manifests, with digests that fit: what somebody who knows the format can do."""
    bundle = opened(path)
    change(bundle)
    parts: dict[str, bytes] = {}

    def part(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        parts[digest] = data
        return digest

    def split(body: Any, names: Sequence[str]) -> Any:
        if not isinstance(body, dict):
            return body
        common = packed({name: body[name] for name in names if name in body})
        rest = {name: value for name, value in body.items() if name not in names}
        return rest | {"shared": f"{part(common)}:{len(common)}"}

    def manifest(body: Any) -> str:
        if isinstance(body, dict) and "final" in body:
            body = body | {"final": split(body["final"], StoredAdapter.SHARED)}
            if isinstance(body.get("vectors"), list):
                body["vectors"] = [split(one, Vector.SHARED) for one in body["vectors"]]
        return part(zlib.compress(bundle.raw(zlib.decompress(packed(body)).decode()).encode()))

    directory: dict[str, Any] = {"generator": manifest(bundle.generator), "tasks": list(map(manifest, bundle.tasks))}
    parts |= bundle.blobs
    directory["parts"] = [[digest, len(data)] for digest, data in parts.items()] + bundle.extra_parts
    return write_directory(path, packed(directory | bundle.directory), b"".join(parts.values()))


def write_directory(path: Path, directory: bytes, parts: bytes, *, magic: bytes = MAGIC) -> Path:
    """Write a bundle with any directory, under a digest that fits it."""
    prefix = magic + len(directory).to_bytes(4, "little")
    path.write_bytes(prefix + hashlib.sha256(prefix + directory).digest() + directory + parts)
    return path


def parts_of(path: Path) -> bytes:
    """Return everything after the directory of a bundle."""
    data = path.read_bytes()
    return data[HEAD + int.from_bytes(data[5:9], "little") :]
