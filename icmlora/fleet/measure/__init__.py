"""What a code or an adapter loses, on held-out text and in numbers: `icm eval`."""
