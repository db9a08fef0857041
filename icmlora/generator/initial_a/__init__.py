"""The A that an adapter's training began with: its seed, its draws, and how knowing them makes codes smaller."""
