"""The ladder of a task: generated, code, code with residual, original; each rung with its bytes and its fidelity."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora.adapter.metrics import squared_error
from icmlora.formats.discovery.folder import load_adapter
from registry.store import Store
from tests.cli.coded import codes, tasks_of
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import icm_quietly

Icm = Callable[..., Ran]
BESIDE = ("encode", "--residual", "--max-error", "0.1")
NAMES = {"poems", "rules", "silent"}


@pytest.fixture(scope="module")
def layered_template(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Path(shutil.copytree(trained_template, tmp_path_factory.mktemp("layered") / "store"))
    icm_quietly(store, "encode", "--max-error", "0.55")
    icm_quietly(store, *BESIDE)
    return store


@pytest.fixture
def layered(layered_template: Path, tmp_path: Path) -> Path:
    """The trained store, with small codes and a residual beside each."""
    return Path(shutil.copytree(layered_template, tmp_path / "store"))


def residual_of(store: Path, task: str) -> str:
    residual = codes(store)[task].residual
    assert residual is not None
    return residual.blob


def test_the_codes_stay_and_each_gets_what_it_lacks(icm: Icm, trained: Path) -> None:
    icm("encode", "--max-error", "0.55")
    before = codes(trained)
    ran = icm(*BESIDE, "--json")
    after, told = codes(trained), tasks_of(ran)
    assert (ran.code, set(told)) == (0, NAMES)
    for name, code in after.items():
        assert (code.blob, code.squared_error) == (before[name].blob, before[name].squared_error)
        assert code.residual is not None
        assert code.residual.squared_error <= 0.1**2 < (code.squared_error or 0.0)
        assert (told[name]["status"], told[name]["size"]) == ("encoded", code.size)
        assert (told[name]["residual_size"], told[name]["squared_error"]) == (
            code.residual.size,
            code.residual.squared_error,
        )
    assert icm("verify", "--read-data").code == 0


def test_a_code_that_is_enough_gets_nothing_and_loses_what_it_had(icm: Icm, layered: Path) -> None:
    had = residual_of(layered, "rules")
    told = tasks_of(icm("encode", "rules", "--residual", "--max-error", "0.7", "--json"))
    assert (told["rules"]["status"], told["rules"]["residual_size"]) == ("enough", None)
    assert codes(layered)["rules"].residual is None
    assert not (layered / "blobs" / had[0] / had).exists()
    assert codes(layered)["poems"].residual is not None


@pytest.mark.slow
def test_another_code_takes_the_residual_away(icm: Icm, layered: Path) -> None:
    icm("encode", "rules", "--max-error", "0.32")
    assert codes(layered)["rules"].residual is None
    assert [finding for finding in icm("verify", "--json").document["findings"] if finding["is_problem"]] == []


def test_what_is_written_has_the_error_that_was_said(icm: Icm, layered: Path, tmp_path: Path) -> None:
    for source in ("original", "residual", "code"):
        ran = icm("materialize", "rules", "-o", tmp_path / source, "--source", source, "--dtype", "float32", "--json")
        assert (ran.code, ran.document["source"]) == (0, source)
    original, residual, code = (load_adapter(tmp_path / source) for source in ("original", "residual", "code"))
    said = codes(layered)["rules"]
    assert squared_error(original, residual) == pytest.approx(said.best_squared_error, rel=1e-2)
    assert squared_error(original, code) == pytest.approx(said.squared_error, rel=1e-2)
    card = (tmp_path / "residual" / "README.md").read_text()
    assert ("| source | residual |" in card, f"{math.sqrt(said.best_squared_error or 0):.4f}" in card) == (True, True)


def test_a_task_without_a_residual_says_what_makes_one(icm: Icm, trained: Path, tmp_path: Path) -> None:
    ran = icm("materialize", "rules", "-o", tmp_path / "out", "--source", "residual", "--json")
    assert (ran.code != 0, "icm encode --residual" in ran.error["hint"]) == (True, True)


@pytest.mark.slow
def test_a_guarded_materialize_counts_the_residual(icm: Icm, layered: Path, tmp_path: Path) -> None:
    guarded = ("materialize", "rules", "--max-error", "0.14")
    assert icm(*guarded, "--source", "code", "-o", tmp_path / "code").code == ExitCode.TOO_LOSSY
    assert icm(*guarded, "--source", "residual", "-o", tmp_path / "residual").code == 0


@pytest.mark.slow
def test_an_eviction_stands_on_code_and_residual(icm: Icm, layered: Path, tmp_path: Path) -> None:
    ran = icm("evict", "--max-error", "0.14", "--json")
    assert (ran.code, {task["status"] for task in tasks_of(ran).values()}) == (0, {"evicted"})
    assert tasks_of(ran)["rules"]["residual_size"] == icm("ls", "--json").document[1]["residual_size"]
    written = icm("materialize", "rules", "-o", tmp_path / "out")
    assert (written.code, "used its code and residual instead" in written.err) == (0, True)
    assert icm("prune", "--older-than", "0s", "--yes").code == 0
    assert icm("verify", "--read-data").code == 0


@pytest.mark.slow
def test_what_is_left_of_an_evicted_task_stays(icm: Icm, layered: Path) -> None:
    icm("evict", "rules", "--max-error", "0.14")
    before = codes(layered)["rules"]
    for again in (("--max-error", "0.55"), ("--residual", "--max-error", "0.7")):
        assert tasks_of(icm("encode", "rules", *again, "--json"))["rules"]["status"] == "evicted"
    assert codes(layered)["rules"] == before


@pytest.mark.one_case
@pytest.mark.parametrize("part", ["code", "residual"])
def test_nothing_goes_where_a_part_is_damaged(icm: Icm, layered: Path, part: str) -> None:
    code = codes(layered)["rules"]
    assert code.residual is not None
    digest = code.blob if part == "code" else code.residual.blob
    path = layered / "blobs" / digest[0] / digest
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    ran = icm("evict", "rules", "--max-error", "0.7", "--json")
    assert (ran.code, "damaged" in tasks_of(ran)["rules"]["reason"]) == (ExitCode.PARTLY, True)
    assert icm("show", "rules", "--json").document["adapters"][-1]["evicted_at"] is None


@pytest.mark.usefixtures("plain_gains")
def test_a_gain_is_kept_by_code_and_residual_and_recorded(icm: Icm, trained: Path) -> None:
    icm("encode", "rules", "--min-gain", "0.3", "--device", "cpu")
    ran = icm("encode", "rules", "--residual", "--min-gain", "0.97", "--device", "cpu", "--json")
    told = tasks_of(ran)["rules"]
    assert (ran.code, told["status"]) == (0, "encoded")
    assert told["retained_gain"] >= 0.97
    with Store.open(trained) as store:
        gains = {row.rung: row.retained_gain for row in store.evaluations.all("rules")}
    assert gains["residual"] == told["retained_gain"]
    assert (gains["code"] or 0.0) < 0.97
    evaluated = icm("eval", "rules", "--device", "cpu", "--json").events[0]["sources"]
    assert evaluated["residual"]["retained_gain"] == told["retained_gain"]
    assert set(evaluated) == {"base", "original", "residual", "code", "recalled"}


@pytest.mark.slow
@pytest.mark.usefixtures("plain_gains")
def test_an_eviction_by_gain_measures_the_residual(icm: Icm, trained: Path) -> None:
    icm("encode", "rules", "--min-gain", "0.3", "--device", "cpu")
    assert icm("evict", "rules", "--min-gain", "0.97", "--device", "cpu").code == ExitCode.PARTLY
    icm("encode", "rules", "--residual", "--min-gain", "0.97", "--device", "cpu")
    ran = icm("evict", "rules", "--min-gain", "0.97", "--device", "cpu", "--json")
    assert (ran.code, tasks_of(ran)["rules"]["retained_gain"] >= 0.97) == (0, True)
    rungs = {row["source"] for row in icm("show", "rules", "--json").document["evaluations"]}
    assert {"base", "original", "residual"} <= rungs


@pytest.mark.slow
@pytest.mark.usefixtures("plain_gains")
def test_a_gain_that_nothing_keeps_is_told_and_leaves_no_residual(icm: Icm, trained: Path) -> None:
    ran = icm("encode", "--residual", "--min-gain", "1.0", "--device", "cpu", "--json")
    below = {name for name, event in tasks_of(ran).items() if event["status"] == "below"}
    assert below == {"poems", "rules"}
    short = {name for name, code in codes(trained).items() if code.asked is not None and not code.asked.is_kept}
    assert short == below
    assert all(codes(trained)[name].residual is None for name in below)


def test_stats_counts_residuals_in_every_total(icm: Icm, layered: Path) -> None:
    document = icm("stats", "--json").document
    beside = [code.residual for code in codes(layered).values()]
    size = sum(residual.size for residual in beside if residual is not None)
    (fleet,) = document["fleets"]
    parts = [document["on_disk"][name] for name in ("generators", "codes", "residuals", "vectors", "database")]
    assert (document["on_disk"]["residuals"], sum(parts)) == (size, document["compact_size"])
    assert fleet["codes_and_vectors_size"] == sum(parts[1:4])
    assert {task["source"] for task in fleet["tasks"]} == {"residual"}
    assert all(task["relative_error"] <= 0.1 for task in fleet["tasks"])
    out = icm("stats", "-v").out
    assert ("residuals" in out, " + " in out) == (True, True)


@pytest.mark.slow
@pytest.mark.usefixtures("plain_gains")
def test_stats_and_show_say_which_tasks_fell_short(icm: Icm, trained: Path) -> None:
    ran = icm("encode", "rules", "poems", "--min-gain", "1.0", "--device", "cpu", "--json")
    short = sorted(name for name, event in tasks_of(ran).items() if event["status"] == "below")
    assert short == ["poems", "rules"]
    (fleet,) = icm("stats", "--json").document["fleets"]
    assert fleet["short_count"] == len(short)
    assert [task["task"] for task in fleet["tasks"] if task["asked"] and not task["asked"]["is_kept"]] == short
    assert "2 tasks keep their original: no code meets retained gain at least 1" in icm("stats").out
    assert "retained gain at least 1: not met" in icm("show", short[0]).out
    icm("encode", short[0], "--max-error", "0.32")
    assert "relative error at most 0.32: met" in icm("show", short[0]).out
    assert icm("show", short[0], "--json").document["code"]["asked"]["max_error"] == 0.32


def test_show_and_ls_tell_what_lies_beside_a_code(icm: Icm, layered: Path) -> None:
    code = codes(layered)["rules"]
    assert code.residual is not None
    fields = {**asdict(code.residual), "relative_error": code.residual.relative_error}
    assert icm("show", "rules", "--json").document["code"]["residual"] == fields
    assert f"relative error with it {code.residual.relative_error:.3f}" in icm("show", "rules").out
    assert icm("ls").out.count(" + ") == 3


def test_a_bundle_leaves_residuals_behind_and_says_so(icm: Icm, layered: Path, tmp_path: Path) -> None:
    ran = icm("export", tmp_path / "fleet.icm", "--json")
    assert set(ran.document["without_residual"]) == NAMES
    assert "skipped the residual of 3 tasks" in icm("export", tmp_path / "again.icm").err
    listed = icm("ls", "--from", tmp_path / "fleet.icm", "--json").document
    assert {row["squared_error"] for row in listed} == {code.squared_error for code in codes(layered).values()}
    icm("materialize", "rules", "--from", tmp_path / "fleet.icm", "-o", tmp_path / "bundled")
    icm("materialize", "rules", "--source", "code", "-o", tmp_path / "coded")
    same = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("bundled", "coded")]
    assert same[0] == same[1]
    assert icm("materialize", "rules", "--from", tmp_path / "fleet.icm", "--source", "residual", "-o", "x").code == 2


@pytest.mark.slow
def test_a_new_generator_has_no_residuals(icm: Icm, layered: Path) -> None:
    icm("train", "--steps", "2", "--fresh", "--no-eval", "--refine", "0", "--device", "cpu")
    assert {code.residual for code in codes(layered).values()} == {None}
    assert icm("stats", "--json").document["on_disk"]["residuals"] == 0
    assert all(code.asked is not None and code.asked.tolerance is not None for code in codes(layered).values())


def test_residuals_are_not_refined(icm: Icm, trained: Path) -> None:
    ran = icm("encode", "--residual", "--min-gain", "0.9", "--refine", "2", "--json")
    assert (ran.code, "refine the codes first" in ran.error["hint"]) == (ExitCode.USAGE, True)


def test_a_task_without_a_code_gets_no_residual(icm: Icm, trained: Path, mixed_template: Path) -> None:
    icm("ingest", mixed_template / "loras" / "poems", "--name", "twin", "--no-vectors")
    told = tasks_of(icm("encode", "twin", "--residual", "--max-error", "0.32", "--json"))
    assert (told["twin"]["status"], "no code" in told["twin"]["reason"]) == ("unmeasured", True)
