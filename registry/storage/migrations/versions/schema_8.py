"""Schema 8, that of icm 0.9: where SQLite's stores begin."""

revision = "8"
down_revision = None
