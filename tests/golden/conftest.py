"""The command line, for stores of earlier versions."""

from tests.cli.conftest import icm
from tests.quick import quick_codes

__all__ = ["icm", "quick_codes"]
