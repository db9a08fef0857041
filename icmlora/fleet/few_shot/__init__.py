"""Adapters for tasks that have none: `icm generate`."""
