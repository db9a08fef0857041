"""lmzip: lossless, one archive for the whole fleet as it is on disk. A chunk belongs to the task it starts in."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from icmlora.formats.discovery.folder import load_adapter
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.method import Coded
from tests.benchmarks.rate_distortion.peers import disk_size, imported, installed_version, stage


@dataclass(frozen=True)
class Lmzip:
    """The package with its default level."""

    package: str = "lmzip"

    def identity(self) -> str:
        """Return the installed version."""
        return f"{self} {installed_version(self.package)}"

    def code(self, fleet: FleetFolder, work: Path) -> Coded:
        """Compress the staged fleet and unpack it again."""
        lmz = imported("lmz")
        shutil.rmtree(work, ignore_errors=True)
        stage(fleet, list(fleet), work / "staged", exact=True)
        archive, unpacked = work / "fleet.lmz", work / "unpacked"
        lmz.compress(str(work / "staged"), str(archive), workers=1)
        lmz.decompress(str(archive), str(unpacked), workers=1, overwrite=True)
        index = lmz.ArchiveIndex(str(archive))
        sizes = dict.fromkeys(fleet, 0)
        starts = sorted((member.dst, member.path.split("/")[0]) for member in index.members)
        for chunk in index.chunks():
            sizes[starts[bisect_right(starts, (chunk.dst, "\U0010ffff")) - 1][1]] += chunk.clen
        shared = disk_size(archive) - sum(sizes.values())
        notes = {"package": self.package, "version": installed_version(self.package)}
        return Coded(shared, sizes, lambda task: load_adapter(unpacked / task), notes)
