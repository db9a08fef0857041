"""Short references to tensors that an adapter shares with its base model, stored instead of the tensors.

    "ICMX" 2 | {"NAME": ["TENSOR OF THE BASE MODEL", "DTYPE", [SHAPE], "SHA-256"], ...}

PEFT saves copies of embeddings and output layers with an adapter, and most copies are unchanged. Type, shape and digest
describe the adapter's tensor. The base model's tensor may be bfloat16 where the adapter's is float32.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from icmlora.errors import BaseModelMismatch, DataError, IcmLoraError
from icmlora.io.safetensors import ITEM_BYTES, MAX_DIMENSION, MAX_RANK, TENSOR_NAME, RawTensor
from icmlora.io.strict_json import parse_object

REFERENCES = b"ICMX\x02"
"""Magic bytes of a record."""
MAX_RECORD = 8 << 20  # bytes
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BaseSource(Protocol):
    """The tensors of a local base model."""

    @property
    def label(self) -> str:
        """The name of the base model."""

    def read(self, name: str) -> RawTensor | None:
        """Read one tensor; None if it does not exist."""


@dataclass(frozen=True)
class Reference:
    """A tensor of an adapter that equals a tensor of its base model.

    Attributes:
        tensor: Name of the base model's tensor.
        dtype: Type of the adapter's tensor.
        shape: Shape of both.
        digest: SHA-256 of the bytes of the adapter's tensor.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


def reference_to(name: str, base: BaseSource, tensor: RawTensor) -> Reference | None:
    """Return a reference from an adapter's tensor to the base model's tensor `name`; None if they differ."""
    found = base.read(name)
    same = None if found is None else widened(found, tensor.dtype)
    if same is None or (same.shape, same.data) != (tensor.shape, tensor.data):
        return None
    return Reference(name, tensor.dtype, tensor.shape, hashlib.sha256(tensor.data).hexdigest())


def pack_references(references: Mapping[str, Reference]) -> bytes:
    """Serialise references, keyed by the names of the adapter's tensors."""
    fields = {name: [one.tensor, one.dtype, list(one.shape), one.digest] for name, one in sorted(references.items())}
    return REFERENCES + json.dumps(fields, separators=(",", ":")).encode()


def parse_references(blob: bytes) -> dict[str, Reference]:
    """Parse the output of `pack_references`.

    Raises:
        DataError: The record is damaged, or not a record.
    """
    try:
        if not blob.startswith(REFERENCES):
            raise ValueError("not a record of references")
        fields = parse_object(blob[len(REFERENCES) :], what="the record", max_bytes=MAX_RECORD)
        return {name: _reference(name, value) for name, value in fields.items()}
    except (ValueError, IcmLoraError) as error:
        raise DataError(f"an adapter's references to its base model cannot be read: {error}") from error


def resolve(blob: bytes, base: BaseSource) -> dict[str, RawTensor]:
    """Read the tensors that a record refers to.

    Raises:
        BaseModelMismatch: The base model lacks one of them.
        DataError: The record is damaged.
    """
    tensors = {}
    for name, reference in parse_references(blob).items():
        found = base.read(reference.tensor)
        found = None if found is None or found.shape != reference.shape else widened(found, reference.dtype)
        if found is None or hashlib.sha256(found.data).hexdigest() != reference.digest:
            raise BaseModelMismatch(
                f"the adapter needs tensor {reference.tensor} of base model {base.label!r} as ingested, "
                "but the copy on this machine has different values",
                hint="run `icm base add NAME PATH` with the copy that the adapter was trained on",
            )
        tensors[name] = found
    return tensors


def widened(tensor: RawTensor, dtype: str) -> RawTensor | None:
    """Return a tensor in its own type, or bfloat16 widened to float32; None for other types."""
    if tensor.dtype == dtype:
        return tensor
    if (tensor.dtype, dtype) != ("BF16", "F32"):
        return None
    wide = bytearray(2 * len(tensor.data))  # bfloat16 is the upper half of a float32; the lower half is zero
    wide[2::4], wide[3::4] = tensor.data[::2], tensor.data[1::2]
    return RawTensor(dtype, tensor.shape, bytes(wide))


def _reference(name: str, value: object) -> Reference:
    match value:
        case [str(tensor), str(dtype), [*shape], str(digest)]:
            pass
        case _:
            raise ValueError("an entry is not a tensor, a type, a shape and a digest")
    if not (TENSOR_NAME.fullmatch(name) and TENSOR_NAME.fullmatch(tensor)):
        raise ValueError("an entry has an invalid tensor name")
    sizes = tuple(size for size in shape if type(size) is int and 0 <= size <= MAX_DIMENSION)
    if dtype not in ITEM_BYTES or len(sizes) != len(shape) or len(shape) > MAX_RANK or not _DIGEST.fullmatch(digest):
        raise ValueError("an entry has an unknown type, or an invalid shape or digest")
    return Reference(tensor, dtype, sizes, digest)
