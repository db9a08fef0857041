"""Find adapters in folders, name them, and report unreadable ones."""
