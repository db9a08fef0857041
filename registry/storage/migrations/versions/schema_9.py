"""Schema 9: generators, codes, residuals and task vectors are written in other formats. PostgreSQL's stores begin here.

No table changes: the number keeps icm 0.9 from a store whose codes it would call damaged. Generators and codes stay,
for that icm to read: see `icmlora.fleet.older`. Vectors are made again.
"""

from contextlib import closing
from pathlib import Path

from alembic import op
from sqlalchemy import Connection

from registry import files as fs
from registry.storage.sqlite import connect, copy_of

revision = "9"
down_revision = "8"


def upgrade() -> None:
    """Move a store in SQLite to this schema."""
    connection = op.get_bind()
    if connection.exec_driver_sql("SELECT 1 FROM codes LIMIT 1").first() is not None:
        _keep_for_earlier_icm(connection)
    connection.exec_driver_sql("DELETE FROM task_vectors")


def _keep_for_earlier_icm(connection: Connection) -> None:
    """Keep the database as it was, next to it. Nothing here reads that file, and nothing deletes it."""
    path = Path(connection.exec_driver_sql("PRAGMA database_list").all()[0][2])
    # Another connection: it sees nothing of this transaction.
    with closing(connect(path, read_only=True, busy_timeout=0, create=False)) as before:
        content = copy_of(before)
    kept = path.with_name(f"{path.name}.schema-{down_revision}")
    temporary = kept.with_name(f"{kept.name}.tmp")
    with fs.store_errors(kept):
        fs.discard(temporary)
        fs.write_file(temporary, content, 0o600)
        fs.replace(temporary, kept)
        fs.fsync_dir(kept.parent)
