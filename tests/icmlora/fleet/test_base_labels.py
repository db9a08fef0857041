"""Ingest finds the base model of an adapter by any of its labels, and says what it joined."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from icmlora import AdapterRefused, BaseModelConflict, BaseModelNotFound, Event, Fleet
from icmlora.fleet.bases.joins import BaseJoined
from icmlora.fleet.ingest.report import IngestReport
from tests.icmlora.tiny_base import LABEL, write_tiny_adapter, write_tiny_base

LLAMA, MIRROR = "meta-llama/Meta-Llama-3-8B-Instruct", "unsloth/llama-3-8b-Instruct-bnb-4bit"


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "store")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that is not to be changed."""
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


def write(folder: Path, label: str | None, seed: int = 1, revision: str | None = None) -> Path:
    """Write an adapter that names a base model."""
    config = write_tiny_adapter(folder, seed) / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": label, "revision": revision}
    config.write_text(json.dumps(fields))
    return folder


def bases(fleet: Fleet) -> dict[str, list[str]]:
    """Return the tasks of each base model that has some."""
    found: dict[str, list[str]] = {}
    for row in fleet.tasks():
        found.setdefault(row.base, []).append(row.name)
    return found


def joined(report: IngestReport) -> list[tuple[str, str, str, bool]]:
    return [(event.label, event.base_model, event.reason, event.is_quantised) for event in report.joined]


def test_a_known_mirror_is_taken_for_its_original_and_it_is_said(tmp_path: Path) -> None:
    heard: list[Event] = []
    fleet = Fleet(tmp_path / "store", on_event=heard.append)
    write(tmp_path / "loras" / "poems", MIRROR)
    write(tmp_path / "loras" / "rules", LLAMA, seed=2)
    report = fleet.ingest([tmp_path / "loras"])
    assert bases(fleet) == {LLAMA: ["poems", "rules"]}
    assert joined(report) == [(MIRROR, LLAMA, "mirror", True)]
    assert [event for event in heard if isinstance(event, BaseJoined)] == report.joined
    assert fleet.ingest([tmp_path / "loras"]).joined == []


def test_an_original_joins_the_mirror_that_the_store_knows(fleet: Fleet, tmp_path: Path) -> None:
    for number, label in enumerate(("unsloth/new-model", "unsloth/new-model-unsloth-bnb-4bit")):
        report = fleet.ingest([write(tmp_path / f"task{number}", label, seed=number)])
    assert bases(fleet) == {"unsloth/new-model": ["task0", "task1"]}
    assert joined(report) == [("unsloth/new-model-unsloth-bnb-4bit", "unsloth/new-model", "mirror", True)]


def test_a_dry_run_says_what_would_be_joined_and_joins_nothing(fleet: Fleet, tmp_path: Path) -> None:
    report = fleet.ingest([write(tmp_path / "poems", MIRROR)], dry_run=True)
    assert joined(report) == [(MIRROR, LLAMA, "mirror", True)]
    assert not fleet.path.exists()


def test_a_separated_mirror_stays_apart(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write(tmp_path / "poems", MIRROR)])
    fleet.separate_base_model(LLAMA, [MIRROR])
    fleet.ingest([write(tmp_path / "rules", MIRROR, seed=2)])
    assert bases(fleet) == {MIRROR: ["poems", "rules"]}


def test_copies_with_equal_files_are_one_base_model(fleet: Fleet, tmp_path: Path, tiny: Path) -> None:
    copy = write_tiny_base(tmp_path / "copy")
    other = write_tiny_base(tmp_path / "other", seed=1)
    for number, path in enumerate((tiny, copy, other)):
        report = fleet.ingest([write(tmp_path / f"task{number}", str(path), seed=number)])
        assert joined(report) == ([(str(copy), str(tiny), "fingerprint", False)] if path == copy else [])
    assert bases(fleet) == {str(tiny): ["task0", "task1"], str(other): ["task2"]}


def test_adding_the_path_of_a_model_that_is_known_joins_the_two(fleet: Fleet, tmp_path: Path, tiny: Path) -> None:
    fleet.ingest([write(tmp_path / "poems", str(tiny)), write(tmp_path / "rules", LABEL, seed=2)])
    fleet.add_base_model(LABEL, tiny)
    (base,) = fleet.base_models()
    assert set(base.base.names) == {LABEL, str(tiny)}
    assert (base.path, base.tasks) == (tiny, 2)


def test_a_copy_under_any_label_is_found(fleet: Fleet, tmp_path: Path, tiny: Path) -> None:
    fleet.ingest([write(tmp_path / "poems", LABEL)])
    fleet.alias_base_model(LABEL, [str(tiny)])
    (base,) = fleet.base_models()
    assert (base.base.name, base.path) == (LABEL, tiny)


def test_revisions_are_kept_apart_unless_told(fleet: Fleet, tmp_path: Path) -> None:
    for name, revision in (("main", "main"), ("none", None), ("old", "v1")):
        fleet.ingest([write(tmp_path / name, LABEL, revision=revision, seed=len(name))])
    assert bases(fleet) == {LABEL: ["main", "none"], f"{LABEL}@v1": ["old"]}
    fleet.alias_base_model(LABEL, [f"{LABEL}@v1"])
    assert bases(fleet) == {LABEL: ["main", "none", "old"]}


def test_relative_labels_of_two_projects_are_two_base_models(fleet: Fleet, tmp_path: Path, tiny: Path) -> None:
    for project in ("first", "second"):
        write_tiny_base(tmp_path / project / "model", seed=len(project))
        write(tmp_path / project / f"task-{project}", "./model", seed=len(project))
    fleet.ingest([tmp_path])
    wanted = {str(tmp_path / project / "model"): [f"task-{project}"] for project in ("first", "second")}
    assert bases(fleet) == wanted
    assert all(base.path is not None for base in fleet.base_models())


def test_a_moved_folder_keeps_the_base_model_of_its_tasks(fleet: Fleet, tmp_path: Path) -> None:
    write(tmp_path / "here" / "poems", "./model")
    fleet.ingest([tmp_path / "here"])
    (tmp_path / "here").rename(tmp_path / "there")
    report = fleet.ingest([tmp_path / "there"])
    assert [task.status for task in report.done] == ["known"]
    assert bases(fleet) == {str(tmp_path / "here" / "model"): ["poems"]}


def test_an_adapter_without_a_label_is_given_its_base_model(fleet: Fleet, tmp_path: Path) -> None:
    write(tmp_path / "loras" / "poems", None)
    write(tmp_path / "loras" / "rules", LABEL, seed=2)
    report = fleet.ingest([tmp_path / "loras"], base_model=LABEL)
    assert (bases(fleet), report.problems) == ({LABEL: ["poems", "rules"]}, [])
    assert fleet.show("poems").task.final.original_only is None


def test_a_known_task_without_a_label_moves_to_the_base_model_that_is_told(fleet: Fleet, tmp_path: Path) -> None:
    folder = write(tmp_path / "poems", None)
    (first,) = fleet.ingest([folder]).done
    assert "--base-model" in str(first.original_only)
    (again,) = fleet.ingest([folder], base_model=MIRROR).done
    assert (again.status, again.base_model, again.original_only) == ("updated", LLAMA, None)
    (later,) = fleet.ingest([folder]).done
    assert (later.status, later.base_model, later.original_only) == ("known", LLAMA, None)


def test_a_label_of_another_base_model_is_refused_and_the_others_are_taken(fleet: Fleet, tmp_path: Path) -> None:
    write(tmp_path / "loras" / "poems", None)
    write(tmp_path / "loras" / "rules", "other/model", seed=2)
    report = fleet.ingest([tmp_path / "loras"], base_model=LABEL)
    assert bases(fleet) == {LABEL: ["poems"]}
    (problem,) = report.problems
    assert (problem.kind, "other/model" in problem.message) == ("base-model", True)
    assert f"icm base alias {LABEL} other/model" in str(problem.hint)
    fleet.alias_base_model(LABEL, ["other/model"])
    assert fleet.ingest([tmp_path / "loras"], base_model=LABEL).problems == []


def test_strict_refuses_a_label_of_another_base_model(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="was trained for"):
        fleet.ingest([write(tmp_path / "poems", "other/model")], base_model=LABEL, strict=True)
    assert not fleet.path.exists()


def test_tasks_of_both_labels_share_one_generator(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write(tmp_path / "poems", LABEL), write(tmp_path / "rules", "tiny/copy", seed=2)])
    fleet.train(base_model="tiny/copy", device="cpu", steps=5, refine=0, evaluate=False)
    before = {row.name: fleet.show(row.name).task.code for row in fleet.tasks()}
    done = fleet.alias_base_model(LABEL, ["tiny/copy"])
    assert (done.tasks, done.generators) == (1, 1)
    assert {row.name: fleet.show(row.name).task.code for row in fleet.tasks()} == before
    fleet.update(base_model=LABEL, device="cpu", steps=5, refine=0, evaluate=False)
    assert all(row.is_coded for row in fleet.tasks("tiny/copy"))
    assert len(fleet.tasks(LABEL)) == 2
    bundle = tmp_path / "fleet.icm"
    fleet.export_bundle(bundle, base_model="tiny/copy")
    other = Fleet(tmp_path / "other")
    other.import_bundle(bundle)
    for task in ("poems", "rules"):
        fleet.materialize(task, tmp_path / "one" / task, source="code")
        other.materialize(task, tmp_path / "two" / task)
        files = [(tmp_path / side / task / "adapter_config.json").read_bytes() for side in ("one", "two")]
        assert files[0] == files[1] == (tmp_path / task / "adapter_config.json").read_bytes()


@pytest.mark.slow
def test_a_bundle_joins_the_generator_of_any_label(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write(tmp_path / "poems", LABEL)])
    fleet.train(device="cpu", steps=5, refine=0, evaluate=False)
    fleet.export_bundle(tmp_path / "fleet.icm")
    other = Fleet(tmp_path / "other")
    other.alias_base_model("my/name", [LABEL])
    other.import_bundle(tmp_path / "fleet.icm")
    assert bases(other) == {"my/name": ["poems"]}
    assert other.ingest([tmp_path / "poems"], restore=True).restored == 1


def test_only_labels_of_the_base_model_are_separated(fleet: Fleet, tmp_path: Path) -> None:
    fleet.alias_base_model(LABEL, ["tiny/copy"])
    for label in (LABEL, "tiny/other"):
        with pytest.raises(BaseModelConflict):
            fleet.separate_base_model(LABEL, ["tiny/copy", label])
    (base,) = fleet.base_models()
    assert [label.label for label in base.base.labels] == ["tiny/copy"]


def test_a_base_model_is_forgotten_by_any_label(fleet: Fleet, tiny: Path) -> None:
    fleet.add_base_model(LABEL, tiny)
    fleet.alias_base_model(LABEL, ["tiny/copy"])
    fleet.forget_base_model("tiny/copy")
    assert [base.path for base in fleet.base_models()] == [None]
    with pytest.raises(BaseModelNotFound):
        fleet.forget_base_model("tiny/other")


def test_a_card_names_the_model_without_its_revision(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write(tmp_path / "poems", LABEL, revision="v1")])
    fleet.materialize("poems", tmp_path / "out")
    assert f"base_model: {LABEL}\n" in (tmp_path / "out" / "README.md").read_text()


def test_known_fingerprints_are_not_computed_again(fleet: Fleet, tmp_path: Path, tiny: Path) -> None:
    write(tmp_path / "poems", str(tiny))
    fleet.ingest([tmp_path / "poems"])
    fleet.extract_vectors(device="cpu")  # which reads all of the base model
    notes: list[str] = []
    other = Fleet(fleet.path, on_event=lambda event: notes.append(getattr(event, "note", "")))
    copy = write_tiny_base(tmp_path / "copy")
    assert len(other.ingest([write(tmp_path / "rules", str(copy), seed=2)]).joined) == 1
    assert [note for note in notes if note.startswith("reading")] == [f"reading {copy}"]
