"""A revision for each schema; alembic finds them by their place."""
