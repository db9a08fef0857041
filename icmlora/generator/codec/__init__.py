"""Encode adapters as codes, and decode codes to adapters."""
