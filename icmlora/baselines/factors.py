"""An adapter as a head and its factors, all under one quantiser: `head | A, B^T of each module in natural order`."""

from __future__ import annotations

from icmlora.adapter import Adapter, LoraModule
from icmlora.baselines.head import Head
from icmlora.baselines.quantizers import Quantizer
from icmlora.baselines.reader import Reader


def factors_to_bytes(adapter: Adapter, quantizer: Quantizer) -> bytes:
    """Serialise an adapter's factors as they are."""
    parts = [Head.of(adapter).to_bytes()]
    for module in adapter.modules:
        parts += [quantizer.encode(module.a), quantizer.encode(module.b.mT)]
    return b"".join(parts)


def factors_from_bytes(data: bytes, quantizer: Quantizer) -> Adapter:
    """Read an adapter back.

    Raises:
        CodeError: Bytes are missing or left over.
    """
    reader = Reader(data)
    head = Head.read(reader)
    modules = []
    for name, rank, inputs, outputs in head.layout:
        a = quantizer.decode(reader.take(quantizer.size(rank, inputs)), rank, inputs)
        b = quantizer.decode(reader.take(quantizer.size(rank, outputs)), rank, outputs)
        modules.append(LoraModule(name, a, b.mT.contiguous()))
    reader.finish()
    return head.with_modules(modules)
