"""`icm base alias`, `icm base ls` and `icm ingest --base-model`, as a shell sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Ran
from tests.cli.fleet import BASE, write_adapter
from tests.icmlora.tiny_base import write_tiny_base

Icm = Callable[..., Ran]
LLAMA, MIRROR = "meta-llama/Meta-Llama-3-8B-Instruct", "unsloth/llama-3-8b-Instruct-bnb-4bit"


def names_of(icm: Icm, store: Path) -> dict[str, list[str]]:
    """Return each base model with its labels."""
    found = icm("base", "ls", "--store", store, "--json").document
    return {base["name"]: [label["label"] for label in base["labels"]] for base in found}


def test_ingest_says_what_a_mirror_is_taken_for_and_how_to_undo_it(icm: Icm, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "poems", base_model_name_or_path=MIRROR)
    ran = icm("ingest", folder, "--store", tmp_path / "store", "--no-vectors")
    assert f"treating {MIRROR} as {LLAMA} (a known mirror, quantised)" in ran.err
    undo = f"icm base alias {LLAMA} {MIRROR} --remove"
    assert undo in ran.err
    assert icm(*undo.split()[1:], "--store", tmp_path / "store").code == 0
    assert names_of(icm, tmp_path / "store") == {LLAMA: [], MIRROR: []}


def test_ingest_has_an_event_for_a_joined_label(icm: Icm, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "poems", base_model_name_or_path=MIRROR)
    events = icm("ingest", folder, "--store", tmp_path / "store", "--json").events
    joined = {"label": MIRROR, "base_model": LLAMA, "reason": "mirror", "is_quantised": True}
    assert {"type": "base_joined"} | joined in events
    assert [event["base_model"] for event in events if event["type"] == "task"] == [LLAMA]


def test_labels_are_listed_under_their_base_model(icm: Icm, tmp_path: Path) -> None:
    icm("base", "alias", BASE, f"{BASE}@v1", "./copy", "--store", tmp_path / "store")
    (base,) = icm("base", "ls", "--store", tmp_path / "store", "--json").document
    assert base["labels"] == [
        {"label": str(Path("copy").absolute()), "reason": "told", "is_quantised": False},
        {"label": f"{BASE}@v1", "reason": "told", "is_quantised": False},
    ]
    assert f"  {BASE}@v1" in icm("base", "ls", "--store", tmp_path / "store").out


def test_alias_says_what_came_along_and_what_to_do(icm: Icm, tmp_path: Path) -> None:
    for seed, label in enumerate((BASE, "acme/copy")):
        folder = write_adapter(tmp_path / f"task{seed}", seed=seed, base_model_name_or_path=label)
        icm("ingest", folder, "--store", tmp_path / "store")
    ran = icm("base", "alias", BASE, "acme/copy", "--store", tmp_path / "store")
    assert (ran.code, ran.out) == (0, f"joined acme/copy to {BASE} with 1 task\n")
    assert "icm train --update" in ran.err
    again = icm("base", "alias", BASE, "acme/copy", "--store", tmp_path / "store")
    assert again.out == f"{BASE} already has these labels\n"


def test_remove_and_keep_exclude_each_other(icm: Icm, tmp_path: Path) -> None:
    ran = icm("base", "alias", BASE, "acme/copy", "--remove", "--keep", BASE, "--store", tmp_path / "store")
    assert ran.code == 2


def test_a_label_that_is_not_joined_cannot_be_removed(icm: Icm, tmp_path: Path) -> None:
    icm("base", "alias", BASE, "acme/copy", "--store", tmp_path / "store")
    ran = icm("base", "alias", BASE, "acme/other", "--remove", "--store", tmp_path / "store")
    assert (ran.code, "icm base ls" in ran.err) == (1, True)


def test_an_adapter_without_a_label_says_what_to_do_and_is_then_moved(icm: Icm, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "poems", base_model_name_or_path=None)
    ran = icm("ingest", folder, "--store", tmp_path / "store")
    assert "it names no base model; specify one with `icm ingest --base-model NAME`" in ran.err
    assert icm("ls", "-F", "status=original-only", "--store", tmp_path / "store", "-q").out == "poems\n"
    assert icm("ingest", folder, "--base-model", BASE, "--store", tmp_path / "store").code == 0
    (task,) = icm("ls", "--store", tmp_path / "store", "--json").document
    assert (task["base_model"], task["original_only"]) == (BASE, None)
    assert icm("ls", "-F", "status=original-only", "--store", tmp_path / "store", "-q").out == ""


def test_tasks_are_listed_by_any_label_of_their_base_model(icm: Icm, tmp_path: Path) -> None:
    icm("base", "alias", BASE, "acme/copy", "--store", tmp_path / "store")
    icm("ingest", write_adapter(tmp_path / "poems"), "--store", tmp_path / "store")
    assert icm("ls", "--base-model", "acme/copy", "--store", tmp_path / "store", "-q").out == "poems\n"


def test_a_base_model_of_equal_files_is_joined_when_it_is_added(icm: Icm, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    icm("base", "add", BASE, folder, "--store", tmp_path / "store")
    ran = icm("base", "add", "acme/copy", folder, "--store", tmp_path / "store")
    assert "identical files" in ran.err
    assert sum(map(len, names_of(icm, tmp_path / "store").values())) == 1


def test_a_relative_name_is_the_base_model_that_adapters_called_so(icm: Icm, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "loras" / "poems", base_model_name_or_path="./gemma3-270m")
    icm("ingest", folder, "--store", tmp_path / "store", "--no-vectors")
    base = write_tiny_base(tmp_path / "elsewhere")
    ran = icm("base", "add", "./gemma3-270m", base, "--store", tmp_path / "store")
    name = str(tmp_path / "loras" / "gemma3-270m")
    assert (ran.code, f"treating ./gemma3-270m as {name}" in ran.err) == (0, True)
    (known,) = icm("base", "ls", "--store", tmp_path / "store", "--json").document
    assert (known["name"], known["tasks_count"], known["path"]) == (name, 1, str(base))


def test_a_relative_name_that_no_adapter_has_is_a_path_from_here_and_icm_says_so(icm: Icm, tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    ran = icm("base", "add", "./some/model", base, "--store", tmp_path / "store", "--json")
    assert ran.document["name"] == str(Path("some/model").absolute())
    assert "treating ./some/model as" in icm("base", "add", "./some/model", base, "--store", tmp_path / "store").err


def test_a_relative_name_that_several_base_models_end_with_is_refused(icm: Icm, tmp_path: Path) -> None:
    for seed, place in enumerate(("one", "two")):
        folder = write_adapter(tmp_path / place / f"poems-{seed}", base_model_name_or_path="./model", seed=seed)
        icm("ingest", folder, "--store", tmp_path / "store", "--no-vectors")
    ran = icm("base", "add", "./model", write_tiny_base(tmp_path / "base"), "--store", tmp_path / "store")
    assert (ran.code, "./model matches 2 base models" in ran.err) == (1, True)


def test_ingest_suggests_an_alias_for_names_that_look_like_one_base_model(icm: Icm, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", base_model_name_or_path="google/gemma-3-270m-it")
    write_adapter(tmp_path / "b", base_model_name_or_path="C:\\models\\gemma3-270m-it")
    store = "--store", tmp_path / "store"
    hint = "if they are, run `icm base alias google/gemma-3-270m-it 'C:\\models\\gemma3-270m-it'`"
    assert hint in icm("ingest", tmp_path, *store).err
    assert len(names_of(icm, tmp_path / "store")) == 2
    assert hint not in icm("ingest", tmp_path, *store).err


def test_ingest_names_the_base_model_that_is_missing_and_the_command_that_adds_it(icm: Icm, tmp_path: Path) -> None:
    ran = icm("ingest", write_adapter(tmp_path / "poems"), "--store", tmp_path / "store")
    assert f"1 task without task vectors: base model {BASE} not found on this machine" in ran.err
    assert f"hint: run `icm base add {BASE} PATH`, then `icm vectors`" in ran.err
