"""Adapters in: `icm ingest`."""
