"""The `icm` command line: parses, prints and maps errors; the use cases are in `icmlora.fleet`."""
