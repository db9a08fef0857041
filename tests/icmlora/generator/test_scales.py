"""The tables that both ends of the coder compute for themselves."""

from __future__ import annotations

import numpy as np
import pytest

from icmlora.generator.scales import LARGEST, SMALLEST, centres, frequencies, probabilities, reach_of, tables_digest

ALL = range(SMALLEST, LARGEST + 1)


def test_every_symbol_of_every_table_can_be_written() -> None:
    assert all(frequencies(index).min() >= 1 and len(frequencies(index)) == 2 * reach_of(index) + 1 for index in ALL)


def test_tables_are_symmetric_probabilities() -> None:
    for index in ALL:
        assert probabilities(index).sum() == pytest.approx(1.0)
        np.testing.assert_array_equal(frequencies(index), frequencies(index)[::-1])


def test_a_magnitude_is_reconstructed_inside_its_bin() -> None:
    for index in ALL:
        low = np.arange(1, len(centres(index))) - 0.5
        assert centres(index)[0] == 0.0
        assert len(low) > 16 * 2 ** (index / 8)
        assert ((centres(index)[1:] >= low) & (centres(index)[1:] <= low + 1)).all()


def test_a_narrow_scale_reconstructs_nearer_to_zero_than_a_wide_one() -> None:
    assert centres(SMALLEST + 16)[1] < centres(LARGEST)[1] < 1.2


def test_the_digest_names_these_tables() -> None:
    # Codes already written are unreadable under other tables: a change here is a new format.
    assert tables_digest() == "37c7608bfa1dc11d4600222b0f620f58f97dfde41816065954eae1cd690f755f"
