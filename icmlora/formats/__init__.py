"""Adapters on disk: formats, and discovery of adapters in a tree."""
