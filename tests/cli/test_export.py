"""`icm export`, and what a bundle is good for without the store."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from icm_cli.errors import ExitCode
from icmlora import Bundle
from icmlora.errors import BundleError
from registry.store import Store
from tests.cli.coded import damage
from tests.cli.conftest import Ran, modules_of
from tests.cli.test_materialize import blob_of, content
from tests.cli.tiny_fleet import train_store, write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
TASKS = ("poems", "rules", "silent")


@pytest.fixture
def bundle(icm: Icm, trained: Path, tmp_path: Path) -> Path:
    """A bundle of all three tasks."""
    assert icm("export", tmp_path / "fleet.icm").code == 0
    return tmp_path / "fleet.icm"


@pytest.fixture
def elsewhere(bundle: Path, trained: Path) -> Path:
    """The same bundle, on a machine without the store."""
    shutil.rmtree(trained)
    return bundle


@pytest.mark.one_case
@pytest.mark.parametrize("task", TASKS)
def test_a_bundle_gives_the_same_bytes_as_the_code_in_the_store(
    icm: Icm, bundle: Path, trained: Path, tmp_path: Path, task: str
) -> None:
    icm("eval", task, "--source", "code", "--device", "cpu")
    icm("export", bundle, "--force")
    icm("materialize", task, "-o", tmp_path / "a", "--source", "code")
    shutil.rmtree(trained)
    assert icm("materialize", task, "-o", tmp_path / "b", "--from", bundle).code == 0
    ours, theirs = content(tmp_path / "a"), content(tmp_path / "b")
    assert b"claimed by the imported bundle" in theirs.pop("README.md")  # of whom its maker is, the file says nothing
    assert theirs == {name: data for name, data in ours.items() if name != "README.md"}
    assert not trained.exists()


def test_the_document_of_an_export_says_what_is_in_the_file(icm: Icm, trained: Path, tmp_path: Path) -> None:
    document = icm("export", tmp_path / "fleet.icm", "--json").document
    assert document["size"] == (tmp_path / "fleet.icm").stat().st_size
    assert (document["tasks"], document["left_out"]) == (list(TASKS), [])
    assert (document["base_model"], document["generator_version"], len(document["bundle"])) == (LABEL, 1, 64)


def test_quiet_prints_the_file(icm: Icm, trained: Path, tmp_path: Path) -> None:
    assert icm("export", tmp_path / "fleet.icm", "-q").out == f"{tmp_path / 'fleet.icm'}\n"


def test_the_same_store_gives_the_same_bytes(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    icm("export", tmp_path / "again.icm", "SILENT", "rules", "poems")
    assert (tmp_path / "again.icm").read_bytes() == bundle.read_bytes()


def test_a_bundle_is_little_more_than_generator_and_codes(icm: Icm, bundle: Path) -> None:
    fleet = icm("stats", "--json").document["fleets"][0]
    parts = fleet["decoder_size"] + sum(task["code_size"] for task in fleet["tasks"])
    assert parts < bundle.stat().st_size < parts + 8192


def test_only_the_tasks_that_are_named_are_exported(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("export", tmp_path / "one.icm", "rules")
    assert icm("ls", "--from", tmp_path / "one.icm", "-q").out == "rules\n"


def test_tasks_without_a_code_are_left_out_and_told(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "extra", seed=9), "--no-vectors")
    ran = icm("export", tmp_path / "fleet.icm")
    assert ran.code == 0
    assert "warning: skipped 1 task without a code" in ran.err
    assert icm("export", tmp_path / "fleet.icm", "--force", "--json").document["left_out"] == ["extra"]


def test_a_named_task_without_a_code_is_refused_by_name(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "extra", seed=9), "--no-vectors")
    ran = icm("export", tmp_path / "fleet.icm", "poems", "extra", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "data_error")
    assert "extra" in ran.error["message"]
    assert "icm train" in ran.error["hint"]
    assert not (tmp_path / "fleet.icm").exists()


def test_before_the_first_training_the_hint_names_it(icm: Icm, mixed: Path, tmp_path: Path) -> None:
    ran = icm("export", tmp_path / "fleet.icm", "--json")
    assert (ran.code, "icm train" in ran.error["hint"]) == (ExitCode.FAILED, True)


def test_an_unknown_task_gets_a_suggestion(icm: Icm, trained: Path, tmp_path: Path) -> None:
    ran = icm("export", tmp_path / "fleet.icm", "poem", "--json")
    assert (ran.code, "poems" in ran.error["hint"]) == (ExitCode.FAILED, True)


def test_a_base_model_that_no_task_has_is_refused(icm: Icm, trained: Path, tmp_path: Path) -> None:
    ran = icm("export", tmp_path / "fleet.icm", "--base-model", "acme/none", "--json")
    assert (ran.code, "icm base ls" in ran.error["hint"]) == (ExitCode.FAILED, True)
    assert ran.error["message"] == "no task belongs to base model 'acme/none'"
    named = icm("export", tmp_path / "fleet.icm", "rules", "--base-model", "acme/none", "--json")
    assert named.error["message"] == "none of these tasks belongs to base model 'acme/none'"


@pytest.mark.slow
def test_two_base_models_need_a_choice(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "other", seed=9, base_model_name_or_path="acme/other"), "--no-vectors")
    train_store(trained, "--base-model", "acme/other")
    ran = icm("export", tmp_path / "fleet.icm", "--json")
    assert (ran.code, "--base-model" in ran.error["hint"]) == (ExitCode.FAILED, True)
    assert icm("export", tmp_path / "fleet.icm", "--base-model", "acme/other", "--json").document["tasks"] == ["other"]


def test_a_file_that_exists_is_replaced_only_by_force(icm: Icm, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "fleet.icm").write_text("mine")
    ran = icm("export", tmp_path / "fleet.icm", "--json")
    assert (ran.code, "--force" in ran.error["hint"]) == (ExitCode.FAILED, True)
    assert (tmp_path / "fleet.icm").read_text() == "mine"
    assert icm("export", tmp_path / "fleet.icm", "--force").code == 0


def test_a_damaged_generator_is_exit_13_and_no_file_is_written(icm: Icm, trained: Path, tmp_path: Path) -> None:
    with Store.open(trained) as store:
        generator = store.generator(LABEL)
    assert generator is not None
    damage(trained, generator.blob)
    ran = icm("export", tmp_path / "out" / "fleet.icm", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.DAMAGED, "damaged_blob")
    assert list(tmp_path.glob("out/*")) == []


def test_a_damaged_code_is_left_out_and_named_and_exit_13_if_it_was_asked_for(
    icm: Icm, trained: Path, tmp_path: Path
) -> None:
    damage(trained, blob_of(trained, "rules", "code"))
    ran = icm("export", tmp_path / "fleet.icm", "--json")
    assert (ran.code, ran.document["tasks"], list(ran.document["damaged"])) == (3, ["poems", "silent"], ["rules"])
    asked = icm("export", tmp_path / "out" / "fleet.icm", "poems", "rules")
    assert (asked.code, "task 'rules' cannot be exported: blob" in asked.err) == (ExitCode.DAMAGED, True)
    assert list(tmp_path.glob("out/*")) == []


def test_ls_shows_what_the_codes_kept(icm: Icm, bundle: Path, trained: Path) -> None:
    icm("eval", "poems", "--source", "code", "--device", "cpu")
    icm("export", bundle, "--force")
    stored = {row["name"]: row for row in icm("ls", "--json").document}
    rows = icm("ls", "--from", bundle, "--json").document
    for row in rows:
        shared = row.keys() & stored[row["name"]].keys()
        assert {key: row[key] for key in shared} == {key: stored[row["name"]][key] for key in shared}
    assert [row["retained_gain"] is not None for row in rows] == [True, False, False]


def test_ls_of_a_bundle_is_a_table_for_people(icm: Icm, elsewhere: Path) -> None:
    lines = icm("ls", "--from", elsewhere).out.splitlines()
    assert lines[0].split()[-3:] == ["ERROR", "CLAIMED", "GAIN"]
    assert [line.split()[0] for line in lines[1:]] == list(TASKS)


def test_ls_names_the_digest_that_export_printed(icm: Icm, bundle: Path) -> None:
    digest = icm("export", bundle, "--force", "--json").document["bundle"]
    assert digest in icm("ls", "--from", bundle).err


def test_ls_of_a_bundle_imports_neither_torch_nor_sql(elsewhere: Path) -> None:
    assert not {"torch", "numpy", "sqlalchemy"} & modules_of("ls", "--from", str(elsewhere))


def test_a_task_that_is_not_in_the_bundle_gets_a_suggestion(icm: Icm, elsewhere: Path, tmp_path: Path) -> None:
    ran = icm("materialize", "poem", "-o", tmp_path / "out", "--from", elsewhere, "--json")
    assert (ran.code, "poems" in ran.error["hint"]) == (ExitCode.FAILED, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--source", "original"], ["--source", "generate"], ["--seed", 1]])
def test_what_a_bundle_does_not_hold_is_wrong_usage(
    icm: Icm, elsewhere: Path, tmp_path: Path, options: list[object]
) -> None:
    ran = icm("materialize", "poems", "-o", tmp_path / "out", "--from", elsewhere, *options)
    assert (ran.code, (tmp_path / "out").exists()) == (ExitCode.USAGE, False)


@pytest.mark.parametrize(("limit", "code"), [(0.7, ExitCode.DONE), (0.01, ExitCode.TOO_LOSSY)])
def test_a_limit_on_the_error_is_kept(icm: Icm, elsewhere: Path, tmp_path: Path, limit: float, code: ExitCode) -> None:
    ran = icm("materialize", "poems", "-o", tmp_path / "out", "--from", elsewhere, "--max-error", limit)
    assert (ran.code, (tmp_path / "out").exists()) == (code, code == ExitCode.DONE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_any_flipped_bit_is_noticed_before_anything_is_written(
    elsewhere: Path, tmp_path: Path, draw: st.DataObject
) -> None:
    data = bytearray(elsewhere.read_bytes())
    data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    (tmp_path / "spoilt.icm").write_bytes(data)
    with pytest.raises(BundleError):
        Bundle(tmp_path / "spoilt.icm").materialize("poems", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_cut_short_is_exit_13(icm: Icm, elsewhere: Path, tmp_path: Path) -> None:
    elsewhere.write_bytes(elsewhere.read_bytes()[:-1])
    ran = icm("materialize", "poems", "-o", tmp_path / "out", "--from", elsewhere, "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.DAMAGED, "bundle_error")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(trained: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal\n"
        "from icmlora.fleet.bundles import export as export_bundle\n"
        "write = export_bundle.write_bundle\n"
        "def stop(*arguments, **options):\n"
        "    for number, part in enumerate(write(*arguments, **options)):\n"
        "        os.kill(os.getpid(), signal.SIGKILL) if number > 2 else None\n"
        "        yield part\n"
        "export_bundle.write_bundle = stop\n"
        f"from icm_cli.app import run; run(['export', {str(tmp_path / 'out' / 'fleet.icm')!r}])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert [name.startswith("fleet.icm.icm-") for name in left] == [True]
    again = "import sys; from icm_cli.app import run; sys.exit(run(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", again, "export", str(tmp_path / "out" / "fleet.icm")], check=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fleet.icm"]
