"""The generator: a conditional variational autoencoder over adapter tokens, and the codec built on it."""
