"""`icm convert`: what is printed, and the exit codes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora.formats.catalogue import FORMATS
from tests.cli.conftest import Ran
from tests.cli.fleet import write_broken
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.formats.image_files import kohya_file, lycoris_file
from tests.icmlora.formats.tiny_pipelines import tiny_sd15

Icm = Callable[..., Ran]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    """A folder of two adapters."""
    for seed, name in enumerate(("ants", "cats")):
        write_lora(tmp_path / "loras" / name, seed=seed, rank=4)
    return tmp_path / "loras"


def test_an_adapter_is_cut_to_a_size_and_its_error_is_told(icm: Icm, loras: Path, tmp_path: Path) -> None:
    ran = icm("convert", loras / "ants", tmp_path / "out", "--size", "4KiB", "--json")
    done, total = ran.events
    assert ran.code == 0
    assert done["size"] == (tmp_path / "out" / WEIGHTS).stat().st_size <= 4096 < done["before"]
    assert 0 < done["relative_error"] < 1
    assert set(done["kinds"]) == {"q_proj", "v_proj"}
    assert (total["adapters"], total["failed"], total["size"]) == (1, 0, done["size"])


def test_people_see_a_table_and_the_sum(icm: Icm, loras: Path, tmp_path: Path) -> None:
    ran = icm("convert", loras, tmp_path / "out", "--rank", "1")
    assert ran.code == 0
    assert [line.split()[:3] for line in ran.out.splitlines()[1:3]] == [["ants", "peft", "1"], ["cats", "peft", "1"]]
    assert ran.out.splitlines()[-1].startswith("wrote 2 adapters: ")


def test_quietly_the_paths_alone_are_printed(icm: Icm, loras: Path, tmp_path: Path) -> None:
    ran = icm("convert", loras, tmp_path / "out", "--format", "mlx", "-q")
    assert ran.out.split() == [str(tmp_path / "out" / name) for name in ("ants", "cats")]


def test_one_bad_adapter_is_named_and_the_others_are_written(icm: Icm, loras: Path, tmp_path: Path) -> None:
    write_broken(loras / "bees")
    ran = icm("convert", loras, tmp_path / "out", "--rank", "1")
    assert ran.code == ExitCode.PARTLY
    assert "warning: bees: " in ran.err
    assert "wrote 2 adapters" in ran.out
    assert "; 1 failed" in ran.out


def test_a_single_bad_adapter_is_an_error(icm: Icm, loras: Path, tmp_path: Path) -> None:
    ran = icm("convert", write_broken(loras / "bees"), tmp_path / "out", "--rank", "1", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "damaged")


@pytest.mark.parametrize("options", [(), ("--rank", "2", "--size", "4KiB"), ("--rank", "0"), ("--dtype", "int8")])
def test_a_wrong_command_line_is_refused(icm: Icm, loras: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    ran = icm("convert", loras, tmp_path / "out", *options)
    assert (ran.code, (tmp_path / "out").exists()) == (ExitCode.USAGE, False)


def test_an_unknown_format_is_answered_with_those_there_are(icm: Icm, loras: Path, tmp_path: Path) -> None:
    ran = icm("convert", loras, tmp_path / "out", "--format", "zip")
    assert ran.code == ExitCode.USAGE
    assert "peft" in ran.err
    assert "gguf" in ran.err


def test_an_image_adapter_is_renamed_and_its_header_goes_along(icm: Icm, tmp_path: Path) -> None:
    ran = icm("convert", kohya_file("sd15"), tmp_path / "dog.safetensors", "--format", "diffusers", "--json")
    done, _ = ran.events
    assert (ran.code, done["from_format"], done["format"]) == (0, "kohya", "diffusers")
    assert done["relative_error"] < 1e-6


def test_another_method_asks_for_a_rank(icm: Icm, tmp_path: Path) -> None:
    file = lycoris_file(tmp_path / "hare.safetensors", tiny_sd15().unet, algo="loha")
    ran = icm("convert", file, tmp_path / "out.safetensors", "--format", "kohya", "--json")
    assert (ran.code, "--rank" in ran.error["hint"]) == (ExitCode.FAILED, True)
    ran = icm("convert", file, tmp_path / "out.safetensors", "--format", "kohya", "--rank", "4", "--json")
    done, _ = ran.events
    assert (ran.code, done["rank"]) == (0, 4)
    assert 0 < done["relative_error"] < 1


@pytest.mark.parametrize("command", ["convert", "materialize"])
def test_the_help_lists_every_format(icm: Icm, command: str) -> None:
    words = set(re.findall(r"[a-z]+", icm(command, "--help").out))
    assert {known.name for known in FORMATS} <= words
