"""The command line, for the tests of the documentation."""

from tests.cli.conftest import icm
from tests.quick import quick_codes

__all__ = ["icm", "quick_codes"]
