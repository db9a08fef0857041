"""Tensors in, tensors out: adapters, task vectors, generators. No SQL, no printing, no home folder."""
