"""Fetch Debian and PyPI packages with their ordinary clients and unpack them; nothing is installed."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


class Packages:
    """A folder of downloaded and unpacked packages.

    Args:
        root: Work folder; archives go to `root/archives`, contents to `root/unpacked`.
    """

    def __init__(self, root: Path) -> None:
        self._archives = root / "archives"
        self._unpacked = root / "unpacked"
        self.versions: dict[str, str] = {}
        """Package -> version of everything asked for so far; Debian serves only its current version, so record it."""

    def deb(self, name: str) -> Path:
        """Return the unpacked tree of the Debian package `name` in the archive's current version."""
        archive = self._fetch(f"{name}_*.deb", ["apt-get", "download", "-qq", name])
        self.versions[f"deb:{name}"] = archive.name.split("_")[1].replace("%3a", ":")
        target = self._unpacked / name
        if not target.is_dir():
            subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)
        return target

    def pypi(self, name: str, version: str) -> Path:
        """Return the unpacked wheel or source archive of a pinned PyPI package."""
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}"]
        archive = self._fetch(f"{name.replace('-', '_')}-{version}*", command)
        self.versions[f"pypi:{name}"] = version
        target = self._unpacked / name
        if target.is_dir():
            return target
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(target)
        else:
            with tarfile.open(archive) as source:
                source.extractall(target, filter="data")
        return target

    def _fetch(self, pattern: str, command: list[str]) -> Path:
        """Return the archive that matches `pattern`, running the client's `command` if it is not there yet."""
        self._archives.mkdir(parents=True, exist_ok=True)
        if not list(self._archives.glob(pattern)):
            subprocess.run(command, cwd=self._archives, check=True)
        return next(iter(sorted(self._archives.glob(pattern))))
