"""Immutable bytes, named by their SHA-256.

:class:`Blobs` is `store.blobs`. It names and verifies the bytes; a :class:`registry.storage.blobs.backend.BlobBackend` keeps
them.
"""
