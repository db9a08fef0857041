"""`icm ls` and `icm show`, and completion, which reads the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from icm_cli.completion import complete_base, complete_task
from icm_cli.errors import ExitCode
from registry.manifests import Code, CodeLimits, File, Generator, Measurement
from registry.store import Store
from tests.cli.conftest import Ran, modules_of
from tests.cli.fleet import BASE

Icm = Callable[..., Ran]


@pytest.fixture
def trained(stored: Path, tmp_path: Path) -> Path:
    """A store with a generator, a code and measurements of `rust`."""
    with Store.open(tmp_path / "store") as store:
        blob, code = (File(store.blobs.put(data), len(data)) for data in (b"generator", b"code"))
        asked = CodeLimits(keep=0.98)
        figures = {"data": "0" * 64, "count": 100, "utf8_bytes": 300, "settings": {}}
        coded = replace(
            store.task("rust"),
            code=Code(blob=code, generator=blob, squared_error=0.02, asked=asked, effect=0.981),
            measured=(
                Measurement(source="base", value=3.0, **figures),  # type: ignore[arg-type]
                Measurement(source="code", generator=str(blob), value=2.5, retained_gain=0.97, **figures),  # type: ignore[arg-type]
            ),
        )
        store.publish([Generator(base_model=BASE, blob=blob, config={}, metrics={}), coded])
    return stored


def test_ls_without_a_store_says_so(icm: Icm) -> None:
    ran = icm("ls")
    assert ran.code == ExitCode.NO_STORE
    assert "hint: run `icm ingest" in ran.err


def test_ls_shows_a_row_per_task(icm: Icm, stored: Path) -> None:
    lines = icm("ls").out.splitlines()
    assert lines[0].split()[:2] == ["TASK", "BASE"]
    assert [line.split()[0] for line in lines[1:]] == ["rust", "shakespeare", "sql"]


def test_ls_quiet_prints_names_only(icm: Icm, stored: Path) -> None:
    assert icm("ls", "-q").out == "rust\nshakespeare\nsql\n"


def test_ls_json_has_bytes_and_counts(icm: Icm, stored: Path) -> None:
    row = icm("ls", "--json").document[0]
    size = sum(
        (stored / "rust" / name).stat().st_size
        for name in ("adapter_model.safetensors", "adapter_config.json", "README.md")
    )
    assert {key: row[key] for key in row if key != "created_at"} == {
        "name": "rust",
        "version": 1,
        "base_model": BASE,
        "rank": 2,
        "dtype": "f32",
        "parameters": 32,
        "target_modules": ["q_proj"],
        "original_size": size,
        "evicted_at": None,
        "pinned": False,
        "original_only": None,
        "extras_bytes": 0,
        "tags": [],
        "note": None,
        "checkpoints_count": 2,
        "evicted_checkpoints_count": 0,
        "vectors_count": 0,
        "code_size": None,
        "retained_gain": None,
        "precision": None,
        "effect": None,
        "keep": None,
        "claimed": None,
        "relative_error": None,
        "squared_error": None,
    }


def test_ls_shows_codes_whatever_generator_they_are_of(icm: Icm, trained: Path, tmp_path: Path) -> None:
    assert [row["code_size"] for row in icm("ls", "--json").document] == [4, None, None]
    with Store.open(tmp_path / "store") as store:
        newer = File(store.blobs.put(b"newer"), 5)
        store.update_generator(BASE, lambda present: replace(present, version=2, blob=newer))
    row, *_ = icm("ls", "--json").document
    assert (row["code_size"], row["retained_gain"]) == (4, 0.97)
    assert "4 B under generator 1, relative error 0.141" in icm("show", "rust").out


def test_ls_shows_versions_if_a_task_has_several(icm: Icm, stored: Path, tmp_path: Path) -> None:
    assert "VERSION" not in icm("ls").out
    with Store.open(tmp_path / "store") as store:
        store.publish([replace(store.task("sql"), version=2)])
    lines = [line.split() for line in icm("ls").out.splitlines()]
    assert (lines[0][:3], lines[1][:2], lines[3][:2]) == (["TASK", "VERSION", "BASE"], ["rust", BASE], ["sql", "2"])
    assert [row["version"] for row in icm("ls", "--json").document] == [1, 1, 2]


def test_ls_reads_no_manifest(icm: Icm, trained: Path, tmp_path: Path) -> None:
    before = icm("ls").out
    for path in (tmp_path / "store" / "manifests").rglob("*"):
        if path.is_file():
            path.unlink()
    assert (icm("ls").out, complete_task("ru")) == (before, ["rust"])


def test_ls_can_show_one_base_model(icm: Icm, stored: Path) -> None:
    assert len(icm("ls", "--base-model", BASE, "--json").document) == 3


def test_ls_of_a_base_model_that_no_task_has_is_refused(icm: Icm, stored: Path) -> None:
    ran = icm("ls", "--base-model", "other", "--json")
    assert (ran.code, ran.out, "icm base ls" in ran.error["hint"]) == (ExitCode.FAILED, "", True)
    assert ran.error["message"] == "no task belongs to base model 'other'"


def test_ls_of_an_empty_store_names_the_next_command(icm: Icm, tmp_path: Path) -> None:
    Store.open(tmp_path / "store", create=True).close()
    ran = icm("ls")
    assert (ran.code, ran.out) == (0, "")
    assert "icm ingest" in ran.err


@pytest.mark.slow
def test_ls_does_not_import_torch(stored: Path) -> None:
    assert not {"torch", "numpy", "transformers"} & modules_of("ls", "--json")


def test_show_prints_everything_about_a_task(icm: Icm, trained: Path) -> None:
    out = icm("show", "rust").out
    assert "4 B under generator 1, relative error 0.141, keeps 0.981 of the adapter's effect" in out
    assert "at least 0.98 of the effect: met" in out
    assert "RETAINED GAIN" in out
    assert "0.970" in out


def test_show_finds_a_name_in_any_case(icm: Icm, stored: Path) -> None:
    assert icm("show", "RUST", "--json").document["name"] == "rust"


def test_show_json_has_every_adapter_with_its_digests(icm: Icm, stored: Path) -> None:
    document = icm("show", "rust", "--json").document
    assert [entry["step"] for entry in document["adapters"]] == [80, 100, None]
    assert all(len(entry["weights"]) == 64 for entry in document["adapters"])
    assert document["layout"] == [{"module": "model.layers.0.self_attn.q_proj", "rank": 2, "in": 8, "out": 8}]


def test_show_json_has_the_measurements(icm: Icm, trained: Path) -> None:
    measured = icm("show", "rust", "--json").document["evaluations"]
    assert {entry["source"]: entry["retained_gain"] for entry in measured} == {"base": None, "code": 0.97}
    assert all(entry["is_current"] for entry in measured)


def test_show_reads_a_version(icm: Icm, stored: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        store.publish([replace(store.task("sql"), version=2, note="second", aliases={"prod": 1})])
    notes = {name: icm("show", name, "--json").document for name in ("sql", "sql@2", "sql@1", "sql@prod")}
    assert {name: (shown["version"], shown["note"]) for name, shown in notes.items()} == {
        "sql": (2, "second"), "sql@2": (2, "second"), "sql@1": (1, None), "sql@prod": (1, None),
    }  # fmt: skip
    ran = icm("show", "sql@3", "--json")
    assert (ran.code, ran.error["hint"]) == (ExitCode.FAILED, "run `icm log sql` to list its versions")


def test_json_has_the_effect_of_a_code_and_what_was_asked_of_it(icm: Icm, trained: Path) -> None:
    shown, (listed, *_) = icm("show", "rust", "--json").document["code"], icm("ls", "--json").document
    ((counted, *_),) = (fleet["tasks"] for fleet in icm("stats", "--json").document["fleets"])
    assert (shown["effect"], listed["effect"], counted["effect"]) == (0.981, 0.981, 0.981)
    assert (shown["asked"]["keep"], listed["keep"], counted["asked"]["keep"]) == (0.98, 0.98, 0.98)


def test_show_verbose_lists_the_modules(icm: Icm, stored: Path) -> None:
    assert "q_proj  rank 2  8 -> 8" in icm("show", "rust", "-v").out


def test_a_misspelt_name_gets_a_suggestion(icm: Icm, stored: Path) -> None:
    ran = icm("show", "shakespear", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "task_not_found")
    assert "shakespeare" in ran.error["hint"]


def test_names_complete_from_the_store(stored: Path) -> None:
    assert complete_task("s") == ["shakespeare", "sql"]
    assert complete_base("") == [BASE]
