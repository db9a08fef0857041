"""Output is replaced, not destroyed: an error at any step leaves the old files, a kill leaves one adapter or none."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from icmlora.io import staging
from icmlora.io.staging import write_files, write_folder, writing_file
from registry import files as fs
from tests.registry.children import KILLED, run

CALLS = ("create", "write", "write_file", "fsync", "fsync_dir", "replace", "exchange")
OLD = {"tokenizer.json": b"old words", "weights": b"old weights", "config": b"old config"}
NEW = {"weights": b"new weights", "tokenizer.json": b"new words", "config": b"new config"}
Write = Callable[[Path], None]


def one_file(folder: Path) -> None:
    with writing_file(folder / "config", force=True) as stream:
        stream.write(NEW["config"])


def several_files(folder: Path) -> None:
    write_files(folder, NEW, force=True)


def whole_folder(folder: Path) -> None:
    write_folder(folder, NEW, force=True)


def folder_with_folders(folder: Path) -> None:
    (folder / "checkpoint-10").mkdir(exist_ok=True)
    write_folder(folder, NEW, force=True)


WAYS: dict[str, Write] = {way.__name__: way for way in (one_file, several_files, whole_folder, folder_with_folders)}


@pytest.fixture(params=["atomic", "by renames"])
def out(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter in a folder beside a file of somebody else, on a file system that exchanges names, or cannot."""
    if request.param == "by renames":
        monkeypatch.setattr(fs, "_exchanged", lambda first, second: False)
    folder = tmp_path / "out"
    folder.mkdir()
    for name, data in (OLD | {"mine": b"x"}).items():
        (folder / name).write_bytes(data)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def at_each_call(
    stop: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, write: Write, out: Path
) -> Iterator[int]:
    """Run `write` again and again, `stop` being called before its first call to the system, its second, and so on."""
    for number in range(1, 100):
        left = [number]

        def counted(name: str, where: ModuleType, left: list[int] = left) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    stop(name)
                return getattr(where, name)(*arguments)

            return call

        monkeypatch.setattr(staging, "fs", SimpleNamespace(**vars(fs) | {name: counted(name, fs) for name in CALLS}))
        monkeypatch.setattr(fs, "os", SimpleNamespace(**vars(os) | {"rename": counted("rename", os)}))
        yield number
        if left[0] > 0:
            return


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("way", WAYS)
def test_an_error_at_any_step_leaves_the_old_files_and_nothing_else(
    out: Path, monkeypatch: pytest.MonkeyPatch, way: str, number: int
) -> None:
    before = content(out)

    def fail(name: str) -> None:
        raise OSError(number, os.strerror(number))

    steps = 0
    for steps in at_each_call(fail, monkeypatch, WAYS[way], out):
        try:
            WAYS[way](out)
        except OSError:
            assert content(out) == before, steps
            assert [path.name for path in out.parent.iterdir()] == ["out"], steps
    assert steps > 4
    assert content(out) == before | (NEW if way != "one_file" else {"config": NEW["config"]})


@pytest.mark.parametrize("way", WAYS)
def test_a_kill_at_any_step_leaves_one_adapter_or_none_and_the_next_run_completes_it(
    out: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    before = content(out)
    after = before | (NEW if way != "one_file" else {"config": NEW["config"]})
    for steps in at_each_call(lambda name: os.kill(os.getpid(), signal.SIGKILL), monkeypatch, WAYS[way], out):
        status = run(lambda: WAYS[way](out))
        found = content(out) if out.exists() else {}
        assert "config" not in found or found.items() >= before.items() or found.items() >= after.items(), steps
        if status != KILLED:
            break
        monkeypatch.setattr(staging, "fs", fs)
        monkeypatch.setattr(fs, "os", os)
        WAYS[way](out)
        assert content(out) == after
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        restore(out, before)


def restore(out: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (out / name).write_bytes(data)


def test_a_folder_keeps_its_mode_and_its_other_files_are_the_same_ones(out: Path) -> None:
    out.chmod(0o750)
    (out / "link").symlink_to("mine")
    mine = (out / "mine").stat().st_ino
    whole_folder(out)
    assert (out.stat().st_mode & 0o777, (out / "mine").stat().st_ino, os.readlink(out / "link")) == (
        0o750,
        mine,
        "mine",
    )
    assert (out / "mine").stat().st_nlink == 1


def test_a_reader_sees_a_whole_folder_at_every_step(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    seen: list[dict[str, bytes]] = []
    real = fs.exchange

    def exchange(first: Path, second: Path, aside: Path) -> None:
        seen.append(content(out))
        real(first, second, aside)
        seen.append(content(out))

    monkeypatch.setattr(fs, "exchange", exchange)
    whole_folder(out)
    assert seen == [OLD | {"mine": b"x"}, NEW | {"mine": b"x"}]


def test_what_somebody_adds_meanwhile_stays(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fs.exchange

    def exchange(first: Path, second: Path, aside: Path) -> None:
        (out / "added").write_bytes(b"a")
        (out / "checkpoint-10").mkdir()
        real(first, second, aside)

    monkeypatch.setattr(fs, "exchange", exchange)
    whole_folder(out)
    assert content(out) == NEW | {"mine": b"x", "added": b"a"}
    assert (out / "checkpoint-10").is_dir()
