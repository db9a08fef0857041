"""initial_a."""
