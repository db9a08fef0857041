"""Immutable bytes, named by their SHA-256.

`Blobs` is `store.blobs`. It names and verifies the bytes; a `BlobBackend` stores them.
"""
