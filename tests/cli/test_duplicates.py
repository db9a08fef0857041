"""`icm duplicates`, and what `icm ingest` says of adapters that are there already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from icm_cli.errors import ExitCode
from icmlora import load_adapter, save_adapter
from icmlora.adapter.arithmetic import truncated
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import write_lora

Icm = Callable[..., Ran]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved_again(
    source: Path, folder: Path, *, dtype: torch.dtype | None = None, metadata: str = "again", **config: object
) -> Path:
    """Write an adapter's tensors as another program would: other metadata, other fields in the configuration."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "note": metadata})
    fields = json.loads((source / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | {"peft_version": "0.99", **config}, indent=3))
    return folder


def ingest(icm: Icm, *folders: Path) -> Ran:
    ran = icm("ingest", *folders, "--no-vectors")
    assert ran.code == 0, ran.err
    return ran


def pairs_of(ran: Ran) -> dict[str, tuple[str, bool]]:
    """Return task -> the one it is like, and whether the tensors are the same."""
    assert ran.code == 0, ran.err
    pairs = [pair for group in ran.document["groups"] for pair in group["pairs"]]
    return {pair["task"]: (pair["like"], pair["same_tensors"]) for pair in pairs}


def distances_of(ran: Ran) -> dict[str, float]:
    return {pair["task"]: pair["distance"] for group in ran.document["groups"] for pair in group["pairs"]}


@pytest.fixture
def dog(icm: Icm, tmp_path: Path) -> Path:
    """The folder of an adapter that is in the store, with an unrelated one."""
    folder = write_lora(tmp_path / "loras" / "dog", seed=1)
    ingest(icm, folder, write_lora(tmp_path / "loras" / "cat", seed=2))
    return folder


def test_an_adapter_that_was_saved_again_has_the_same_tensors(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ingest(icm, saved_again(dog, tmp_path / "dog-v2", lora_dropout=0.5))
    assert pairs_of(icm("duplicates", "--json")) == {"dog-v2": ("dog", True)}
    ran = icm("duplicates")
    assert ran.out.splitlines()[1].split() == ["dog-v2", "=", "dog", "same", "tensors"]
    assert "compared 3 tasks: 1 equal adapter in 1 group" in ran.out
    assert "icm rm NAME" in ran.err


def test_the_same_file_under_another_name_has_the_same_tensors(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ingest(icm, Path(shutil.copytree(dog, tmp_path / "hound")))
    assert pairs_of(icm("duplicates", "--json")) == {"hound": ("dog", True)}


def test_another_scale_is_no_duplicate(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ran = ingest(icm, saved_again(dog, tmp_path / "loud", lora_alpha=6))
    assert "same tensors" not in ran.err
    assert pairs_of(icm("duplicates", "--json", "--max-distance", 0.5)) == {}


def test_another_scale_may_be_near(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ingest(icm, saved_again(dog, tmp_path / "louder", lora_alpha=2.1))
    found = icm("duplicates", "--json")
    assert pairs_of(found) == {"louder": ("dog", False)}
    assert distances_of(found)["louder"] == pytest.approx(1 - 1 / 1.05, abs=1e-6)


def test_the_same_scale_in_other_words_is_a_duplicate(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ingest(icm, saved_again(dog, tmp_path / "words", lora_alpha=2.0, use_rslora=False, rank_pattern={}))
    assert pairs_of(icm("duplicates", "--json")) == {"words": ("dog", True)}


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_an_adapter_in_another_type_is_near(
    icm: Icm, dog: Path, tmp_path: Path, dtype: torch.dtype, most: float
) -> None:
    ingest(icm, saved_again(dog, tmp_path / "small", dtype=dtype))
    found = icm("duplicates", "--json")
    assert pairs_of(found) == {"small": ("dog", False)}
    assert 0 < distances_of(found)["small"] < most
    assert icm("duplicates").out.splitlines()[1].split()[:3] == ["small", "~", "dog"]


def test_an_adapter_of_another_rank_is_near(icm: Icm, tmp_path: Path) -> None:
    one = load_adapter(write_lora(tmp_path / "dog", seed=1, rank=4))
    save_adapter(truncated(one, 3), tmp_path / "thin")
    ingest(icm, tmp_path / "dog", tmp_path / "thin")
    assert pairs_of(icm("duplicates", "--json", "--max-distance", 0.5)) == {"thin": ("dog", False)}


def test_nothing_alike_is_no_failure(icm: Icm, dog: Path) -> None:
    ran = icm("duplicates")
    assert (ran.code, ran.out) == (0, "compared 2 tasks: no duplicates\n")
    assert icm("duplicates", "-q").out == ""


def test_quiet_prints_one_group_per_line_the_oldest_first(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ingest(icm, saved_again(dog, tmp_path / "a"), saved_again(dog, tmp_path / "b", dtype=torch.float16))
    assert icm("duplicates", "-q").out == "dog a b\n"


def test_names_restrict_what_is_shown_not_what_it_is_compared_with(icm: Icm, dog: Path, tmp_path: Path) -> None:
    cat = tmp_path / "loras" / "cat"
    ingest(icm, saved_again(dog, tmp_path / "dog-v2"), saved_again(cat, tmp_path / "cat-v2", dtype=torch.float16))
    assert pairs_of(icm("duplicates", "dog-v2", "--json")) == {"dog-v2": ("dog", True)}
    assert pairs_of(icm("duplicates", "cat", "--json")) == {"cat-v2": ("cat", False)}


def test_adapters_of_other_base_models_are_not_compared(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ingest(icm, saved_again(dog, tmp_path / "elsewhere", base_model_name_or_path="acme/other"))
    assert pairs_of(icm("duplicates", "--json")) == {}
    assert icm("duplicates", "--base-model", "acme/other").out == "compared 1 task: no duplicates\n"


def test_a_limit_of_zero_finds_exact_copies_only(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ingest(icm, saved_again(dog, tmp_path / "same"), saved_again(dog, tmp_path / "half", dtype=torch.float16))
    assert pairs_of(icm("duplicates", "--max-distance", 0, "--json")) == {"same": ("dog", True)}


@pytest.mark.parametrize("limit", ["-0.1", "0.6", "near"])
def test_an_impossible_limit_is_wrong_usage(icm: Icm, dog: Path, limit: str) -> None:
    assert icm("duplicates", f"--max-distance={limit}").code == ExitCode.USAGE


def test_an_unknown_task_is_an_error_that_names_near_ones(icm: Icm, dog: Path) -> None:
    ran = icm("duplicates", "dgo")
    assert (ran.code, "dog" in ran.err) == (ExitCode.FAILED, True)


def test_without_a_store_it_says_so(icm: Icm) -> None:
    assert icm("duplicates").code == ExitCode.NO_STORE


def test_a_kind_that_has_no_code_is_compared_by_its_tensors(icm: Icm, dog: Path, tmp_path: Path) -> None:
    odd = saved_again(dog, tmp_path / "odd", peft_type="LOHA")
    ingest(icm, odd, saved_again(odd, tmp_path / "odd-v2"), saved_again(odd, tmp_path / "odd-v3", alpha=9))
    ran = icm("duplicates", "--json")
    assert pairs_of(ran) == {"odd-v2": ("odd", True)}
    assert ran.document["tensors_only"] == ["odd", "odd-v2", "odd-v3"]
    assert "they cannot have a code: odd, odd-v2, odd-v3" in icm("duplicates").err


def test_a_damaged_adapter_is_named_and_stops_no_other(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ingest(icm, saved_again(dog, tmp_path / "dog-v2"))
    with Store.open(tmp_path / "store") as store:
        blob = Path(store.blobs.place(store.task("cat").final.weights))
    blob.chmod(0o644)
    blob.write_bytes(b"x" * blob.stat().st_size)
    ran = icm("duplicates", "--json")
    assert pairs_of(ran) == {"dog-v2": ("dog", True)}
    assert [entry["task"] for entry in ran.document["left_out"]] == ["cat"]
    assert "warning: cat was not compared" in icm("duplicates").err


def test_names_are_printed_as_text(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ran = ingest(icm, saved_again(dog, tmp_path / "[red]x\x1b[2J"))
    (name,) = [line.split()[0] for line in icm("duplicates").out.splitlines() if " = " in line]
    assert f"{name} (dog)" in ran.err
    assert "\x1b" not in ran.err + icm("duplicates").out


def test_an_evicted_adapter_is_compared_as_its_code(icm: Icm, trained: Path, own_loras: Path, tmp_path: Path) -> None:
    assert icm("evict", "poems", "--max-error", "0.7").code == 0
    icm("materialize", "poems", "-o", tmp_path / "back")
    ingest(icm, Path(shutil.copytree(tmp_path / "back", tmp_path / "verse")))
    ran = icm("duplicates", "--json")
    assert pairs_of(ran) == {"verse": ("poems", False)}
    assert ran.document["from_codes"] == ["poems"]
    assert "compared evicted tasks by their codes: poems" in icm("duplicates").err


def test_the_file_of_an_evicted_adapter_is_recognised(icm: Icm, trained: Path, own_loras: Path, tmp_path: Path) -> None:
    assert icm("evict", "poems", "--max-error", "0.7").code == 0
    ran = ingest(icm, Path(shutil.copytree(own_loras / "poems", tmp_path / "verse")))
    assert "verse (poems)" in ran.err
    assert pairs_of(icm("duplicates", "--json")) == {"verse": ("poems", True)}


# ingest


def same_as(ran: Ran) -> dict[str, Any]:
    return {event["task"]: event["same_as"] for event in ran.events if event["type"] == "task"}


def test_ingest_says_that_an_adapter_is_there_already(icm: Icm, dog: Path, tmp_path: Path) -> None:
    ran = ingest(icm, saved_again(dog, tmp_path / "dog-v2"))
    assert ran.err.count("1 task has the same tensors as another: dog-v2 (dog)\n") == 1
    assert "ingested 1 task: 1 new adapter" in ran.out
    assert "same tensors" not in icm("ingest", tmp_path / "dog-v2", "--no-vectors").err  # it is known by now


def test_ingest_compares_adapters_of_one_call(icm: Icm, tmp_path: Path) -> None:
    dog = write_lora(tmp_path / "all" / "dog", seed=1)
    for name in ("dog-a", "dog-b"):
        saved_again(dog, tmp_path / "all" / name)
    write_lora(tmp_path / "all" / "cat", seed=2)
    ran = icm("ingest", tmp_path / "all", "--no-vectors", "--json")
    assert same_as(ran) == {"cat": None, "dog": None, "dog-a": "dog", "dog-b": "dog"}


def test_a_checkpoint_that_equals_its_final_adapter_is_not_worth_a_line(icm: Icm, tmp_path: Path) -> None:
    dog = write_lora(tmp_path / "dog", seed=1)
    shutil.copytree(dog, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", dog / "checkpoint-10")
    assert same_as(icm("ingest", dog, "--no-vectors", "--json")) == {"dog": None}


def test_a_task_that_was_replaced_is_no_longer_what_it_was(icm: Icm, dog: Path, tmp_path: Path) -> None:
    again = saved_again(dog, tmp_path / "old-dog")
    write_lora(dog, seed=7)
    icm("ingest", dog, "--no-vectors", "--on-conflict", "version")
    assert same_as(icm("ingest", again, "--no-vectors", "--json")) == {"old-dog": None}


def test_a_dry_run_recognises_equal_files(icm: Icm, dog: Path, tmp_path: Path) -> None:
    same = Path(shutil.copytree(dog, tmp_path / "hound"))
    assert same_as(icm("ingest", same, "--dry-run", "--json")) == {"hound": "dog"}


def test_equal_tensors_are_found_under_another_base_model(icm: Icm, dog: Path, tmp_path: Path) -> None:
    other = saved_again(dog, tmp_path / "other" / "puppy", base_model_name_or_path="acme/another")
    ingest(icm, other)
    ran = icm("duplicates", "--json")
    (pair,) = ran.document["other_bases"]
    assert (pair["task"], pair["like"], pair["same_tensors"], ran.document["groups"]) == ("puppy", "dog", True, [])
    assert "another base model" in icm("duplicates").out


def test_near_copies_are_not_called_equal_and_no_removal_is_suggested(icm: Icm, dog: Path, tmp_path: Path) -> None:
    alpha = json.loads((dog / CONFIG).read_text())["lora_alpha"]
    saved_again(dog, tmp_path / "loras" / "dog-again", lora_alpha=1.05 * alpha)
    ingest(icm, tmp_path / "loras" / "dog-again")
    ran = icm("duplicates")
    assert "compared 3 tasks: 1 near copy in 1 group" in ran.out
    assert "icm rm" not in ran.err


def test_checkpoints_with_the_tensors_of_the_final_adapter_are_reported(icm: Icm, tmp_path: Path) -> None:
    run = write_lora(tmp_path / "loras" / "dog", seed=1)
    saved_again(run, run / "checkpoint-10")
    write_lora(run / "checkpoint-20", seed=2)
    ran = ingest(icm, run)
    assert "1 task has checkpoints identical to its final adapter: dog (step 10)\n" in ran.err
    same = {row["step"]: row["same_as_final"] for row in icm("show", "dog", "--json").document["adapters"]}
    assert same == {10: True, 20: False, None: False}
