"""Find adapters in folders, name them, and say what cannot be read."""
