"""An adapter in memory: its layout, its canonical form, arithmetic and distances."""
