"""One file for each thing that rows tell of."""
