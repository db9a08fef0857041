"""The command line, for the tests of the documentation."""

from tests.cli.conftest import icm

__all__ = ["icm"]
