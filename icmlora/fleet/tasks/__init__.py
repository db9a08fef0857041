"""List, change, check and clean a store: `icm ls`, `show`, `duplicates`, `generators`, `verify`, `prune`."""
