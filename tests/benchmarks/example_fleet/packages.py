"""Fetch Debian, PyPI and npm packages with their ordinary clients and unpack them; nothing is installed."""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


class Packages:
    """A folder of downloaded and unpacked packages; several processes may share it.

    Args:
        root: Work folder; archives go to `root/archives`, contents to `root/unpacked`.
    """

    def __init__(self, root: Path) -> None:
        self._archives = root / "archives"
        self._unpacked = root / "unpacked"
        self.versions: dict[str, str] = {}
        """Package -> version of everything asked for so far; Debian serves only its current version, so record it."""

    def unpacked(self, package: str) -> Path:
        """Return the tree of a package written as `deb:NAME`, `pypi:NAME==VERSION` or `npm:NAME@VERSION`."""
        kind, _, rest = package.partition(":")
        if kind == "deb":
            return self.deb(rest)
        name, _, version = rest.rpartition("==" if kind == "pypi" else "@")
        return self.pypi(name, version) if kind == "pypi" else self.npm(name, version)

    def deb(self, name: str) -> Path:
        """Return the unpacked tree of the Debian package `name` in the archive's current version."""
        archive = self._fetch(f"{name}_*.deb", ["apt-get", "download", "-qq", name])
        self.versions[f"deb:{name}"] = archive.name.split("_")[1].replace("%3a", ":")
        return self._unpack(name, lambda target: _run(["dpkg", "-x", str(archive), str(target)]))

    def pypi(self, name: str, version: str) -> Path:
        """Return the unpacked wheel or source archive of a pinned PyPI package."""
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}"]
        archive = self._fetch(f"{re.sub('[-_.]+', '?', name)}-{version}*", command)
        self.versions[f"pypi:{name}"] = version
        return self._unpack(name, lambda target: _extract(archive, target))

    def npm(self, name: str, version: str) -> Path:
        """Return the unpacked tarball of a pinned npm package."""
        file = f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        archive = self._fetch(file, ["npm", "pack", "--silent", f"{name}@{version}"])
        self.versions[f"npm:{name}"] = version
        return self._unpack(name.replace("/", "+"), lambda target: _extract(archive, target))

    def _fetch(self, pattern: str, command: list[str]) -> Path:
        """Return the archive that matches `pattern`, running the client's `command` if it is not there yet."""
        self._archives.mkdir(parents=True, exist_ok=True)
        if not list(self._archives.glob(pattern)):
            # The client writes elsewhere, so that another process never opens half an archive.
            with tempfile.TemporaryDirectory(dir=self._archives) as download:
                _run(command, Path(download))
                for path in Path(download).iterdir():
                    path.replace(self._archives / path.name)
        return next(iter(sorted(self._archives.glob(pattern))))

    def _unpack(self, name: str, extract: Callable[[Path], None]) -> Path:
        """Return the folder of a package; `extract` fills it beside its place, and a rename makes it complete."""
        target = self._unpacked / name
        if not target.is_dir():
            self._unpacked.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=self._unpacked))
            extract(part)
            try:
                part.rename(target)
            except OSError:  # another process was first
                shutil.rmtree(part)
        return target


def _run(command: list[str], folder: Path | None = None) -> None:
    subprocess.run(command, cwd=folder, check=True)


def _extract(archive: Path, target: Path) -> None:
    """Extract a wheel or a tar archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    else:
        with tarfile.open(archive) as source:
            source.extractall(target, filter="data")
