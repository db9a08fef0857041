"""The size of a fleet and its savings: `icm stats`."""
