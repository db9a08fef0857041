"""Train a generator: a resumable loop over a fleet that is streamed, one adapter at a time."""
