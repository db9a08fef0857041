"""Bytes on disk: blobs, the database file, locks, and what keeps them sound."""
