"""Locks between processes: one for the store, and one for the jobs of each base model.

    store lock   shared while a process uses the store, exclusive while one deletes bytes
    job lock     exclusive while a process trains, updates or evicts for one base model, shared while processes encode
                 tasks of it

**One order.** A process waits for a job lock only while it does not hold the store lock: it gives that up, waits, and
takes it again. Whoever waits for the exclusive store lock has given up the shared one too. So those who wait hold job
locks at most, and those who hold the store lock wait for nothing: no two processes ever wait for each other.

**One deadline.** All waits of a command together take no longer than its `Patience`, those for the database included.

While one has just begun to wait for the exclusive store lock, those who come to read let it go first, for two seconds
at most: on a busy store there would never be a moment without a reader.
"""
