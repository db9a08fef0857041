"""`icm import`: a bundle becomes tasks of a store."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from registry.store import Store
from tests.cli.coded import codes, current
from tests.cli.conftest import Ran
from tests.cli.test_materialize import content
from tests.cli.tiny_fleet import icm_quietly, train_store, write_lora
from tests.icmlora.bundles import Opened, forge, opened
from tests.shared import use_config_of

Icm = Callable[..., Ran]
TASKS = ["poems", "rules", "silent"]
NAMES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@pytest.fixture(scope="module")
def bundle_template(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle, its adapters in before/ and its store in away/."""
    folder = tmp_path_factory.mktemp("bundle")
    store = Path(shutil.copytree(trained_template, folder / "away"))
    use_config_of(trained_template)
    icm_quietly(store, "eval", "poems", "--source", "code", "--device", "cpu")
    icm_quietly(store, "export", folder / "fleet.icm")
    for task in TASKS:
        icm_quietly(store, "materialize", task, "-o", folder / "before" / task, "--source", "code")
    return folder


@pytest.fixture
def bundle(bundle_template: Path, tmp_path: Path) -> Path:
    """A bundle of all tasks, with what the code of `poems` keeps; the store that it came from is gone."""
    shutil.copytree(bundle_template, tmp_path, dirs_exist_ok=True)
    return tmp_path / "fleet.icm"


def statuses(ran: Ran) -> dict[str, str]:
    return {entry["task"]: entry["status"] for entry in ran.document["tasks"]}


def verified(icm: Icm) -> bool:
    return bool(icm("verify", "--read-data", "--json").document["ok"])


def test_a_new_store_gives_the_same_bytes_as_the_first_one(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    assert statuses(icm("import", bundle, "--json")) == dict.fromkeys(TASKS, "added")
    for task in TASKS:
        icm("materialize", task, "-o", tmp_path / "after" / task, "--source", "code")
        after, before = content(tmp_path / "after" / task), content(tmp_path / "before" / task)
        assert b"claimed by the imported bundle" in after.pop("README.md")
        assert after == {name: data for name, data in before.items() if name != "README.md"}
    assert verified(icm)


def test_what_comes_out_again_is_the_same_bundle(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    icm("import", bundle)
    icm("export", tmp_path / "again.icm")
    assert (tmp_path / "again.icm").read_bytes() == bundle.read_bytes()


def test_an_adapter_comes_from_its_code_without_being_asked_to(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    icm("import", bundle)
    assert icm("materialize", "rules", "-o", tmp_path / "out", "--json").document["source"] == "code"


def test_the_same_again_changes_nothing(icm: Icm, bundle: Path) -> None:
    icm("import", bundle)
    before = icm("ls", "--json").out
    assert statuses(icm("import", bundle, "--json")) == dict.fromkeys(TASKS, "known")
    assert icm("ls", "--json").out == before


def test_only_the_tasks_that_are_named_are_imported(icm: Icm, bundle: Path) -> None:
    assert icm("import", bundle, "RULES", "-q").out == "rules\n"
    assert icm("ls", "-q").out == "rules\n"
    assert statuses(icm("import", bundle, "--json")) == {"poems": "added", "rules": "known", "silent": "added"}


def test_a_name_that_the_bundle_lacks_gets_a_suggestion(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    ran = icm("import", bundle, "rule", "--json")
    assert (ran.code, "rules" in ran.error["hint"]) == (ExitCode.FAILED, True)
    assert not (tmp_path / "store").exists()


def test_a_dry_run_says_what_would_be_done_and_makes_no_store(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    ran = icm("import", bundle, "--dry-run", "--json")
    assert (ran.document["dry_run"], statuses(ran)) == (True, dict.fromkeys(TASKS, "added"))
    assert not (tmp_path / "store").exists()


def test_what_a_bundle_says_of_a_code_is_shown_as_its_claim(icm: Icm, bundle: Path) -> None:
    said = icm("ls", "--from", bundle, "--json").document[0]
    icm("import", bundle)
    (listed, *_), shown = icm("ls", "--json").document, icm("show", "poems", "--json").document
    assert (shown["evaluations"], listed["relative_error"], listed["retained_gain"]) == ([], None, None)
    assert listed["claimed"] == shown["code"]["claimed"]
    assert listed["claimed"]["relative_error"] == said["relative_error"]
    assert "not measured here" in icm("show", "poems").out
    refused = icm("materialize", "poems", "-o", "out", "--max-error", "10")
    assert (refused.code, "(its bundle claims" in refused.err) == (ExitCode.TOO_LOSSY, True)
    assert "3 codes have only the quality that the bundle claims" in icm("stats").out


def test_an_original_that_was_never_here_is_not_called_evicted(icm: Icm, bundle: Path, mixed_template: Path) -> None:
    icm("import", bundle)
    said = [icm("show", "poems").out, icm("ls").out, icm("materialize", "poems", "-o", "x", "--source", "original").err]
    facts = ("none: imported at", "none", "was never in this store")
    assert [fact in text and "evicted" not in text for fact, text in zip(facts, said, strict=True)] == [True] * 3
    icm("ingest", mixed_template / "loras" / "poems", "--restore", "--no-vectors")
    icm("evict", "poems", "--max-error", "0.7")
    assert "evicted at" in icm("show", "poems").out


FORGED = {
    "names": {"names": {"model.layers.0.self_attn.q_proj": ["../../x", "y"]}},
    "the same name twice": {"names": {"model.layers.0.self_attn.q_proj": ["a", "a"]}},
    "shapes": {"shapes": {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [3, 5]}},
    "experts": {"experts": {"model.layers.0.self_attn": 2}},
    "number format": {"dtype": "F9000"},
    "number formats": {"dtypes": {"x": ["F32"]}},
    "metadata": {"metadata": {"format": 1}},
    "unknown": {"evil": 1},
}


@pytest.mark.one_case
@pytest.mark.parametrize("form", FORGED.values(), ids=list(FORGED))
def test_a_task_with_a_forged_form_is_left_out_by_name_and_the_others_are_imported(
    icm: Icm, bundle: Path, form: dict[str, object]
) -> None:
    forge(bundle, lambda opened: opened.tasks[1]["final"].update(template=json.dumps(form)))
    for options in (("--dry-run",), ()):
        ran = icm("import", bundle, "--json", *options)
        assert (ran.code, statuses(ran)) == (ExitCode.PARTLY, {"poems": "added", "silent": "added"})
        assert ran.document["refused"] == {"rules": "the recorded form of the original does not fit it"}
    assert icm("ls", "-q").out == "poems\nsilent\n"
    assert verified(icm)
    assert icm("import", bundle, "rules").code == ExitCode.FAILED


@pytest.mark.one_case
@pytest.mark.parametrize("limit", [("--max-error", 0.05), ("--min-gain", 0.9)])
def test_a_forged_claim_costs_no_original(
    icm: Icm, bundle: Path, mixed_template: Path, tmp_path: Path, limit: tuple[str, float]
) -> None:
    def claim_more(opened: Opened) -> None:
        claim = opened.tasks[0]["code"]["claim"]
        claim["squared_error"], claim["measured"]["retained_gain"] = 1e-12, 0.999

    run = tmp_path / "poems"
    shutil.copytree(mixed_template / "loras" / "poems", run)
    icm("import", forge(bundle, claim_more), "poems")
    assert icm("ingest", run, "--no-vectors", "--json").events[-1]["restored"] == 1
    assert icm("evict", "poems", *limit, "--device", "cpu").code == ExitCode.PARTLY
    assert {row["evicted_at"] for row in icm("show", "poems", "--json").document["adapters"]} == {None}
    icm("materialize", "poems", "-o", tmp_path / "out")
    assert content(tmp_path / "out") == {name: (run / name).read_bytes() for name in sorted(NAMES)}


def test_a_task_with_the_same_original_gets_its_code(
    icm: Icm, bundle: Path, mixed_template: Path, tmp_path: Path
) -> None:
    icm("ingest", mixed_template / "loras" / "poems", "--no-vectors")
    assert statuses(icm("import", bundle, "poems", "--json")) == {"poems": "encoded"}
    icm("materialize", "poems", "-o", tmp_path / "out")
    assert content(tmp_path / "out") == {
        name: (mixed_template / "loras" / "poems" / name).read_bytes() for name in sorted(NAMES)
    }


def test_another_adapter_of_that_name_is_refused_and_nothing_is_taken(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "rules", seed=77), "--no-vectors")
    ran = icm("import", bundle, "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "task_conflict")
    assert "--on-conflict skip" in ran.error["hint"]
    assert icm("ls", "-q").out == "rules\n"
    assert icm("prune", "--dry-run", "--older-than", "0s", "--json").document["blobs"] == 0


def test_another_adapter_of_that_name_can_be_passed_over(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "rules", seed=77), "--no-vectors")
    ran = icm("import", bundle, "--on-conflict", "skip", "--json")
    assert (ran.code, statuses(ran)["rules"]) == (0, "skipped")
    assert "rules" in ran.err


def test_tasks_that_changed_meanwhile_are_decided_again(
    icm: Icm, bundle: Path, mixed_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    icm("ingest", write_lora(tmp_path / "rules", seed=77), "--no-vectors")
    publish = Store.publish

    def meanwhile(store: Store, states: Any, **options: Any) -> Any:
        monkeypatch.setattr(Store, "publish", publish)
        folder = mixed_template / "loras" / "rules"
        icm_quietly(tmp_path / "store", "ingest", folder, "--on-conflict", "version", "--no-vectors")
        icm_quietly(tmp_path / "store", "ingest", write_lora(tmp_path / "silent", seed=5), "--no-vectors")
        return store.publish(states, **options)

    monkeypatch.setattr(Store, "publish", meanwhile)
    ran = icm("import", bundle, "--on-conflict", "skip", "--json")
    assert (ran.code, statuses(ran)) == (0, {"poems": "added", "rules": "encoded", "silent": "skipped"})
    assert verified(icm)


@pytest.mark.slow
def test_codes_come_with_their_generator_where_another_is_in_use(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "other", seed=78), "--no-vectors")
    train_store(tmp_path / "store")
    used = current(tmp_path / "store")
    assert statuses(icm("import", bundle, "--json")) == dict.fromkeys(TASKS, "added")
    assert (current(tmp_path / "store").blob, list(codes(tmp_path / "store"))) == (used.blob, ["other"])
    icm("materialize", "rules", "-o", tmp_path / "out")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "before" / "rules" / name).read_bytes()
    assert verified(icm)


@pytest.mark.one_case
@pytest.mark.parametrize("at", [0.01, 0.5, 0.999])
def test_a_damaged_bundle_is_exit_13_and_makes_no_store(icm: Icm, bundle: Path, tmp_path: Path, at: float) -> None:
    data = bytearray(bundle.read_bytes())
    data[int(at * len(data))] ^= 1
    bundle.write_bytes(data)
    ran = icm("import", bundle, "poems", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.DAMAGED, "bundle_error")
    assert not (tmp_path / "store").exists()


def test_codes_of_another_generator_are_refused(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "away", tmp_path / "store")
    train_store(tmp_path / "store", "--fresh", "--seed", 5)
    icm("export", tmp_path / "other.icm")
    shutil.rmtree(tmp_path / "store")
    ours = opened(bundle).generator["blob"]

    def exchange(other: Opened) -> None:
        del other.blobs[other.generator["blob"].partition(":")[0]]
        digest = ours.partition(":")[0]
        other.blobs[digest] = opened(bundle).blobs[digest]
        other.generator["blob"] = ours
        for task in other.tasks:
            task["code"]["generator"] = ours

    ran = icm("import", forge(tmp_path / "other.icm", exchange), "--json")
    assert (ran.code, "another generator" in ran.error["message"]) == (ExitCode.DAMAGED, True)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.parametrize("point", ["blob-renamed", "blobs-durable", "rows-before-commit", "rows-committed"])
def test_a_killed_import_is_completed_by_the_same_command(icm: Icm, bundle: Path, point: str) -> None:
    script = "import sys; from icm_cli.app import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "import", str(bundle)]
    assert subprocess.run(command, env=os.environ | {"ICM_FAILPOINT": point}, check=False).returncode == -9
    names = icm("ls", "-q").out.split()
    assert names == (TASKS if point == "rows-committed" else [])
    assert verified(icm)
    assert icm("import", bundle).code == 0
    assert icm("ls", "-q").out.split() == TASKS
    assert verified(icm)


def test_an_import_restores_what_the_store_has_lost(icm: Icm, bundle: Path, tmp_path: Path) -> None:
    icm("import", bundle)
    with Store.open(tmp_path / "store") as store:
        code = store.task("poems").code
        assert code is not None
        store.blobs.delete([code.blob, code.generator])
    assert not verified(icm)
    assert "0 codes" in icm("import", bundle).out
    assert verified(icm)
