"""What use cases read of a store, and on how many processes."""
