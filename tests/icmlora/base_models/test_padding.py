"""Texts of different lengths as one batch."""

from __future__ import annotations

import torch

from icmlora.base_models.kinds.likelihood import padded


def test_short_rows_are_padded_on_the_right_and_masked() -> None:
    ids, mask = padded([[5, 6, 7], [8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
