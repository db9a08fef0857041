"""Adapters as tokens, the network over them, and its loss: the length of a code in bits."""
