"""Folders of written adapters: written once, never changed, never deleted while somebody may use them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from icmlora.errors import FoldersInUse, FoldersUnusable
from icmlora.io.staging import write_folder
from icmlora.serving.folders import AdapterFolders, default_root

KEY, OTHER = "a" * 64, "b" * 64


def write(directory: Path) -> None:
    write_folder(directory, {"adapter": b"x" * 1000})


def test_a_folder_is_named_after_its_key(tmp_path: Path) -> None:
    folder = AdapterFolders(tmp_path / "root").get(KEY, write)
    assert folder == tmp_path / "root" / f"sha256-{KEY}"
    assert (folder / "adapter").read_bytes() == b"x" * 1000


def test_a_folder_is_written_once_however_many_ask(tmp_path: Path) -> None:
    folders, calls = AdapterFolders(tmp_path / "root"), []
    began = threading.Barrier(8)

    def write_slowly(directory: Path) -> None:
        calls.append(directory)
        write(directory)

    def ask() -> None:
        began.wait()
        folders.get(KEY, write_slowly)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_folder_of_an_earlier_process_is_found_again(tmp_path: Path) -> None:
    first = AdapterFolders(tmp_path / "root")
    first.get(KEY, write)
    first.close()
    AdapterFolders(tmp_path / "root").get(KEY, lambda directory: pytest.fail("it is there already"))


def test_a_failure_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    folders = AdapterFolders(tmp_path / "root")

    def fail(directory: Path) -> None:
        raise ValueError("no such code")

    with pytest.raises(ValueError, match="no such code"):
        folders.get(KEY, fail)
    assert folders.get(KEY, write).is_dir()


def test_nothing_is_written_above_the_limit(tmp_path: Path) -> None:
    folders = AdapterFolders(tmp_path / "root", limit=1000)
    folders.get(KEY, write)
    with pytest.raises(FoldersUnusable, match="the limit is 1000 B"):
        folders.get(OTHER, write)
    assert folders.get(KEY, write).is_dir()


def test_a_process_that_is_alone_deletes_what_it_discards(tmp_path: Path) -> None:
    folders = AdapterFolders(tmp_path / "root", alone=True)
    folder = folders.get(KEY, write)
    folders.discard(KEY)
    assert not folder.exists()
    assert folders.size == 0


def test_the_first_process_makes_room_by_deleting_the_oldest(tmp_path: Path) -> None:
    first = AdapterFolders(tmp_path / "root")
    oldest, newest = first.get(KEY, write), first.get(OTHER, write)
    os.utime(oldest, (1, 1))
    first.close()
    AdapterFolders(tmp_path / "root", limit=2000)
    assert not oldest.exists()
    assert newest.exists()


def test_nothing_is_deleted_while_another_process_has_the_folders(tmp_path: Path) -> None:
    first = AdapterFolders(tmp_path / "root")
    folder = first.get(KEY, write)
    AdapterFolders(tmp_path / "root", limit=1)
    assert folder.exists()


def test_two_processes_share_folders_unless_one_wants_them_alone(tmp_path: Path) -> None:
    shared = AdapterFolders(tmp_path / "root")
    with pytest.raises(FoldersInUse):
        AdapterFolders(tmp_path / "root", alone=True)
    shared.close()
    AdapterFolders(tmp_path / "root", alone=True)


def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    root = tmp_path / "root"
    AdapterFolders(root).close()
    script = (
        "import os, signal, sys; from pathlib import Path; from icmlora.io.staging import building_folder\n"
        "with building_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_bytes(b'x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(root / f"sha256-{KEY}")], check=False)
    assert any(".icm-" in entry.name for entry in root.iterdir())
    assert AdapterFolders(root).get(KEY, write).is_dir()
    assert sorted(entry.name for entry in root.iterdir()) == [".lock", f"sha256-{KEY}"]


def test_the_folders_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    AdapterFolders(tmp_path / "root")
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o700


def test_a_link_in_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FoldersUnusable, match="not a folder owned by this user"):
        AdapterFolders(tmp_path / "root")


def test_a_link_above_the_default_root_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmlora.serving.folders._MEMORY", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"icm-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FoldersUnusable, match="not a folder owned by this user"):
        AdapterFolders(default_root("vllm"))


def test_each_purpose_and_user_has_a_root_of_its_own() -> None:
    assert default_root("vllm") != default_root("gateway")
    assert str(os.getuid()) in str(default_root("vllm"))
