"""The use cases, one file per verb: the only rooms that know both tensors and rows. `api.py` is the public face."""
