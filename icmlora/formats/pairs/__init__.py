"""Adapters with plain pairs of A and B: MLX-LM and GGUF."""
