"""`icm log`: list the versions of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.command import Call, command
from icm_cli.output import Field
from icm_cli.session import Session
from icmlora.fleet.tasks.log import list_versions, stored_files
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from registry.manifests import Task


@command(list_versions)
def log(session: Session, call: Call[list[Task]]) -> None:
    versions = call.now()[::-1]
    aliases = versions[0].aliases
    stored = {version.version: sum(file.size for file in stored_files(version)) for version in versions}
    fields: tuple[Field[Task], ...] = (
        Field("version", lambda version: str(version.version), right=True),
        Field("date", lambda version: version.final.created_at),
        Field("source", lambda version: version.final.source, shrink=True),
        Field("original", lambda version: human_size(version.final.original_bytes), right=True),
        Field("stored", lambda version: human_size(stored[version.version]), right=True),
        Field("kept", lambda version: ", ".join(_kept(version))),
        Field("aliases", lambda version: " ".join(_aliases(version, aliases)), is_rare=True),
    )
    session.out.document(
        [
            {
                "task": version.name,
                "version": version.version,
                "created_at": version.final.created_at,
                "source": version.final.source,
                "original_size": version.final.original_bytes,
                "stored_size": stored[version.version],
                "evicted_at": version.final.evicted_at,
                "code_size": None if version.code is None else version.code.size,
                "checkpoints_count": sum(not checkpoint.is_evicted for checkpoint in version.checkpoints),
                "aliases": _aliases(version, aliases),
            }
            for version in versions
        ]
    )
    session.out.names(f"{version.name}@{version.version}" for version in versions)
    session.out.listing(fields, versions)


def _kept(version: Task) -> list[str]:
    checkpoints = sum(not checkpoint.is_evicted for checkpoint in version.checkpoints)
    return [
        *([] if version.final.is_evicted else ["original"]),
        *([] if version.code is None else ["code"]),
        *([counted(checkpoints, "checkpoint")] if checkpoints else []),
    ]


def _aliases(version: Task, aliases: Mapping[str, int]) -> list[str]:
    return sorted(alias for alias, number in aliases.items() if number == version.version)
