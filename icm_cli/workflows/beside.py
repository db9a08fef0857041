"""A code of the store: the epoch that it names, and the adapter it is, with or without what lies beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from icmlora.adapter import Adapter
from icmlora.errors import CodeError
from icmlora.generator.codec import Codec
from icmlora.generator.layered import LayeredCodec
from icmlora.generator.lineage import Lineage
from icmlora.layout import ModuleShape
from registry.errors import DamagedStore
from registry.records import CodeRecord

if TYPE_CHECKING:
    from registry.store import Store


def decode_rung(store: Store, lineage: Lineage, code: CodeRecord, rung: Literal["residual", "code"]) -> Adapter:
    """Read a code from disk, and its residual for the rung of that name, and decode them.

    Args:
        store: The open store.
        lineage: The epochs of the code's generator; the code names one of them.
        code: The code; it has a residual if one is asked for.
        rung: Which of the two.

    Raises:
        DamagedStore: Bytes that are not those that were stored.
        CodeError: Bytes that cannot be decoded.
        GeneratorError: The epoch's network cannot be read.
    """
    data = store.read_blob(code.blob)
    codec = lineage.codec_of(data)
    if rung == "code" or code.residual is None:
        return codec.decode(data)
    return LayeredCodec(codec).decode(data, store.read_blob(code.residual.blob))


def codec_at(store: Store, lineage: Lineage, code: CodeRecord | None, layout: Sequence[ModuleShape]) -> Codec:
    """Return the codec of the epoch that a task's code names; without a readable code, of the newest that covers it.

    Args:
        store: The open store.
        lineage: The epochs of its generator.
        code: The task's code under it, if it has one.
        layout: The modules of its adapter.

    Raises:
        NotCovered: It has no code, and no epoch covers the adapter.
        GeneratorError: The epoch's network cannot be read.
    """
    try:
        return lineage.codec_for(layout) if code is None else lineage.codec_of(store.read_blob(code.blob))
    except (CodeError, DamagedStore):
        return lineage.codec_for(layout)
