"""The bytes of a generator: containers, entropy coding, networks and differences between versions."""
