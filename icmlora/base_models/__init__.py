"""base_models."""
