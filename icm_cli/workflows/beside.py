"""A code of the store, with or without what lies beside it, as an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from icmlora.adapter import Adapter
from icmlora.generator.codec import Codec
from icmlora.generator.layered import LayeredCodec
from registry.records import CodeRecord

if TYPE_CHECKING:
    from registry.store import Store


def decode_rung(store: Store, codec: Codec, code: CodeRecord, rung: Literal["residual", "code"]) -> Adapter:
    """Read a code from disk, and its residual for the rung of that name, and decode them.

    Args:
        store: The open store.
        codec: That of the code's generator.
        code: The code; it has a residual if one is asked for.
        rung: Which of the two.

    Raises:
        DamagedStore: Bytes that are not those that were stored.
        CodeError: Bytes that cannot be decoded.
    """
    data = store.read_blob(code.blob)
    if rung == "code" or code.residual is None:
        return codec.decode(data)
    return LayeredCodec(codec).decode(data, store.read_blob(code.residual.blob))
