"""The failures that are expected today. Whoever makes one pass takes it off this list, and runs `make docs`."""

from __future__ import annotations

# PEFT does not load them like the others.
_NOT_LOADED = """
dora-float32-magnitudes no-prefix no-tensors not-a-number infinity wrong-rank adalora-finished poly adaption-prompt
kasa monteclora velora init-pissa-niter-4 init-corda init-loftq float64 float8
"""


def _because(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


NOT_YET: dict[str, dict[str, str]] = {
    "test_peft_loads_original_and_code_alike": _because("not loaded alike", _NOT_LOADED),
}
"""Name of a test -> name of a case or a tree -> why it fails."""
