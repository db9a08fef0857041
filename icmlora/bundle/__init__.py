"""Bundles: one file with a generator and the codes of some tasks."""
