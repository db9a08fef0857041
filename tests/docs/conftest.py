"""The stores that the tests of the command line use."""

from tests.cli.conftest import icm, mixed, mixed_template, trained, trained_template

__all__ = ["icm", "mixed", "mixed_template", "trained", "trained_template"]
