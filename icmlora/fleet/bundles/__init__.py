"""Tasks in one file: `icm export`, `icm import`."""
