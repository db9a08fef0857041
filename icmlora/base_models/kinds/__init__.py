"""One file for each kind of base model."""
