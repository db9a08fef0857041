"""Adapters from one format to another, without a store: `icm convert`."""
