"""The methods that adapters can be merged with. Never imports torch."""

from __future__ import annotations

from typing import Literal, get_args

MergeMethod = Literal[
    "svd",
    "cat",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
"""Method names as in PEFT."""
METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)
OF_ONE_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods that merge A with A and B with B, and so need equal ranks."""
WITH_DENSITY = tuple(name for name in METHODS if name not in ("svd", "cat", "linear"))
"""Methods that keep a share of the values."""
