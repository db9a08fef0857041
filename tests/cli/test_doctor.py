"""`icm doctor`, and `icm doctor --path`."""

import fcntl
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from icm_cli.errors import ExitCode
from icmlora.fleet.tasks.doctor import has_wal_reset_bug
from icmlora.io import cards
from registry.storage.folder import FORMAT_TEXT
from tests.cli.conftest import Ran
from tests.cli.homeless import leave_home

Icm = Callable[..., Ran]


def test_doctor_shows_versions_and_where_settings_come_from(icm: Icm) -> None:
    ran = icm("doctor")
    assert ran.code == 0
    assert "(ICM_STORE)" in ran.out
    assert "sqlalchemy" in ran.out


def test_doctor_says_the_same_in_json(icm: Icm, tmp_path: Path) -> None:
    document = icm("doctor", "--json").document
    assert document["ok"] is True
    assert document["settings"]["store"] == {"value": str(tmp_path / "store"), "source": "ICM_STORE"}
    assert document["checks"]["free_bytes"]["value"] > 0


def test_doctor_finds_a_file_that_is_not_a_database(icm: Icm, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "FORMAT").write_text(FORMAT_TEXT)
    (store / "lock").touch()
    (store / "registry.db").write_text("not a database, but long enough to look at" * 100)
    ran = icm("doctor", "--json")
    assert ran.code == 1
    assert "not a database" in ran.document["checks"]["store"]["problem"]


def test_doctor_finds_nothing_wrong_with_a_good_store(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    document = icm("doctor", "--json").document
    assert (document["ok"], document["checks"]["store"]) == (True, {"value": FORMAT_TEXT.strip(), "problem": None})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


@pytest.mark.parametrize(
    ("file", "content", "code", "fact"),
    [
        ("registry.db", "", ExitCode.DAMAGED, "icm verify --repair"),
        ("FORMAT", "icm manifests 9\n", ExitCode.OTHER_VERSION, "'icm manifests 9'"),
        ("FORMAT", "icm store 2\n", ExitCode.OTHER_VERSION, "created by icm 0.x"),
        ("registry.db", None, ExitCode.DAMAGED, "is missing; run `icm verify --repair`"),
        ("lock", None, ExitCode.FAILED, "lock"),
    ],
)
def test_doctor_says_why_other_commands_refuse_the_store(
    icm: Icm, stored: Path, tmp_path: Path, file: str, content: str | None, code: ExitCode, fact: str
) -> None:
    path = tmp_path / "store" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    refused, ran = icm("ls", "--json"), icm("doctor", "--json")
    problem = ran.document["checks"]["store"]["problem"]
    assert (refused.code, ran.code, ran.document["ok"]) == (code, ExitCode.FAILED, False)
    assert problem.startswith(refused.error["message"])
    assert (fact in problem, problem in icm("doctor").err) == (True, True)


def test_doctor_finds_a_damaged_page(icm: Icm, stored: Path, tmp_path: Path) -> None:
    database = tmp_path / "store" / "registry.db"
    data = bytearray(database.read_bytes())
    data[-300:-200] = bytes(100)
    database.write_bytes(data)
    ran = icm("doctor", "--json")
    checks = ran.document["checks"]
    problem = checks.get("database", {}).get("problem") or checks["store"]["problem"]
    assert (ran.code, "icm verify --repair" in problem) == (ExitCode.FAILED, True)


def test_doctor_says_that_the_store_is_locked(icm: Icm, stored: Path, tmp_path: Path) -> None:
    with (tmp_path / "store" / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ran = icm("doctor", "--lock-timeout", "0", "--json")
    assert (ran.code, "is in use" in ran.document["checks"]["store"]["problem"]) == (ExitCode.FAILED, True)


def test_doctor_creates_no_store(icm: Icm, tmp_path: Path) -> None:
    icm("doctor")
    assert not (tmp_path / "store").exists()


@pytest.fixture
def cardless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a card, and a build of torch without CUDA; return its folder of programs, and of devices."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cards, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return tmp_path


@pytest.fixture
def carded(cardless: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two cards that torch computes on; the second one is old, and full."""
    facts = (
        SimpleNamespace(name="NVIDIA L4", total_memory=23 << 30, major=8),
        SimpleNamespace(name="Tesla T4", total_memory=15 << 30, major=7),
    )

    def free_and_total(index: int) -> tuple[int, int]:
        if index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 20 << 30, 23 << 30

    write_nvidia_smi(cardless, "580.65.06, NVIDIA L4\n580.65.06, Tesla T4")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(facts))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_total)
    return cardless


def write_nvidia_smi(folder: Path, answer: str, status: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{answer}'\nexit {status}\n")
    program.chmod(0o755)


def test_doctor_shows_each_card_with_its_memory_and_whether_it_computes_bfloat16(icm: Icm, carded: Path) -> None:
    ran, document = icm("doctor"), icm("doctor", "--json").document
    assert [line.split(maxsplit=1)[1] for line in ran.out.splitlines() if line.startswith("cuda:")] == [
        "NVIDIA L4: 23.0 GiB, 20.0 GiB free, bfloat16",
        "Tesla T4: 15.0 GiB, no bfloat16",
    ]
    first = {"name": "NVIDIA L4", "memory_bytes": 23 << 30, "free_bytes": 20 << 30, "bfloat16": True}
    assert (ran.code, document["checks"]["cuda:0"]["value"]) == (0, first)
    assert document["checks"]["cuda:1"]["value"]["free_bytes"] is None


def test_doctor_shows_the_versions_of_cuda_and_of_the_driver(icm: Icm, carded: Path) -> None:
    checks = icm("doctor", "--json").document["checks"]
    assert checks["torch_built_for"]["value"] == "CUDA 13.0"
    assert checks["nvidia_driver"]["value"] == "580.65.06"


def test_doctor_shows_cards_under_rocm_and_mps(icm: Icm, carded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 << 30)
    (carded / "nvidia-smi").unlink()
    ran = icm("doctor", "--json")
    checks = ran.document["checks"]
    assert (ran.code, checks["torch_built_for"]["value"]) == (0, "ROCm 7.2")
    mac = {"name": "Apple GPU", "memory_bytes": 10 << 30, "free_bytes": None, "bfloat16": True}
    assert checks["mps"]["value"] == mac


@pytest.mark.parametrize(("driver", "build"), [("610.10", "cu130"), ("580.65.06", "cu130"), ("570.86.10", "cu126")])
def test_doctor_names_the_command_that_gives_torch_a_cuda_build_for_the_card(
    icm: Icm, cardless: Path, driver: str, build: str
) -> None:
    write_nvidia_smi(cardless, f"{driver}, NVIDIA L4")
    ran = icm("doctor", "--json")
    assert (ran.code, ran.document["checks"]["cuda"]["value"]) == (ExitCode.FAILED, "none")
    assert ran.document["checks"]["cuda"]["problem"] == (
        "this machine has NVIDIA L4, but this build of torch has no CUDA; "
        f"run `pip install --upgrade torch --index-url https://download.pytorch.org/whl/{build}` "
        "to install one with CUDA"
    )
    assert len([line for line in icm("doctor").err.splitlines() if "cuda:" in line]) == 1


def test_a_card_whose_driver_is_out_of_reach_is_mentioned_but_is_no_problem(icm: Icm, cardless: Path) -> None:
    write_nvidia_smi(cardless, "NVIDIA-SMI has failed because it could not communicate with the driver", status=9)
    device = cardless / "pci" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    ran = icm("doctor", "--json")
    assert ran.code == 0
    assert ran.document["checks"]["nvidia_driver"]["value"] == "none, although this machine has an NVIDIA card"


def test_doctor_says_why_torch_reaches_no_card(icm: Icm, carded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it.", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    ran = icm("doctor", "--json")
    assert (ran.code, ran.document["checks"]["cuda"]["problem"]) == (
        ExitCode.FAILED,
        "The NVIDIA driver on your system is too old (found version 11040).",
    )


def test_doctor_survives_a_card_that_fails(icm: Icm, carded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("CUDA unknown error")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert icm("doctor", "--json").document["checks"]["cuda"] == {"value": "none", "problem": "CUDA unknown error"}


@pytest.mark.parametrize(
    ("release", "affected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 46, 1), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
    ],
)
def test_the_sqlite_releases_with_the_wal_reset_bug_are_known(release: tuple[int, ...], affected: bool) -> None:
    assert has_wal_reset_bug(release) is affected


@pytest.mark.parametrize(
    ("what", "end"),
    [("store", "store"), ("db", "store/registry.db"), ("blobs", "store/blobs"), ("config", "config/icm/config.toml")],
)
def test_path_prints_where_things_are(icm: Icm, tmp_path: Path, what: str, end: str) -> None:
    assert icm("doctor", "--path", what).out == f"{tmp_path / end}\n"


def test_path_answers_in_json(icm: Icm, tmp_path: Path) -> None:
    assert icm("doctor", "--path", "log", "--json").document == {
        "name": "log",
        "path": str(tmp_path / "state" / "icm" / "errors.log"),
    }


def test_path_needs_no_home_for_paths_outside_it(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_home(monkeypatch)
    assert icm("doctor", "--path", "store").code == 0
    assert icm("doctor", "--path", "log").code == ExitCode.USAGE
    monkeypatch.delenv("ICM_STORE")
    monkeypatch.setenv("ICM_LOG", "/log")
    assert icm("doctor", "--path", "log").out == "/log\n"
    ran = icm("doctor", "--path", "store")
    assert (ran.code, "set HOME or XDG_DATA_HOME or ICM_STORE" in ran.err) == (ExitCode.USAGE, True)
