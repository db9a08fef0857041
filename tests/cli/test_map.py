"""`icm map`, and the nearest tasks of `icm show`."""

import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from registry.store import Store
from tests.cli.conftest import Ran, modules_of
from tests.cli.tiny_fleet import SUBJECTS, icm_quietly, write_lora, write_subject
from tests.icmlora.tiny_base import LABEL
from tests.shared import built_once

Icm = Callable[..., Ran]


@pytest.fixture(scope="session")
def fruit_template(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four tasks with vectors and of one that is read through the probes; made once, not to be changed."""

    def build(folder: Path) -> None:
        icm_quietly(folder / "store", "base", "add", LABEL, mixed_template / "base")
        for seed, name in enumerate(SUBJECTS):
            write_subject(folder / "loras" / name, seed=seed)
        write_lora(folder / "loras" / "silent", seed=9)
        icm_quietly(folder / "store", "ingest", folder / "loras", "--device", "cpu")

    return built_once(tmp_path_factory, "fruit", build) / "store"


@pytest.fixture
def fruit(fruit_template: Path, tmp_path: Path) -> Path:
    """The same store, where `icm` looks for it."""
    return Path(shutil.copytree(fruit_template, tmp_path / "store"))


def give_vectors(store: Path, task: str, of: str, **extractor: object) -> None:
    """Record the vectors of one task for another, as if a like extractor had made them."""
    with Store.open(store) as opened:
        vectors = opened.task(of).vectors
        new = tuple(replace(vector, extractor={**vector.extractor, **extractor}) for vector in vectors)
        opened.update(task, lambda present: replace(present, vectors=new))


def drawn_text(path: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_every_task_has_a_cluster_a_place_and_a_nearest_task(icm: Icm, fruit: Path) -> None:
    document = icm("map", "--json").document
    assert [task["task"] for task in document["tasks"]] == sorted(SUBJECTS)
    assert sorted(name for names in document["clusters"] for name in names) == sorted(SUBJECTS)
    assert all(task["task"] in document["clusters"][task["cluster"] - 1] for task in document["tasks"])
    assert all(task["nearest"] in SUBJECTS and 0 < task["distance"] < 2 for task in document["tasks"])
    assert document["support_sets_count"] == 16


def test_the_same_store_gives_the_same_map(icm: Icm, fruit: Path, tmp_path: Path) -> None:
    first = icm("map", "--plot", tmp_path / "one.svg", "--json").document
    second = icm("map", "--plot", tmp_path / "two.svg", "--json").document
    assert first | {"plot": None} == second | {"plot": None}
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_both_silhouettes_are_described_with_a_word(icm: Icm, fruit: Path) -> None:
    document, out = icm("map", "--json").document, icm("map").out
    assert f"silhouette by task     {document['silhouette_by_task']:.3f} (" in out
    assert f"silhouette by cluster  {document['silhouette_by_cluster']:.3f} (" in out
    assert "CLUSTER  SILHOUETTE  TASKS" in out
    assert "NEAREST PAIRS" in out


def test_the_views_give_different_maps(icm: Icm, fruit: Path) -> None:
    adapted, context = (icm("map", "--view", view, "--json").document for view in ("adapted", "context"))
    assert (adapted["view"], context["view"]) == ("adapted", "context")
    assert adapted["median_distance"] != context["median_distance"]


def test_the_number_of_clusters_can_be_set(icm: Icm, fruit: Path) -> None:
    assert [len(names) for names in icm("map", "--clusters", 4, "--json").document["clusters"]] == [1, 1, 1, 1]
    single = icm("map", "--clusters", 1, "--json").document
    assert (len(single["clusters"]), single["silhouette_by_cluster"]) == (1, None)


@pytest.mark.parametrize("clusters", ["many", "0", "-1", "1.5"])
def test_an_invalid_number_of_clusters_is_wrong_usage(icm: Icm, fruit: Path, clusters: str) -> None:
    assert icm("map", f"--clusters={clusters}").code == ExitCode.USAGE


def test_more_clusters_than_tasks_are_refused(icm: Icm, fruit: Path) -> None:
    ran = icm("map", "--clusters", 5)
    assert ran.code == ExitCode.FAILED
    assert "4 tasks cannot make 5 clusters" in ran.err


def test_quiet_prints_one_cluster_per_line(icm: Icm, fruit: Path) -> None:
    clusters = icm("map", "--json").document["clusters"]
    assert icm("map", "-q").out.splitlines() == [" ".join(names) for names in clusters]


def test_verbose_adds_a_row_per_task(icm: Icm, fruit: Path) -> None:
    firsts = [line.split()[0] for line in icm("map", "-v").out.splitlines() if line]
    assert [name for name in firsts if name in SUBJECTS][-4:] == sorted(SUBJECTS)


def test_the_picture_names_every_task(icm: Icm, fruit: Path, tmp_path: Path) -> None:
    ran = icm("map", "--plot", tmp_path / "deep" / "map.svg")
    assert (ran.code, "drew" in ran.err) == (0, True)
    texts = drawn_text(tmp_path / "deep" / "map.svg")
    assert {*SUBJECTS, "4 tasks by their vectors", f"{LABEL}, adapted view"} <= set(texts)


def test_a_picture_that_exists_is_replaced_with_force_only(icm: Icm, fruit: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.svg"
    path.write_text("mine")
    refused = icm("map", "--plot", path)
    assert (refused.code, refused.out, path.read_text()) == (ExitCode.FAILED, "", "mine")
    assert "--force" in refused.err
    assert icm("map", "--plot", path, "--force").code == 0
    assert path.read_text().startswith("<svg")


def test_a_picture_of_another_kind_is_refused(icm: Icm, fruit: Path, tmp_path: Path) -> None:
    ran = icm("map", "--plot", tmp_path / "map.png")
    assert (ran.code, list(tmp_path.glob("map*"))) == (ExitCode.FAILED, [])
    assert ".svg" in ran.err


def test_a_picture_that_cannot_be_written_is_an_error_that_names_the_place(
    icm: Icm, fruit: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    ran = icm("map", "--plot", tmp_path / "file" / "map.svg")
    assert ran.code == ExitCode.FAILED
    assert str(tmp_path / "file") in ran.err


@pytest.mark.slow
def test_it_imports_neither_torch_nor_matplotlib(fruit: Path, tmp_path: Path) -> None:
    assert not {"torch", "matplotlib", "transformers"} & modules_of("map", "--plot", str(tmp_path / "map.svg"))


def test_a_task_read_through_other_texts_is_left_out_and_named(icm: Icm, fruit: Path) -> None:
    reason = "made from probe texts, but the others were made from samples"
    assert icm("map", "--json").document["left_out"] == [{"task": "silent", "reason": reason}]
    assert f"skipped silent: {reason}" in icm("map").err


def test_a_task_without_vectors_is_left_out_and_the_next_command_named(icm: Icm, fruit: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "new"), "--no-vectors")
    ran = icm("map")
    assert (ran.code, "new" in ran.out) == (0, False)
    assert "skipped new: no vectors" in ran.err
    assert "icm vectors" in ran.err
    assert icm("show", "new", "--json").document["nearest"] == []


def test_fewer_than_three_tasks_make_no_map(icm: Icm, mixed: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "new"), "--no-vectors")
    ran = icm("map", "--json")
    assert (ran.code, ran.out) == (ExitCode.FAILED, "")
    assert "there are 2" in ran.error["message"]
    assert "no vectors: new" in ran.error["message"]
    assert "icm vectors" in ran.error["hint"]


def test_without_any_vectors_the_next_command_is_named(icm: Icm, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "new"), "--no-vectors")
    assert "icm vectors" in icm("map", "--json").error["hint"]


def test_vectors_of_another_copy_of_the_base_model_do_not_mix(icm: Icm, fruit: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "new"), "--no-vectors")
    give_vectors(fruit, "new", "ships", base="f" * 64)
    left_out = {entry["task"]: entry["reason"] for entry in icm("map", "--json").document["left_out"]}
    assert left_out["new"] == "made with another copy of the base model"


def test_two_tasks_with_the_same_vectors_are_called_alike(icm: Icm, fruit: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "vessels"), "--no-vectors")
    give_vectors(fruit, "vessels", "ships")
    pair = icm("map", "--json").document["pairs"][0]
    assert pair == {"tasks": ["ships", "vessels"], "distance": 0.0, "is_alike": True}
    assert "cannot distinguish 1 pair of tasks" in icm("map").out


def test_tasks_of_several_base_models_need_a_choice(icm: Icm, fruit: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "new", base_model_name_or_path="acme/other"), "--no-vectors")
    assert len(icm("map", "--json").document["tasks"]) == 4  # the other has no vectors, so it is no choice
    give_vectors(fruit, "new", "ships")
    ran = icm("map", "--json")
    assert (ran.code, "--base-model" in ran.error["hint"]) == (ExitCode.FAILED, True)
    assert f"acme/other, {LABEL}" in ran.error["message"]
    assert len(icm("map", "--base-model", LABEL, "--json").document["tasks"]) == 4
    assert "there is 1" in icm("map", "--base-model", "acme/other").err


def test_a_base_model_that_no_task_has_is_refused(icm: Icm, fruit: Path) -> None:
    ran = icm("map", "--base-model", "acme/none", "--json")
    assert (ran.code, "icm base ls" in ran.error["hint"]) == (ExitCode.FAILED, True)


def test_a_task_with_damaged_vectors_is_left_out_and_named(icm: Icm, fruit: Path) -> None:
    with Store.open(fruit) as store:
        blob = store.task("ships").vectors[0].blob
    damaged = fruit / "blobs" / blob[0] / blob
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    ran = icm("map")
    assert (ran.code, "its vectors cannot be read" in ran.err, "ships" in ran.err) == (ExitCode.PARTLY, True, True)
    assert "ships" not in [row["task"] for row in icm("show", "pears", "--json").document["nearest"]]


def test_without_a_store_it_says_so(icm: Icm) -> None:
    assert icm("map").code == ExitCode.NO_STORE


def test_show_names_the_nearest_tasks_as_the_map_does(icm: Icm, fruit: Path) -> None:
    tasks = {task["task"]: task for task in icm("map", "--json").document["tasks"]}
    nearest = icm("show", "pears", "--json").document["nearest"]
    assert {entry["task"] for entry in nearest} == set(SUBJECTS) - {"pears"}
    assert [entry["distance"] for entry in nearest] == sorted(entry["distance"] for entry in nearest)
    assert nearest[0] == {"task": tasks["pears"]["nearest"], "distance": pytest.approx(tasks["pears"]["distance"])}
    assert f"nearest tasks  {nearest[0]['task']} {nearest[0]['distance']:.3f}, " in icm("show", "pears").out


def test_show_names_no_nearest_tasks_if_none_can_be_compared(icm: Icm, fruit: Path) -> None:
    assert icm("show", "silent", "--json").document["nearest"] == []
    assert "nearest tasks" not in icm("show", "silent").out


@pytest.mark.slow
def test_show_does_not_import_torch(fruit: Path) -> None:
    assert not {"torch", "transformers"} & modules_of("show", "pears")
