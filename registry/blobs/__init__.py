"""Immutable bytes, named by the SHA-256 of what they are.

:class:`Blobs` is `store.blobs`. It names and verifies the bytes; a :class:`registry.blobs.backend.BlobBackend` keeps
them.
"""
