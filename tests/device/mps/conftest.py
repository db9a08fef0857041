"""The fixture of the command line, for tests on the stand-in."""

from tests.cli.conftest import icm

__all__ = ["icm"]
