"""Storage: blobs, the database, locks, and their maintenance."""
