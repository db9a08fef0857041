"""The command line, for the tests of the documentation."""

from tests.cli.conftest import icm
from tests.refining import short_refining

__all__ = ["icm", "short_refining"]
