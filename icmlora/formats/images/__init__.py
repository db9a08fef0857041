"""Adapters of image models, in one file."""
