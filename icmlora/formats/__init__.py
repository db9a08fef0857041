"""Adapters on disk: one file per format, and how adapters are found in a tree."""
