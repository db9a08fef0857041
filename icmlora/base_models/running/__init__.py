"""A base model with an adapter on it."""
