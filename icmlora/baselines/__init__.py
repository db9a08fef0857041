"""What else a fleet could be stored as: the methods that icm is compared with, as real bytes that are read back."""
