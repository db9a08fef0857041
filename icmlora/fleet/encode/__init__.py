"""Make codes again, as small as limits allow: `icm encode`."""
