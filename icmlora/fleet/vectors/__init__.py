"""Task vectors and whose they are: `icm vectors`, `icm recognize`."""
