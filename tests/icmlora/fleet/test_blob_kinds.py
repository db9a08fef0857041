"""What a blob is, by how it begins."""

from __future__ import annotations

import pytest
from safetensors.torch import save
from torch import zeros

from icmlora.fleet.tasks.verify import kind_of
from icmlora.generator import code, file
from icmlora.task_vectors import file as vectors


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (code.MAGIC, "code"),
        *((magic, "generator") for magic in (file.MAGIC, file.MAGIC_OF_VERSIONS)),
        (vectors._MAGIC, "task vectors"),
        (save({"a": zeros(3)}), "weights"),
        (b'{"r": 8, "lora_alpha": 16}', None),
        (b"# A card of an adapter", None),
        (b"", None),
    ],
)
def test_a_blob_is_known_by_its_first_bytes(start: bytes, kind: str | None) -> None:
    assert kind_of(start) == kind
