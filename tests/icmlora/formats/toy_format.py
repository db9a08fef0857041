"""A second adapter format, as small as one can be: a single file `NAME.toy`. It proves that a format is one file.

toy 1\\n | JSON of one line\\n | float32 values: for each module A (r, in) and B (out, r), then each extra tensor
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.errors import AdapterRefused
from icmlora.formats.format import (
    AdapterBytes,
    AdapterFormat,
    AdapterSummary,
    Buffer,
    Extras,
    FoundAdapter,
    LoadedAdapter,
    RunnableAdapter,
    Template,
    Texts,
)
from icmlora.io.safetensors import RawTensor, TensorInfo
from icmlora.io.strict_json import parse_object

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.formats.discovery.tree import Folder

MAGIC = b"toy 1\n"
SUFFIX = ".toy"


@dataclass(frozen=True)
class _Parsed:
    base_model: str
    task_type: str | None
    layout: tuple[ModuleShape, ...]
    extras: dict[str, tuple[int, ...]]
    values: npt.NDArray[np.float32]


class ToyFormat(AdapterFormat):
    """Single files with a header of their own; there is no configuration and no card."""

    name = "toy"
    about = "a single file NAME.toy"
    suffix = SUFFIX

    def find(self, folder: Folder) -> list[FoundAdapter]:
        """Find every file of the suffix: each is an adapter, named after the file."""
        files = [path for name, path in sorted(folder.files.items()) if name.endswith(SUFFIX)]
        return [FoundAdapter(self, folder.path / path.stem, path) for path in files]

    def refuse(self, folder: Folder) -> list[AdapterRefused]:
        """Report the old suffix."""
        old = [path for name, path in sorted(folder.files.items()) if name.endswith(".toy0")]
        return [AdapterRefused("an adapter of toy 0", kind="toy", path=path, hint="save it again") for path in old]

    def _summary(self, config: bytes, weights: Buffer) -> AdapterSummary:
        parsed = self._parse(config, weights)
        extras, begin = [], len(weights) - 4 * sum(map(prod, parsed.extras.values()))
        for name, shape in parsed.extras.items():
            extras.append(TensorInfo(name, "F32", shape, begin, begin + 4 * prod(shape)))
            begin = extras[-1].end
        return AdapterSummary(
            base_model=parsed.base_model,
            revision=None,
            task_type=parsed.task_type,
            dtype="F32",
            rank_max=max(shape.rank for shape in parsed.layout),
            parameters=sum(shape.parameters for shape in parsed.layout),
            target_modules=target_modules(shape.module for shape in parsed.layout),
            layout=parsed.layout,
            extras=tuple(extras),
        )

    def _load(self, config: bytes, weights: bytes) -> LoadedAdapter:
        import torch

        from icmlora.adapter.model import Adapter, LoraModule

        parsed = self._parse(config, weights)
        values, modules = parsed.values, []
        for name, rank, inputs, outputs in parsed.layout:
            a, b, values = np.split(values, [rank * inputs, rank * (inputs + outputs)])
            pair = torch.tensor(a).view(rank, inputs), torch.tensor(b).view(outputs, rank)
            modules.append(LoraModule(name, *pair))
        extras = {}
        for name, shape in parsed.extras.items():
            extra, values = np.split(values, [prod(shape)])
            extras[name] = RawTensor("F32", shape, extra.tobytes())
        targets = target_modules(shape.module for shape in parsed.layout)
        return LoadedAdapter(Adapter(parsed.base_model, parsed.task_type, targets, tuple(modules)), extras)

    def _run(self, config: bytes, weights: bytes) -> RunnableAdapter:
        return RunnableAdapter(self._load(config, weights).adapter)  # the extras do nothing

    def _fresh(self, adapter: Adapter, metadata: Texts, dtype: str) -> AdapterBytes:
        return self._written(adapter, metadata, dtype, {})

    def _alike(
        self, adapter: Adapter, like: Template, dtype: str | None, rank: int | None, extras: Extras, metadata: Texts
    ) -> AdapterBytes:
        return self._written(adapter, metadata, dtype or "float32", extras)

    def _written(
        self, adapter: Adapter, metadata: Mapping[str, str], dtype: str, extras: Mapping[str, RawTensor]
    ) -> AdapterBytes:
        """Write an adapter; its values are rounded to `dtype` and stored as float32."""
        import torch

        head = {
            "base_model": adapter.base_model,
            "task_type": adapter.task_type,
            "modules": [list(shape) for shape in adapter.layout],
            "extras": {name: list(tensor.shape) for name, tensor in extras.items()},
            "metadata": dict(metadata),
        }
        rounded = [part.to(getattr(torch, dtype)).float() for one in adapter.modules for part in (one.a, one.b)]
        if not all(part.isfinite().all() for part in rounded):
            raise AdapterRefused(f"a value that {dtype} cannot hold", kind="overflow")
        values = b"".join(part.numpy().tobytes() for part in rounded) + b"".join(one.data for one in extras.values())
        return AdapterBytes(MAGIC + json.dumps(head, sort_keys=True).encode() + b"\n" + values)

    def _parse(self, config: bytes, weights: Buffer) -> _Parsed:
        self.read_config(config)
        magic, _, rest = bytes(weights).partition(b"\n")
        text, newline, data = rest.partition(b"\n")
        if magic + b"\n" != MAGIC or not newline:
            raise AdapterRefused("not a toy adapter", kind="damaged")
        head = parse_object(text, what="the header", max_bytes=1 << 20)
        try:
            layout = tuple(ModuleShape(str(m), int(r), int(i), int(o)) for m, r, i, o in head["modules"])
            extras = {str(name): tuple(map(int, shape)) for name, shape in head["extras"].items()}
            base_model, task_type = str(head["base_model"]), head["task_type"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterRefused(f"the header is damaged: {error!r}", kind="damaged") from None
        count = sum(shape.parameters for shape in layout) + sum(map(prod, extras.values()))
        if not layout or len(data) != 4 * count:
            raise AdapterRefused(f"has {len(data)} bytes of values, not {4 * count}", kind="damaged")
        values = np.frombuffer(data, dtype="<f4")
        if not np.isfinite(values).all():
            raise AdapterRefused("holds a value that is not finite", kind="non-finite")
        return _Parsed(base_model, task_type, layout, extras, values)
