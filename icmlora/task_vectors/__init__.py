"""Task vectors: extract them with the base model, store them, and compare tasks by them."""
