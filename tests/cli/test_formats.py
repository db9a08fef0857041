"""`icm convert --list-formats`, and the formats of `icm materialize`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from icmlora.formats.catalogue import FORMATS
from tests.cli.conftest import Ran, modules_of
from tests.icmlora.formats.llama_files import gguf_file

Icm = Callable[..., Ran]


def test_every_format_is_listed_with_what_icm_does_with_it(icm: Icm) -> None:
    found = icm("convert", "--list-formats", "--json").document
    assert [row["name"] for row in found] == [known.name for known in FORMATS]
    assert all(row["about"] and row["read"] and row["code"] for row in found)
    text = ["peft", "mlx", "gguf"]
    assert {row["name"]: row["written_from"] for row in found} == {
        **dict.fromkeys(text, text),
        "diffusers": ["diffusers", "comfyui", "xlabs", "lycoris", "kohya"],
        "comfyui": ["comfyui"],
        "xlabs": ["xlabs"],
        "lycoris": ["lycoris"],
        "kohya": ["diffusers", "lycoris", "kohya"],
    }


def test_the_table_has_a_line_for_each(icm: Icm) -> None:
    assert len(icm("convert", "--list-formats").out.splitlines()) == 1 + len(FORMATS)
    assert icm("convert", "--list-formats", "-q").out.split() == [known.name for known in FORMATS]


def test_listing_formats_imports_neither_torch_nor_gguf() -> None:
    assert not {"torch", "gguf", "numpy"} & modules_of("convert", "--list-formats")


def test_without_format_an_adapter_is_written_in_its_own(icm: Icm, tmp_path: Path) -> None:
    (tmp_path / "poems.gguf").write_bytes(gguf_file())
    assert icm("ingest", tmp_path / "poems.gguf", "--no-vectors").code == 0
    ran = icm("materialize", "poems", "-o", tmp_path / "out")
    assert "wrote poems from its original, byte for byte" in ran.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["poems.gguf"]
    again = icm("materialize", "poems", "--format", "gguf", "-o", tmp_path / "again.gguf", "--json").document
    assert (again["format"], again["squared_error"]) == ("gguf", 0.0)


def test_a_gguf_adapter_without_its_base_model_says_what_a_conversion_needs(icm: Icm, tmp_path: Path) -> None:
    (tmp_path / "poems.gguf").write_bytes(gguf_file())
    icm("ingest", tmp_path / "poems.gguf", "--no-vectors")
    ran = icm("materialize", "poems", "--format", "peft", "-o", tmp_path / "out", "--json")
    assert "needs the configuration of its base model" in ran.error["message"]
    assert not (tmp_path / "out").exists()
