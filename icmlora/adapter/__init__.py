"""In-memory adapters: layout, canonical form, arithmetic and distances."""
