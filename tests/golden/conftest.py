"""The command line, for stores of earlier versions."""

from tests.cli.conftest import icm
from tests.quick import quick_codes
from tests.registry.conftest import postgres

__all__ = ["icm", "postgres", "quick_codes"]
