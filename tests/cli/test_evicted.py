"""What the other commands make of a task whose original was evicted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icm_cli.output import Output
from icmlora import Fleet
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import icm_quietly, write_lora
from tests.shared import paths_of

Icm = Callable[..., Ran]
ALL = ("evict", "--max-error", "0.7")
TRAIN = ("train", "--no-eval", "--refine", "0", "--steps", 2, "--device", "cpu")


@pytest.fixture
def gone(icm: Icm, trained: Path) -> Path:
    """A trained store without any original."""
    assert icm(*ALL).code == 0
    return trained


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def files(store: Path) -> set[Path]:
    return {path for path in (store / "blobs").rglob("*") if path.is_file()}


def weights_file(store: Path, task: str) -> Path:
    with Store.open(store) as opened:
        return Path(paths_of(opened).file("blobs", opened.task(task).final.weights))


def test_materialize_falls_back_to_the_code_and_says_so(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("materialize", "rules", "--source", "code", "-o", tmp_path / "before")
    icm(*ALL)
    ran = icm("materialize", "rules", "-o", tmp_path / "after")
    assert (ran.code, content(tmp_path / "after")) == (0, content(tmp_path / "before"))
    assert "evicted" in ran.err
    assert icm("materialize", "rules", "-o", tmp_path / "json", "--json").document["source"] == "code"


def test_asking_for_the_original_is_an_error_that_says_how_to_get_it(icm: Icm, gone: Path, tmp_path: Path) -> None:
    ran = icm("materialize", "rules", "--source", "original", "-o", tmp_path / "out", "--json")
    assert (ran.code, "evicted" in ran.error["message"]) == (ExitCode.FAILED, True)
    assert "--restore" in ran.error["hint"]
    assert not (tmp_path / "out").exists()


def test_a_limit_counts_for_the_code_that_stands_in(icm: Icm, gone: Path, tmp_path: Path) -> None:
    assert icm("materialize", "rules", "-o", tmp_path / "out", "--max-error", 0.001).code == ExitCode.TOO_LOSSY


def test_the_same_ingest_leaves_it_evicted_and_writes_nothing(icm: Icm, gone: Path, mixed_template: Path) -> None:
    before = files(gone)
    ran = icm("ingest", mixed_template / "loras", "--no-vectors", "--json")
    assert {event["status"] for event in ran.events[:-1]} == {"known"}
    assert (ran.events[-1]["new"], ran.events[-1]["known"], ran.events[-1]["evicted"]) == (0, 5, 5)
    assert files(gone) == before
    said = icm("ingest", mixed_template / "loras", "--no-vectors")
    assert "5 unchanged, 5 evicted" in said.out
    assert "--restore" in said.err


def test_restore_brings_originals_back(icm: Icm, gone: Path, mixed_template: Path, tmp_path: Path) -> None:
    ran = icm("ingest", mixed_template / "loras", "--restore", "--json")
    assert (ran.code, ran.events[-1]["restored"], ran.events[-1]["evicted"]) == (0, 5, 0)
    assert icm("verify", "--read-data").code == 0
    icm("materialize", "poems", "--source", "original", "-o", tmp_path / "out")
    weights = (mixed_template / "loras" / "poems" / "adapter_model.safetensors").read_bytes()
    assert content(tmp_path / "out")["adapter_model.safetensors"] == weights
    again = icm("ingest", mixed_template / "loras", "--restore", "--json")
    assert {event["status"] for event in again.events[:-1]} == {"known"}


def test_restore_waits_for_no_vectors_of_a_task_that_had_none(
    icm: Icm, gone: Path, mixed_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fleet, "extract_vectors", lambda *_, **__: pytest.fail("nobody asked for vectors"))
    with Store.open(gone) as store:
        store.update("rules", lambda task: replace(task, vectors=()))
    ran = icm("ingest", mixed_template / "loras" / "rules", "--restore", "--json")
    assert (ran.events[-1]["restored"], ran.events[-1]["without_vectors"]) == (1, ["rules"])


def test_restore_of_what_was_never_evicted_changes_nothing(icm: Icm, trained: Path, mixed_template: Path) -> None:
    ran = icm("ingest", mixed_template / "loras", "--restore", "--json")
    assert {event["status"] for event in ran.events[:-1]} == {"known"}


def test_a_new_task_may_have_the_same_weights(icm: Icm, gone: Path, mixed_template: Path) -> None:
    assert icm("ingest", mixed_template / "loras" / "poems", "--name", "twin", "--no-vectors").code == 0
    assert weights_file(gone, "twin").exists()
    assert icm("verify", "--read-data").code == 0


@pytest.mark.slow
def test_another_adapter_may_take_its_place_with_the_same_checkpoints(icm: Icm, gone: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "poems", seed=99)
    for step in (10, 20):
        write_lora(tmp_path / "poems" / f"checkpoint-{step}", seed=step)
    other = ("ingest", tmp_path / "poems", "--name", "poems", "--no-vectors")
    assert icm(*other).code == ExitCode.FAILED
    ran = icm(*other, "--on-conflict", "version", "--json")
    assert (ran.code, ran.events[0]["status"], ran.events[0]["new"]) == (0, "version", 1)
    assert ran.events[0]["evicted"] == 2
    assert icm("verify", "--read-data").code == 0


@pytest.mark.slow
def test_training_needs_an_original(icm: Icm, gone: Path, mixed_template: Path) -> None:
    ran = icm(*TRAIN, "--json")
    assert (ran.code, "every original" in ran.error["message"], "--restore" in ran.error["hint"]) == (1, True, True)
    icm("ingest", mixed_template / "loras", "--restore", "--no-vectors")
    assert icm(*TRAIN).code == 0


@pytest.mark.slow
def test_a_new_generator_leaves_it_its_code(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm(*ALL, "rules")
    icm("materialize", "rules", "-o", tmp_path / "before")
    assert icm(*TRAIN, "--fresh").code == 0
    icm("prune", "--older-than", "0s", "--yes")
    assert len(icm("generators", "--json").document) == 2
    assert icm("materialize", "rules", "-o", tmp_path / "after").code == 0
    assert content(tmp_path / "after") == content(tmp_path / "before")


@pytest.mark.slow
def test_training_goes_on_without_evicted_checkpoints(icm: Icm, trained: Path) -> None:
    icm(*ALL, "--checkpoints-only")
    assert icm(*TRAIN).code == 0
    assert [row["code_size"] is None for row in icm("ls", "--json").document] == [False] * 3


def test_vectors_pass_it_over(icm: Icm, gone: Path) -> None:
    ran = icm("vectors", "--again", "--device", "cpu")
    assert (ran.code, "evicted" in ran.err) == (0, True)


def test_stats_counts_what_is_on_disk(icm: Icm, trained: Path) -> None:
    before = icm("stats", "--json").document
    freed = icm(*ALL, "--json").events[-1]["freed"]
    after = icm("stats", "--json").document
    parts = ("originals", "checkpoints")
    assert sum(before["on_disk"][name] - after["on_disk"][name] for name in parts) == freed
    assert (after["evicted_count"], after["fleets"][0]["evicted_count"]) == (3, 3)
    assert after["original_size"] == before["original_size"]
    assert after["on_disk"]["total"] == sum(path.stat().st_size for path in trained.rglob("*") if path.is_file())
    assert "every original is evicted" in icm("stats").out


def test_stats_says_how_many_originals_are_left(icm: Icm, trained: Path) -> None:
    icm(*ALL, "rules")
    out = icm("stats", "-v").out
    assert "originals evicted           1 of 3" in out
    assert "with the originals of 2 of 3 tasks" in out


def test_rm_says_that_the_code_is_the_only_copy(icm: Icm, gone: Path) -> None:
    ran = icm("rm", "rules", "--dry-run")
    assert "only copy" in ran.err
    assert icm("rm", "rules", "--yes", "--json").document["last_copies"] == ["rules"]


def test_rm_forgets_nothing_if_a_task_was_evicted_while_the_user_was_asked(
    icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confirm(*_: object, **__: object) -> bool:
        icm_quietly(trained, *ALL, "rules")
        return True

    monkeypatch.setattr(Output, "confirm", confirm)
    ran = icm("rm", "poems", "rules", "--json")
    assert (ran.code, ran.error["kind"], "'rules'" in ran.error["message"]) == (ExitCode.FAILED, "last_copy", True)
    assert icm("ls", "-q").out.split() == ["poems", "rules", "silent"]


def test_prune_keeps_what_it_depends_on(icm: Icm, gone: Path, tmp_path: Path) -> None:
    assert icm("prune", "--older-than", "0s", "--yes", "--json").document["blobs"] == 0
    assert icm("materialize", "rules", "-o", tmp_path / "out").code == 0


@pytest.mark.slow
def test_eval_uses_what_was_measured_of_the_original(icm: Icm, trained: Path) -> None:
    before = icm("eval", "rules", "--device", "cpu", "--json").events[0]["sources"]
    icm(*ALL)
    again = icm("eval", "rules", "--device", "cpu", "--again", "--json").events[0]["sources"]
    assert again["original"] == before["original"]
    assert again["code"]["retained_gain"] == pytest.approx(before["code"]["retained_gain"])
    assert again["code"]["relative_error"] == pytest.approx(before["code"]["relative_error"], rel=0.01)


@pytest.mark.slow
def test_eval_of_what_was_never_measured_says_unknown(icm: Icm, gone: Path) -> None:
    ran = icm("eval", "rules", "--device", "cpu", "--json")
    rungs = ran.events[0]["sources"]
    assert (ran.code, "original" in rungs, rungs["code"]["retained_gain"]) == (0, False, None)
    assert "unknown" in icm("eval", "rules", "--device", "cpu").err


def test_what_was_measured_before_an_original_came_back_gets_its_gain(
    icm: Icm, gone: Path, mixed_template: Path
) -> None:
    icm("eval", "rules", "--device", "cpu")
    icm("ingest", mixed_template / "loras", "--restore")
    first, second = (icm("eval", "rules", "--device", "cpu", "--json").events[0]["sources"] for _ in range(2))
    losses = [first[rung]["nats_per_token"] for rung in ("base", "original", "code")]
    assert first["code"]["retained_gain"] == pytest.approx((losses[0] - losses[2]) / (losses[0] - losses[1]))
    assert second == first
    rows = icm("show", "rules", "--json").document["evaluations"]
    assert [row["retained_gain"] for row in rows if row["source"] == "code"] == [first["code"]["retained_gain"]]
