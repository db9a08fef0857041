"""The fixture of the command line, for tests on the stand-in."""

from tests.cli.conftest import icm
from tests.quick import quick_codes

__all__ = ["icm", "quick_codes"]
