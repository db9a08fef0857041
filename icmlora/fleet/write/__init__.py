"""Adapters out: `icm materialize`."""
