"""Single-file adapters of image models."""
