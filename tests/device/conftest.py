"""Which tests a session collects from here: those for the device that it stands in for (`session.py`)."""

from pathlib import Path

import pytest

from tests.device.session import wanted, why_missing

_HERE = Path(__file__).parent
collect_ignore = [kind for kind in ("cuda", "mps") if kind != wanted()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of a device that cannot be stood in for."""
    reason = why_missing()
    for item in items:
        if reason is not None and _HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"there is no stand-in for a card here: {reason}"))
