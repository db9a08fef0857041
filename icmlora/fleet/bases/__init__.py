"""The base models that a store knows: `icm base`."""
