"""Adapters as plain pairs of A and B: MLX-LM and GGUF."""
