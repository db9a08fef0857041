"""Tasks as a map: `icm map`."""
