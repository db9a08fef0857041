"""Small bundles, valid and wrong on purpose; their parts are any bytes, since the format does not look into them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icmlora.adapter.layout import ModuleShape
from icmlora.bundle.file import MAGIC, write_bundle
from icmlora.bundle.index import BundledGenerator, BundledMeasurement, BundledTask, BundleIndex, BundlePart

HEAD = 41
LAYOUT = (ModuleShape("model.layers.0.q_proj", 4, 8, 6), ModuleShape("model.layers.1.q_proj", 2, 8, 6))
CONTENT = {
    "generator": b"generator " * 20,
    "config": b'{"r": 4}',
    "card": b"# rust\n",
    "rust": b"code of rust" * 5,
    "sql": b"code of sql" * 7,
}
BLOBS = {hashlib.sha256(data).hexdigest(): data for data in CONTENT.values()}


def digest(name: str) -> str:
    """Return the digest of one of the parts."""
    return hashlib.sha256(CONTENT[name]).hexdigest()


def task(name: str, **fields: Any) -> BundledTask:
    """Return a task whose code is the part of its name."""
    plain: dict[str, Any] = {
        "name": name,
        "code": digest(name.lower()),
        "squared_error": 0.11,
        "weights": "5" * 64,
        "weights_size": 4096,
        "config": digest("config"),
        "card": None,
        "dtype": "F32",
        "step": None,
        "is_generated": False,
        "layout": LAYOUT,
        "measured": None,
    }
    return BundledTask(**plain | fields)


def index(**fields: Any) -> BundleIndex:
    """Return the index of a bundle of rust and sql."""
    measured = BundledMeasurement("d" * 64, 2.5, 1000, 4000, 0.98, 0.11, {"dtype": "float32"})
    plain: dict[str, Any] = {
        "base_model": "acme/tiny",
        "generator": BundledGenerator(digest("generator"), 3, {"width": 32}, {"steps": 100}),
        "tasks": (task("rust", card=digest("card"), measured=measured, step=80), task("sql")),
        "parts": tuple(BundlePart(digest(name), len(CONTENT[name])) for name in CONTENT),
    }
    return BundleIndex(**plain | fields)


def write(path: Path, given: BundleIndex | None = None) -> Path:
    """Write a bundle."""
    list(write_bundle(path, index() if given is None else given, BLOBS.__getitem__))
    return path


def fields_of(path: Path) -> dict[str, Any]:
    """Return the index of a bundle as JSON."""
    data = path.read_bytes()
    length = int.from_bytes(data[5:9], "little")
    return dict(json.loads(data[HEAD : HEAD + length]))


def forge(path: Path, text: bytes | Mapping[str, Any], *, magic: bytes = MAGIC) -> Path:
    """Give a bundle another index, with a digest that fits it: what somebody who knows the format can do."""
    data = path.read_bytes()
    rest = data[HEAD + int.from_bytes(data[5:9], "little") :]
    made = text if isinstance(text, bytes) else json.dumps(text).encode()
    prefix = magic + len(made).to_bytes(4, "little")
    path.write_bytes(prefix + hashlib.sha256(prefix + made).digest() + made + rest)
    return path
