"""Fixtures of the command line and of small stores, made on the CPU, for tests that go on from there on the card."""

from tests.cli.conftest import icm
from tests.cli.test_recognize import subjects, subjects_template
from tests.icmlora.fleet.conftest import learned, learned_template
from tests.icmlora.serving.conftest import served_template
from tests.quick import quick_codes

__all__ = [
    "icm",
    "learned",
    "learned_template",
    "quick_codes",
    "served_template",
    "subjects",
    "subjects_template",
]
