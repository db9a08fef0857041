"""`icm base add --loader`: the worked example of the guide goes through the whole program."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran
from tests.cli.test_second_modality import LABEL, write_task
from tests.cli.tiny_fleet import icm_quietly, train_store
from tests.icmlora.base_models.test_custom_model import worked_example
from tests.icmlora.base_models.toy_modality import points, write_classifier
from tests.shared import config_of, use_config_of

Icm = Callable[..., Ran]
CPU = ("--device", "cpu")
LOADER = "guide_models:load"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model in base/, three tasks in loras/, and the loader of the guide."""
    root = tmp_path_factory.mktemp("custom")
    write_classifier(root / "base")
    (root / "guide_models.py").write_text(worked_example())
    for task in (1, 2, 3):
        write_task(root / "loras" / f"turned-{task}", root / "base", task)
    return root


@pytest.fixture(autouse=True)
def importable(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(fleet))


@pytest.fixture(scope="module")
def template(fleet: Path) -> Path:
    """A store of them, with vectors and codes; the configuration says where the base model is."""
    store = fleet / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(fleet))
        patch.setenv("XDG_CONFIG_HOME", str(config_of(store)))
        icm_quietly(store, "base", "add", LABEL, fleet / "base", "--loader", LOADER)
        icm_quietly(store, "ingest", fleet / "loras", *CPU)
        train_store(store)
    return store


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    use_config_of(template)
    return Path(shutil.copytree(template, tmp_path / "store"))


def test_tasks_have_vectors_and_a_retained_gain(icm: Icm, store: Path) -> None:
    ran = icm("eval", "turned-1", *CPU, "--json")
    sources = ran.events[0]["sources"]
    assert sources["original"]["metric"] == "accuracy"
    assert sources["original"]["value"] > sources["base"]["value"] + 0.2
    assert sources["code"]["retained_gain"] > 0.5
    assert icm("vectors", *CPU).code == 0


def test_a_code_is_refined_on_the_samples(icm: Icm, store: Path) -> None:
    ran = icm("encode", "turned-1", "--again", "--quality", "1", "--refine", "3", *CPU)
    assert (ran.code, "not refined" in ran.out) == (0, False), ran.err


def test_a_bundle_recognises_with_the_loader_that_the_user_names_as_the_store_does(
    icm: Icm, store: Path, fleet: Path, tmp_path: Path
) -> None:
    samples, bundle = tmp_path / "points.jsonl", tmp_path / "fleet.icm"
    samples.write_bytes(points(1, 16, seed=5))
    there = icm("recognize", "--samples", samples, *CPU, "--json").document
    icm("export", bundle)
    shutil.rmtree(store)
    base = ("--base-model", fleet / "base", "--loader", LOADER, *CPU)
    assert icm("recognize", "--samples", samples, "--bundle", bundle, *base, "--json").document == there


def test_a_bundle_never_says_what_loads_its_base_model(icm: Icm, store: Path, fleet: Path, tmp_path: Path) -> None:
    samples, bundle = tmp_path / "points.jsonl", tmp_path / "fleet.icm"
    samples.write_bytes(points(1, 16, seed=5))
    icm("export", bundle)
    assert LOADER.encode() not in bundle.read_bytes()
    ran = icm("recognize", "--samples", samples, "--bundle", bundle, "--base-model", fleet / "base", *CPU)
    assert ran.code == ExitCode.FAILED
    for arguments in (("--bundle", bundle), ("--base-model", fleet / "base")):
        ran = icm("recognize", "--samples", samples, *arguments, "--loader", LOADER, *CPU)
        assert (ran.code, "--loader needs a bundle" in ran.err) == (ExitCode.USAGE, True)


def test_the_list_of_base_models_shows_the_loader(icm: Icm, store: Path) -> None:
    assert f"loaded by {LOADER}" in icm("base", "ls").out
    assert json.loads(icm("base", "ls", "--json").out)[0]["loader"] == LOADER


def test_a_loader_that_went_away_leaves_the_tasks_as_they_are(
    icm: Icm, store: Path, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [place for place in sys.path if place != str(fleet)])
    monkeypatch.delitem(sys.modules, "guide_models")
    assert icm("materialize", "turned-1", "-o", tmp_path / "out", "--source", "code").code == 0
    ran = icm("eval", *CPU)
    assert (ran.code, "cannot be imported" in ran.err) == (ExitCode.FAILED, True)


def test_a_function_that_is_no_loader_is_refused_and_nothing_is_stored(icm: Icm, fleet: Path, tmp_path: Path) -> None:
    ran = icm("base", "add", LABEL, fleet / "base", "--loader", "os:system")
    assert "os:system is not marked as a loader" in ran.err
    assert not (tmp_path / "store").exists()
