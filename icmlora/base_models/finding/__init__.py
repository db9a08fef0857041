"""Where a base model is on this machine, and which one it is."""
