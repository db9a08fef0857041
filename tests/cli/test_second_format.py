"""A second adapter format goes through the whole program once it is registered, and PEFT folders beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from icmlora.adapter.metrics import squared_error
from icmlora.formats import catalogue
from icmlora.formats.discovery.folder import load_adapter
from icmlora.formats.format import Template
from icmlora.formats.peft.peft import PEFT
from icmlora.io.safetensors import RawTensor
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import STEPS, write_lora
from tests.icmlora.formats.toy_format import ToyFormat

Icm = Callable[..., Ran]
TOY = ToyFormat()
TRAIN = ("train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "FORMATS", [PEFT, TOY])


def toy_file(folder: Path, name: str, seed: int, **extras: RawTensor) -> Path:
    """Write one of the tiny fleet's adapters as a single file, and return it."""
    adapter = load_adapter(write_lora(folder.parent / "peft" / name, seed=seed))
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.toy"
    like = Template(b"", adapter.layout, "F32")
    file.write_bytes(TOY.encode(adapter, dtype="float32", card="", metadata={}, like=like, extras=extras).weights)
    return file


@pytest.fixture
def files(icm: Icm, tmp_path: Path) -> dict[str, Path]:
    """Two tasks in single files and one in a PEFT folder, ingested together."""
    folder = tmp_path / "toys"
    files = {name: toy_file(folder, name, seed) for seed, name in enumerate(("rust", "sql"))}
    write_lora(folder / "poems", seed=7)
    assert icm("ingest", folder, "--no-vectors").code == 0
    return files


def test_single_files_and_folders_are_tasks_of_one_fleet(icm: Icm, files: dict[str, Path]) -> None:
    assert [task["name"] for task in icm("ls", "--json").document] == ["poems", "rust", "sql"]


def test_the_store_notes_the_format_of_each(icm: Icm, files: dict[str, Path], tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", read_only=True) as opened:
        assert [opened.task(name).final.format for name in ("poems", "rust", "sql")] == ["peft", "toy", "toy"]


def test_an_original_comes_back_byte_for_byte(icm: Icm, files: dict[str, Path], tmp_path: Path) -> None:
    assert icm("materialize", "rust", "-o", tmp_path / "out").code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rust.toy"]
    assert (tmp_path / "out" / "rust.toy").read_bytes() == files["rust"].read_bytes()


def test_the_same_files_again_are_known(icm: Icm, files: dict[str, Path], tmp_path: Path) -> None:
    ran = icm("ingest", tmp_path / "toys", "--no-vectors", "--json")
    assert (ran.code, {event["status"] for event in ran.events if "status" in event}) == (0, {"known"})


@pytest.mark.slow
def test_a_code_is_written_in_the_format_of_its_original(icm: Icm, files: dict[str, Path], tmp_path: Path) -> None:
    assert icm(*TRAIN).code == 0
    ran = icm("materialize", "sql", "-o", tmp_path / "out", "--source", "code", "--dtype", "float32", "--json")
    assert ran.code == 0
    original = TOY.read(b"", files["sql"].read_bytes()).adapter
    decoded = TOY.read(b"", (tmp_path / "out" / "sql.toy").read_bytes()).adapter
    assert squared_error(original, decoded) == pytest.approx(ran.document["squared_error"], rel=1e-3)


def test_an_evicted_original_is_restored_from_the_same_file(icm: Icm, files: dict[str, Path], tmp_path: Path) -> None:
    icm(*TRAIN)
    assert icm("evict", "sql", "--max-error", "10").code == 0
    assert icm("ingest", "--restore", files["sql"], "--no-vectors").code == 0
    assert icm("materialize", "sql", "-o", tmp_path / "out", "--source", "original").code == 0
    assert (tmp_path / "out" / "sql.toy").read_bytes() == files["sql"].read_bytes()


@pytest.mark.slow
def test_a_code_of_an_adapter_with_an_extra_brings_it_back(icm: Icm, tmp_path: Path) -> None:
    head = RawTensor("F32", (1,), b"\0\0\x80\x3f")
    file = toy_file(tmp_path / "toys", "headed", 3, head=head)
    assert icm("ingest", file, "--no-vectors").code == 0
    icm(*TRAIN)
    assert icm("materialize", "headed", "--source", "code", "-o", tmp_path / "out").code == 0
    (written,) = (path for path in (tmp_path / "out").iterdir() if path.suffix == ".toy")
    assert ToyFormat().read(b"", written.read_bytes()).extras == {"head": head}


def test_a_damaged_file_is_refused_and_the_others_are_taken(icm: Icm, tmp_path: Path) -> None:
    toy_file(tmp_path / "toys", "rust", 0)
    (tmp_path / "toys" / "broken.toy").write_bytes(b"toy 1\n{}\n")
    ran = icm("ingest", tmp_path / "toys", "--no-vectors", "--json")
    assert [event["task"] for event in ran.events if "status" in event] == ["rust"]
    assert [Path(event["path"]).name for event in ran.events if event["type"] == "problem"] == ["broken.toy"]


@pytest.mark.slow
def test_a_bundle_takes_adapters_of_every_format(icm: Icm, files: dict[str, Path], tmp_path: Path) -> None:
    icm(*TRAIN)
    assert icm("export", tmp_path / "all.icm").code == 0
    for source in (["--source", "code"], ["--from", tmp_path / "all.icm"]):
        assert icm("materialize", "rust", *source, "-o", tmp_path / source[0].strip("-")).code == 0
    one, other = ((tmp_path / folder / "rust.toy").read_bytes() for folder in ("source", "from"))
    assert one == other


@pytest.mark.slow
def test_an_imported_task_keeps_its_format(icm: Icm, files: dict[str, Path], tmp_path: Path) -> None:
    icm(*TRAIN)
    assert icm("export", tmp_path / "all.icm").code == 0
    assert icm("--store", tmp_path / "other", "import", tmp_path / "all.icm").code == 0
    shown = icm("--store", tmp_path / "other", "show", "rust", "--json").document
    assert [adapter["format"] for adapter in shown["adapters"]] == ["toy"]
