"""Run a base model with an adapter."""
