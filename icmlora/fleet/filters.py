"""The fields by which a `Fleet` filters and sorts tasks, for callers who do not import `registry`."""

from registry.filters import FIELDS, STATUSES, Field

__all__ = ["FIELDS", "STATUSES", "Field"]
