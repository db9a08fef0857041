"""Storage of `icm`: rows and bytes, in one folder that survives crashes.

The only entry point is :class:`registry.store.Store`; everything else implements its guarantees:

    caller ──▶ Store ──▶ blobs   content-addressed files, written first, fsync'ed, never changed
                   └──▶ engine  SQLite rows that refer to blobs, committed last

This package knows nothing of tensors: it imports neither torch nor numpy.
"""
