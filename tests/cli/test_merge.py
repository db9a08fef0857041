"""`icm merge`: one adapter of several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icm_cli.errors import ExitCode
from icmlora.formats.discovery.folder import load_adapter
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import write_lora

Icm = Callable[..., Ran]


@pytest.fixture
def pair(icm: Icm, tmp_path: Path) -> list[Path]:
    """Two tasks of one base model, ingested."""
    folders = [write_lora(tmp_path / "loras" / name, seed=seed) for seed, name in enumerate(("cats", "dogs"))]
    assert icm("ingest", tmp_path / "loras").code == 0
    return folders


def deltas(folder: Path) -> list[torch.Tensor]:
    return [module.b @ module.a for module in load_adapter(folder).modules]


def test_a_merged_folder_adds_what_its_adapters_add(icm: Icm, pair: list[Path], tmp_path: Path) -> None:
    options = ("--method", "cat", "--weights", "0.7,-0.2", "--dtype", "float32")
    ran = icm("merge", "cats", "dogs", "-o", tmp_path / "out", *options)
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'out'}\n")
    assert "merged 0.7 of cats, -0.2 of dogs with cat: rank 4" in ran.err
    expected = [0.7 * cats - 0.2 * dogs for cats, dogs in zip(*map(deltas, pair), strict=True)]
    for found, delta in zip(deltas(tmp_path / "out"), expected, strict=True):
        torch.testing.assert_close(found, delta)


def test_the_same_command_writes_the_same_bytes(icm: Icm, pair: list[Path], tmp_path: Path) -> None:
    for name in ("one", "other"):
        assert icm("merge", "cats", "dogs", "-o", tmp_path / name, "--method", "dare_linear").code == 0
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other"))
    assert first == second


def test_a_merged_task_says_what_it_was_made_of(icm: Icm, pair: list[Path], tmp_path: Path) -> None:
    ran = icm("merge", "cats", "dogs", "--as", "pets", "--method", "ties_svd", "--rank", "2", "--density", "0.25")
    assert (ran.code, ran.out) == (0, "pets\n")
    assert "merged 0.5 cats, 0.5 dogs (ties_svd, density 0.25)" in icm("show", "pets").out
    assert icm("materialize", "pets", "-o", tmp_path / "pets").code == 0
    card = (tmp_path / "pets" / "README.md").read_text()
    assert "| dogs | 0.5 | original |" in card
    assert {module.a.shape[0] for module in load_adapter(tmp_path / "pets").modules} == {2}


def test_a_merge_can_be_written_and_stored_at_once(icm: Icm, pair: list[Path], tmp_path: Path) -> None:
    done = icm("merge", "cats", "dogs", "--as", "pets", "-o", tmp_path / "out", "--json").document
    assert (done["task"], done["output"], done["rank"]) == ("pets", str(tmp_path / "out"), 2)
    assert icm("materialize", "pets", "-o", tmp_path / "stored").code == 0
    written, stored = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "stored"))
    assert written == stored


def test_a_name_that_is_taken_is_not_taken_again(icm: Icm, pair: list[Path], tmp_path: Path) -> None:
    ran = icm("merge", "cats", "dogs", "--as", "cats", "-o", tmp_path / "out")
    assert ran.code == ExitCode.FAILED
    assert not (tmp_path / "out").exists()


@pytest.mark.one_case
def test_codes_can_be_merged(icm: Icm, trained: Path, tmp_path: Path) -> None:
    done = icm("merge", "poems", "rules", "-o", tmp_path / "out", "--source", "code", "--json").document
    assert [part["source"] for part in done["parts"]] == ["code", "code"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "no destination for the merged adapter was specified"),
        (("-o", "out", "--weights", "1"), "1 weight for 2 tasks"),
        (("-o", "out", "--weights", "half,half"), "--weights 'half,half' is not a list of numbers"),
        (("-o", "out", "--method", "cat", "--rank", "4"), "cat sets the rank itself"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    icm: Icm, pair: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = icm("merge", "cats", "dogs", *options)
    assert ran.code == ExitCode.USAGE
    assert words in ran.err
    assert not Path("out").exists()


def test_one_task_is_no_merge(icm: Icm, pair: list[Path], tmp_path: Path) -> None:
    ran = icm("merge", "cats", "cats", "-o", tmp_path / "out")
    assert ran.code == ExitCode.FAILED
    assert "at least two tasks" in ran.err


def test_a_task_that_is_named_twice_is_not_counted_twice(icm: Icm, pair: list[Path], tmp_path: Path) -> None:
    ran = icm("merge", "cats", "dogs", "cats", "-o", tmp_path / "out")
    assert ran.code == ExitCode.FAILED
    assert "cats is named twice" in ran.err
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_base_models_are_not_merged(icm: Icm, pair: list[Path], tmp_path: Path) -> None:
    other = write_lora(tmp_path / "birds", base_model_name_or_path="another/model")
    assert icm("ingest", other).code == 0
    ran = icm("merge", "cats", "birds", "-o", tmp_path / "out")
    assert ran.code == ExitCode.FAILED
    assert "birds is for another/model" in ran.err


def test_an_adapter_with_a_head_is_not_merged(icm: Icm, pair: list[Path], tmp_path: Path) -> None:
    weights = write_lora(tmp_path / "sorter", modules_to_save=["score"]) / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.score.weight": torch.ones(2, 16)}, weights)
    assert icm("ingest", tmp_path / "sorter").code == 0
    ran = icm("merge", "cats", "sorter", "-o", tmp_path / "out")
    assert ran.code == ExitCode.FAILED
    assert "sorter cannot be merged" in ran.err
