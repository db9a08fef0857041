"""Tensors of an adapter that its base model has too, as a record of a few bytes instead of the tensors.

    "ICMX" 2 | {"NAME": ["TENSOR OF THE BASE MODEL", "DTYPE", [SHAPE], "SHA-256"], ...}

PEFT saves copies of embeddings and output layers with an adapter, and most of them are as they were. Type, shape and
digest are those of the adapter's tensor. That of the base model may be bfloat16 where the adapter's is float32.
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
"""How a record begins."""
MAX_RECORD = 8 << 20  # bytes
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BaseSource(Protocol):
    """The tensors of a base model that is on this machine."""

    @property
    def label(self) -> str:
        """The name of the base model."""

    def read(self, name: str) -> RawTensor | None:
        """Read one tensor; None if there is none of that name."""


@dataclass(frozen=True)
class Reference:
    """A tensor of an adapter that is equal to one of its base model.

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
    """Describe an adapter's tensor by the base model's tensor `name`; None if they are not equal."""
    found = base.read(name)
    same = None if found is None else widened(found, tensor.dtype)
    if same is None or (same.shape, same.data) != (tensor.shape, tensor.data):
        return None
    return Reference(name, tensor.dtype, tensor.shape, hashlib.sha256(tensor.data).hexdigest())


def pack_references(references: Mapping[str, Reference]) -> bytes:
    """Write references by the names of the adapter's tensors."""
    fields = {name: [one.tensor, one.dtype, list(one.shape), one.digest] for name, one in sorted(references.items())}
    return REFERENCES + json.dumps(fields, separators=(",", ":")).encode()


def parse_references(blob: bytes) -> dict[str, Reference]:
    """Read what `pack_references` wrote.

    Raises:
        DataError: It is something else, or it is damaged.
    """
    try:
        if not blob.startswith(REFERENCES):
            raise ValueError("not a record of them")
        fields = parse_object(blob[len(REFERENCES) :], what="the record", max_bytes=MAX_RECORD)
        return {name: _reference(name, value) for name, value in fields.items()}
    except (ValueError, IcmLoraError) as error:
        raise DataError(f"an adapter's references to its base model cannot be read: {error}") from error


def resolve(blob: bytes, base: BaseSource) -> dict[str, RawTensor]:
    """Read the tensors that a record refers to.

    Raises:
        BaseModelMismatch: The base model does not have one of them.
        DataError: The record is damaged.
    """
    return {name: _resolved(reference, base) for name, reference in parse_references(blob).items()}


def widened(tensor: RawTensor, dtype: str) -> RawTensor | None:
    """Return a tensor in another type if that is the same one, or bfloat16 as float32; else None."""
    if tensor.dtype == dtype:
        return tensor
    if (tensor.dtype, dtype) != ("BF16", "F32"):
        return None
    wide = bytearray(2 * len(tensor.data))  # a bfloat16 is the upper half of a float32, the lower half is zero
    wide[2::4], wide[3::4] = tensor.data[::2], tensor.data[1::2]
    return RawTensor(dtype, tensor.shape, bytes(wide))


def _resolved(reference: Reference, base: BaseSource) -> RawTensor:
    found = base.read(reference.tensor)
    found = None if found is None or found.shape != reference.shape else widened(found, reference.dtype)
    if found is None or hashlib.sha256(found.data).hexdigest() != reference.digest:
        raise BaseModelMismatch(
            f"the adapter needs tensor {reference.tensor} of base model {base.label!r} as ingested, "
            "but the copy on this machine has different values",
            hint="run `icm base add NAME PATH` with the copy that the adapter was trained on",
        )
    return found


def _reference(name: str, value: object) -> Reference:
    match value:
        case [str(tensor), str(dtype), [*shape], str(digest)]:
            pass
        case _:
            raise ValueError("an entry is not a tensor, a type, a shape and a digest")
    if not (TENSOR_NAME.fullmatch(name) and TENSOR_NAME.fullmatch(tensor)):
        raise ValueError("the name of a tensor is not plain")
    sizes = tuple(size for size in shape if type(size) is int and 0 <= size <= MAX_DIMENSION)
    if dtype not in ITEM_BYTES or len(sizes) != len(shape) or len(shape) > MAX_RANK or not _DIGEST.fullmatch(digest):
        raise ValueError("an entry has an unknown type, or an invalid shape or digest")
    return Reference(tensor, dtype, sizes, digest)
