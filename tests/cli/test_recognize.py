"""`icm recognize` and the source `recalled`: a known task comes back by its vectors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora import Bundle, Fleet, NotRecognized
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import SUBJECTS, icm_quietly, train_store, write_subject
from tests.icmlora.tiny_base import LABEL
from tests.shared import built_once, use_config_of

Icm = Callable[..., Ran]
NEW = "0123456789 ~~~~ {}[]"


@pytest.fixture(scope="session")
def subjects_template(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained store of four tasks with samples; made once, not to be changed."""

    def build(folder: Path) -> None:
        shutil.copytree(mixed_template / "base", folder / "base")
        icm_quietly(folder / "store", "base", "add", LABEL, folder / "base")
        for seed, name in enumerate(SUBJECTS):
            write_subject(folder / "loras" / name, seed=seed)
        icm_quietly(folder / "store", "ingest", folder / "loras", "--device", "cpu")
        train_store(folder / "store")

    return built_once(tmp_path_factory, "subjects", build)


@pytest.fixture
def subjects(subjects_template: Path, tmp_path: Path) -> Path:
    """The same store, where `icm` looks for it."""
    use_config_of(subjects_template)
    return Path(shutil.copytree(subjects_template / "store", tmp_path / "store"))


def write_samples(path: Path, subject: str) -> Path:
    """Write samples that no task has, 16 of one subject."""
    lines = [json.dumps({"text": f"{subject} number {number} of {subject}"}) for number in range(40, 56)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def ships(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "ships.jsonl", SUBJECTS["ships"])


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "strange.jsonl", NEW)


def test_other_samples_of_a_known_task_are_recognised(icm: Icm, subjects: Path, tmp_path: Path) -> None:
    for name, subject in SUBJECTS.items():
        samples = write_samples(tmp_path / f"{name}.jsonl", subject)
        document = icm("recognize", "--samples", samples, "--device", "cpu", "--json").document
        assert (document["task"], document["candidates"][0]["task"]) == (name, name)
        assert document["samples_count"] == 16


def test_the_answer_begins_with_the_task_and_its_probability(icm: Icm, subjects: Path, ships: Path) -> None:
    ran = icm("recognize", "--samples", ships, "--device", "cpu", "--limit", 2)
    best = icm("recognize", "--samples", ships, "--device", "cpu", "--json").document["candidates"][0]
    assert ran.out.splitlines()[0] == f"ships, {best['probability']:.2f}"
    assert len(ran.out.splitlines()) == 2 + 1 + 3  # a table of two tasks and of "none of them"
    assert icm("recognize", "--samples", ships, "--device", "cpu", "-q").out == "ships\n"


def test_a_new_task_is_none_of_them(icm: Icm, subjects: Path, strange: Path) -> None:
    ran = icm("recognize", "--samples", strange, "--device", "cpu")
    assert (ran.code, ran.out.startswith("none of them, 0.")) == (ExitCode.DONE, True)
    assert "icm generate" in ran.err
    assert icm("recognize", "--samples", strange, "--device", "cpu", "-q").out == ""
    assert icm("recognize", "--samples", strange, "--device", "cpu", "--json").document["task"] is None


def test_the_vectors_of_a_task_bring_back_its_code(icm: Icm, subjects: Path, tmp_path: Path) -> None:
    for source in ("recalled", "code"):
        icm("materialize", "trains", "-o", tmp_path / source, "--source", source)
    ran = icm("materialize", "trains", "-o", tmp_path / "again", "--source", "recalled", "--json")
    assert (ran.document["source"], ran.document["recognized"]) == ("recalled", "trains")
    fleet = Fleet(subjects)
    one, other = (fleet.load("trains", source=source) for source in ("recalled", "code"))
    assert [(module.name, module.a.tolist(), module.b.tolist()) for module in one.modules] == [
        (module.name, module.a.tolist(), module.b.tolist()) for module in other.modules
    ]


def test_what_the_network_alone_predicts_is_another_adapter(icm: Icm, subjects: Path, tmp_path: Path) -> None:
    generated, predicted = (
        icm("materialize", "trains", "-o", tmp_path / source, "--source", source, "--json").document
        for source in ("recalled", "network")
    )
    assert generated["weights"] != predicted["weights"]
    assert (predicted["source"], predicted["recognized"]) == ("network", None)
    assert "a prediction" in (tmp_path / "network" / "README.md").read_text()
    assert "the stored code of trains" in (tmp_path / "recalled" / "README.md").read_text()


def test_a_bundle_recognises_what_the_store_recognises(
    icm: Icm, subjects: Path, subjects_template: Path, ships: Path, tmp_path: Path
) -> None:
    there = icm("recognize", "--samples", ships, "--device", "cpu", "--json").document
    icm("export", tmp_path / "fleet.icm")
    shutil.rmtree(subjects)
    base = ("--base-model", subjects_template / "base", "--device", "cpu")
    here = icm("recognize", "--samples", ships, "--bundle", tmp_path / "fleet.icm", *base, "--json").document
    assert here == there


def test_an_imported_bundle_brings_its_vectors(icm: Icm, subjects: Path, tmp_path: Path) -> None:
    before = icm("map", "--json").document
    icm("export", tmp_path / "fleet.icm")
    shutil.rmtree(subjects)
    assert icm("import", tmp_path / "fleet.icm").code == 0
    assert icm("map", "--json").document == before


def test_a_bundle_without_vectors_says_what_is_missing(icm: Icm, trained: Path, ships: Path, tmp_path: Path) -> None:
    icm("export", tmp_path / "fleet.icm")
    ran = icm("recognize", "--samples", ships, "--bundle", tmp_path / "fleet.icm", "--device", "cpu", "--json")
    assert ran.code == ExitCode.FAILED
    assert "recognition needs the context vectors of 3 tasks" in ran.error["message"]


@pytest.mark.slow
def test_the_library_raises_for_a_new_task(subjects: Path, strange: Path, ships: Path, tmp_path: Path) -> None:
    fleet = Fleet(subjects)
    assert fleet.recognize(ships, device="cpu").known_task() == "ships"
    with pytest.raises(NotRecognized, match="none of the known tasks"):
        fleet.recognize(strange, device="cpu").known_task()
    fleet.export_bundle(tmp_path / "fleet.icm")
    assert Bundle(tmp_path / "fleet.icm").index.tasks[0].vectors is not None
