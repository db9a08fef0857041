"""What takes seconds to load and serves many tasks in a row: generators and base models, the latest of each kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from icm_cli.workflows.base_access import open_base
from icmlora.base_model import BaseModel
from icmlora.generator.lineage import Lineage
from registry.records import GeneratorRecord

if TYPE_CHECKING:
    from registry.store import Store


class Kept:
    """Loads on demand, and lets go of a base model once another one is asked for.

    Args:
        store: The open store.
        device: Where base models go.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._device = store, device
        self._lineage: Lineage | None = None
        self._bases: dict[tuple[str, torch.dtype | None], BaseModel] = {}

    def lineage(self, generator: GeneratorRecord) -> Lineage:
        """Return the epochs of a generator, whose digest is checked when it is read.

        Raises:
            DamagedStore: Its bytes are not those that were stored.
            GeneratorError: It cannot be opened.
        """
        if self._lineage is None or self._lineage.digests[-1] != generator.blob:
            self._lineage = None
            self._lineage = Lineage(self._store.read_blob(generator.blob))
        return self._lineage

    def base(self, label: str, dtype: torch.dtype | None = None) -> BaseModel:
        """Return a base model, in what suits the device or in a precision of its own.

        Raises:
            BaseModelNotFound: There is no local copy.
        """
        if (label, dtype) not in self._bases:
            self._bases = {key: base for key, base in self._bases.items() if key[0] == label}
            self._bases[label, dtype] = open_base(self._store, label, self._device, dtype)
        return self._bases[label, dtype]
