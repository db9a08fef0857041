"""Train or update a generator: `icm train`."""
