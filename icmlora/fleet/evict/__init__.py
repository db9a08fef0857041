"""Delete originals and bring them back: `icm evict`, `icm restore`."""
