"""One file per command: parse, call a workflow, print through `Output`."""
