"""`icm stats`."""

import os
import resource
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from registry.manifests import File, Run
from registry.store import Store
from tests.cli.conftest import Ran, modules_of
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]


def size_of_files(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


def test_the_total_is_the_size_of_the_files(icm: Icm, trained: Path) -> None:
    total = icm("stats", "--json").document["on_disk"]["total"]
    assert total == size_of_files(trained)
    folders = 4096 * sum(path.is_dir() for path in [trained, *trained.rglob("*")])
    du = int(subprocess.run(["du", "-sb", trained], capture_output=True, text=True, check=True).stdout.split()[0])
    assert 0 <= du - total <= folders


def test_a_file_that_disappears_in_the_meantime_does_not_count(
    icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = os.walk
    monkeypatch.setattr("registry.storage.folder.os.walk", lambda root: [*walk(root), (root / "tmp", [], ["gone"])])
    assert icm("stats", "--json").document["on_disk"]["total"] == size_of_files(trained)


def test_the_parts_add_up_to_the_total(icm: Icm, trained: Path) -> None:
    parts = icm("stats", "--json").document["on_disk"]
    assert sum(size for name, size in parts.items() if name != "total") == parts["total"]


def test_the_parts_are_the_files(icm: Icm, trained: Path) -> None:
    found = icm("stats", "--json").document
    with Store.open(trained) as store:
        tasks, generator = list(store.tasks()), store.generator(LABEL)
        assert generator is not None
        codes = {task.code.blob for task in tasks if task.code is not None}
        vectors = {vector.blob for task in tasks for vector in task.vectors}
        sizes = [sum(file.size for file in files) for files in ({generator.blob}, codes, vectors)]
        assert [found["on_disk"][name] for name in ("generators", "codes", "vectors")] == sizes
        # Their configurations are the final adapter's, and count there.
        checkpoints = store.task("poems").checkpoints
        assert found["on_disk"]["checkpoints"] == sum(checkpoint.weights.size for checkpoint in checkpoints)
    assert found["on_disk"]["database"] == (trained / "registry.db").stat().st_size


def test_json_keeps_its_names(icm: Icm, trained: Path) -> None:
    document = icm("stats", "--json").document
    assert set(document) == {
        "on_disk", "original_size", "stored_size", "compact_size", "compression_ratio", "space_saving", "complete",
        "evicted_count", "original_only_count", "fleets",
    }  # fmt: skip
    assert set(document["on_disk"]) == {
        "originals", "checkpoints", "generators", "codes", "extras", "vectors", "texts", "versions", "old_generators",
        "training", "manifests", "database", "unreferenced", "overhead", "total",
    }  # fmt: skip
    assert set(document["fleets"][0]) == {
        "base_model", "adapters_count", "encoded_count", "evicted_count", "original_size", "generator",
        "generator_version", "decoder_size", "start_size", "short_count", "codes_and_vectors_size", "marginal_size",
        "break_even_count", "original_only_count", "extras_bytes", "tasks",
    }  # fmt: skip
    assert set(document["fleets"][0]["tasks"][0]) == {
        "task", "bf16_size", "original_size", "vectors_size", "code_size",
        "relative_error", "squared_error", "retained_gain", "precision", "evicted", "asked", "original_only",
        "extras_bytes", "is_claimed", "effect",
    }  # fmt: skip


def test_bf16_is_two_bytes_for_every_parameter_of_a_final_adapter(icm: Icm, mixed: Path) -> None:
    parameters = sum(row["parameters"] for row in icm("ls", "--json").document)
    assert icm("stats", "--json").document["original_size"] == 2 * parameters


def test_a_negative_saving_is_stated(icm: Icm, trained: Path) -> None:
    document = icm("stats", "--json").document
    assert document["complete"]
    assert document["space_saving"] == pytest.approx(1 - document["compact_size"] / document["original_size"])
    assert document["space_saving"] < 0
    out = icm("stats").out
    assert "% more. Their quality was not measured: run `icm eval`." in out


@pytest.mark.slow
def test_quality_is_shown_next_to_the_bytes(icm: Icm, trained: Path) -> None:
    heading, row = icm("stats").out.splitlines()[:2]
    assert ("RELATIVE ERROR" in heading, "RETAINED GAIN" in heading, "not measured" in row) == (True, True, True)
    assert f"{max(task['relative_error'] for task in icm('ls', '--json').document):.3f}" in row


def test_nothing_is_saved_before_the_first_training(icm: Icm, mixed: Path) -> None:
    document = icm("stats", "--json").document
    assert (document["space_saving"], document["compression_ratio"], document["complete"]) == (None, None, False)
    assert "No task has a code yet, so nothing is saved." in icm("stats").out


def test_no_saving_is_claimed_while_a_task_has_no_code(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "extra", seed=9), "--no-vectors")
    document = icm("stats", "--json").document
    assert (document["space_saving"], document["complete"]) == (None, False)
    assert "Some tasks have no code yet" in icm("stats").out


def test_an_earlier_generator_that_a_code_needs_is_counted(icm: Icm, trained: Path) -> None:
    before = icm("stats", "--json").document
    with Store.open(trained) as store:
        blob = File(store.blobs.put(b"newer"), 5)
        store.update_generator(LABEL, lambda present: replace(present, version=2, blob=blob))
    after = icm("stats", "--json").document
    assert after["on_disk"]["old_generators"] == before["on_disk"]["generators"]
    assert (after["on_disk"]["generators"], after["on_disk"]["codes"]) == (5, before["on_disk"]["codes"])
    assert after["on_disk"]["total"] == size_of_files(trained)
    manifests = after["on_disk"]["manifests"] - before["on_disk"]["manifests"]
    assert after["compact_size"] == before["compact_size"] + 5 + manifests


def test_earlier_versions_are_counted_separately(icm: Icm, trained: Path) -> None:
    with Store.open(trained) as store:
        silent = store.task("silent")
        store.publish([replace(silent, version=2, final=store.task("poems").final, code=None)])
    found = icm("stats", "--json").document["on_disk"]
    assert silent.code is not None
    assert found["versions"] == silent.final.weights.size + silent.final.config.size + silent.code.size
    assert "earlier versions of tasks" in icm("stats").out


def test_a_damaged_manifest_does_not_change_the_bill(icm: Icm, trained: Path) -> None:
    with Store.open(trained) as store:
        place = Path(store.manifests.place(str(store.task("rules").manifest)))
    place.chmod(0o600)
    place.write_bytes(b"garbage")
    ran = icm("stats", "--json")
    assert (ran.code, ran.document["on_disk"]["total"]) == (0, size_of_files(trained))


def test_a_stopped_training_is_counted_separately(icm: Icm, mixed: Path) -> None:
    with Store.open(mixed) as store:
        weights, optimizer = (File(store.blobs.put(data), len(data)) for data in (b"w" * 100, b"o" * 50))
        store.save_run(Run(base_model=LABEL, config={}, step=1, weights=weights, optimizer=optimizer))
    assert icm("stats", "--json").document["on_disk"]["training"] == 150


def test_verbose_adds_a_row_per_task(icm: Icm, trained: Path) -> None:
    lines = icm("stats", "-v").out.splitlines()
    assert {"poems", "rules", "silent"} <= {line.split()[0] for line in lines if line}


def test_an_empty_store_says_so(icm: Icm, mixed_template: Path) -> None:
    icm("base", "add", LABEL, mixed_template / "base")
    assert "the store has no tasks" in icm("stats").out
    assert icm("stats", "--json").document["complete"] is False


def test_without_a_store_it_says_so(icm: Icm) -> None:
    assert icm("stats").code == ExitCode.NO_STORE


@pytest.mark.slow
def test_it_does_not_import_torch(trained: Path) -> None:
    assert not {"torch", "numpy", "transformers"} & modules_of("stats", "--json")


@pytest.mark.one_case
@pytest.mark.parametrize("ending", ["svg", "png", "pdf", "SVG"])
def test_a_plot_is_drawn(icm: Icm, trained: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "deep" / f"plot.{ending}"
    ran = icm("stats", "--plot", path)
    assert (ran.code, ran.out, "drew" in ran.err) == (0, icm("stats").out, True)
    first = path.read_bytes()
    assert len(first) > 1000
    icm("stats", "--plot", path, "--force")
    assert path.read_bytes() == first


def test_a_plot_of_another_kind_is_refused_before_any_work(icm: Icm, tmp_path: Path) -> None:
    ran = icm("stats", "--plot", tmp_path / "plot.doc")  # there is not even a store
    assert (ran.code, ran.out, list(tmp_path.glob("plot*"))) == (ExitCode.FAILED, "", [])
    assert ".svg, .png or .pdf" in ran.err


def test_a_plot_that_exists_is_replaced_with_force_only(icm: Icm, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    path.write_text("mine")
    refused = icm("stats", "--plot", path)
    assert (refused.code, refused.out, path.read_text()) == (ExitCode.FAILED, "", "mine")
    assert "--force" in refused.err
    assert icm("stats", "--plot", path, "--force").code == 0
    assert "<svg" in path.read_text()


def test_a_plot_that_does_not_fit_leaves_what_was_there(icm: Icm, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    path.write_text("mine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        ran = icm("stats", "--plot", path, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (ran.code, ran.out, "File too large" in ran.err) == (ExitCode.FAILED, "", True)
    assert [found.read_text() for found in tmp_path.glob("plot*")] == ["mine"]


def test_nothing_is_drawn_where_nothing_is_encoded(icm: Icm, mixed: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ran = icm("stats", "--plot", tmp_path / "plot.svg")
    assert (ran.code, ran.out, list(tmp_path.glob("plot*"))) == (ExitCode.FAILED, "", [])
    assert "icm train" in ran.err


def test_one_measured_task_is_counted_as_one(icm: Icm, trained: Path) -> None:
    with Store.open(trained) as store:
        for task in list(store.tasks())[:2]:
            assert task.code is not None
            store.publish([replace(task, code=replace(task.code, squared_error=None))])
    assert " (1 task)" in icm("stats").out


@pytest.mark.slow
def test_a_hostile_base_model_is_printed_escaped(icm: Icm, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "odd", base_model_name_or_path="a\x1b[31m\u202eb"), "--no-vectors")
    for command in (["stats"], ["show", "odd"], ["train", "--steps", "1"], ["vectors"]):
        ran = icm(*command)
        assert not {"\x1b", "\u202e"} & set(ran.out + ran.err)
