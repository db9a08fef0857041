"""All cases, in the order of docs/compatibility.md."""

from __future__ import annotations

from tests.compat import architectures, damaged, extras, image_files, layers, lora_options, other_methods
from tests.compat.case import Case

CASES: tuple[Case, ...] = (
    *architectures.CASES,
    *lora_options.CASES,
    *layers.CASES,
    *extras.CASES,
    *other_methods.CASES,
    *image_files.CASES,
    *damaged.CASES,
)
