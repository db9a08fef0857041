"""What a fleet takes and what it saved: `icm stats`."""
