"""Fixtures of the command line and of small stores, made on the CPU, for tests that go on from there on the card."""

from tests.cli.conftest import icm
from tests.cli.test_recognize import subjects, subjects_template

__all__ = ["icm", "subjects", "subjects_template"]
