"""Rows and bytes: what `icm` stores, in one folder that survives crashes.

The only door is :class:`registry.store.Store`. Everything else here is how it keeps its promises:

    caller ──▶ Store ──▶ blobs   content-addressed files, written first, fsync'ed, never changed
                   └──▶ engine  SQLite rows that refer to blobs, committed last

This package knows nothing of tensors: it imports neither torch nor numpy.
"""
