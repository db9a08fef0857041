"""`icm train --update`."""

import os
import shutil
import signal
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from icmlora.adapter.model import Adapter
from icmlora.fleet.api import Fleet
from icmlora.fleet.train import candidates as candidates, run as training
from icmlora.fleet.train.candidates import Candidate, UpdateCandidates
from icmlora.generator.codec.generator_file import GeneratorFile
from registry.store import Store
from tests.cli.coded import codes, current, make_another_current
from tests.cli.conftest import Ran
from tests.cli.fleet import write_texts
from tests.cli.tiny_fleet import STEPS, icm_quietly, write_lora
from tests.icmlora.small_fleet import same, trained_file
from tests.icmlora.tiny_base import LABEL
from tests.registry.examples import ingest, new_store

Icm = Callable[..., Ran]
UPDATE = ("train", "--update", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS)


def decoded(store: Path) -> dict[str, Adapter]:
    """Return what every code of the current generator decodes to."""
    with Store.open(store, read_only=True) as opened:
        generator_file = GeneratorFile(opened.blobs.read(current(store).blob))
        data = {name: opened.blobs.read(code.blob) for name, code in codes(store).items()}
    return {task: generator_file.codec_of(code).decode(code) for task, code in data.items()}


def updated(ran: Ran) -> dict[str, Any]:
    assert ran.code == 0, ran.err
    (event,) = [event for event in ran.events if event["type"] == "updated"]
    return event


def add(icm: Icm, folder: Path, name: str = "extra", **options: Any) -> None:
    assert icm("ingest", write_lora(folder / name, **options), "--no-vectors").code == 0


@pytest.mark.slow
def test_a_new_task_gets_a_code_and_the_network_is_kept_where_that_is_smaller(
    icm: Icm, trained: Path, tmp_path: Path
) -> None:
    before = current(trained)
    add(icm, tmp_path, seed=9)
    event = updated(icm(*UPDATE, "--json"))
    assert (event["tasks"], event["added"], event["epochs"]) == (["extra"], [], 1)
    assert event["kept_size"] < event["tuned_size"]
    assert current(trained) == before
    assert set(codes(trained)) == {"extra", "poems", "rules", "silent"}


@pytest.mark.slow
def test_the_codes_that_were_there_are_the_same_bytes(icm: Icm, trained: Path, tmp_path: Path) -> None:
    before = codes(trained)
    add(icm, tmp_path, seed=9)
    icm(*UPDATE)
    assert {task: code for task, code in codes(trained).items() if task != "extra"} == before


@pytest.mark.slow
@pytest.mark.usefixtures("tuned_wins")
def test_a_tuned_network_is_one_more_epoch_under_which_every_earlier_code_decodes_as_before(
    icm: Icm, trained: Path, tmp_path: Path
) -> None:
    before, adapters = current(trained), decoded(trained)
    for number in range(2):
        add(icm, tmp_path, f"extra-{number}", seed=9 + number)
        event = updated(icm(*UPDATE, "--json"))
        assert (event["added"], event["epochs"], event["version"]) == (["tuned"], number + 2, number + 2)
    after = decoded(trained)
    assert [task for task, adapter in adapters.items() if not same(adapter, after[task])] == []
    assert set(after) == {*adapters, "extra-0", "extra-1"}
    with Store.open(trained) as store:
        assert GeneratorFile(store.blobs.read(current(trained).blob)).digests[0] == before.blob


def test_modules_that_the_network_does_not_know_get_a_network_of_their_own(
    icm: Icm, trained: Path, tmp_path: Path
) -> None:
    adapters = decoded(trained)
    add(icm, tmp_path, rank=8, targets=("self_attn.k_proj", "mlp.down_proj"))
    add(icm, tmp_path, "usual", seed=5)
    event = updated(icm(*UPDATE, "--json"))
    assert (set(event["tasks"]), event["added"]) == ({"extra", "usual"}, ["fresh"])
    after = decoded(trained)
    assert after["extra"].layout[0].rank <= 8
    assert all(same(adapter, after[task]) for task, adapter in adapters.items())


@pytest.mark.slow
def test_after_a_fresh_epoch_a_task_goes_where_its_code_is_smallest(icm: Icm, trained: Path, tmp_path: Path) -> None:
    add(icm, tmp_path, rank=8, targets=("self_attn.k_proj", "mlp.down_proj"))
    icm(*UPDATE)
    add(icm, tmp_path, "again", seed=4, rank=8, targets=("self_attn.k_proj", "mlp.down_proj"))
    add(icm, tmp_path, "usual", seed=5)
    event = updated(icm(*UPDATE, "--json"))
    assert (set(event["tasks"]), event["added"], event["epochs"]) == ({"again", "usual"}, [], 2)


@pytest.mark.slow
@pytest.mark.usefixtures("tuned_wins")
def test_it_needs_no_original_of_the_tasks_that_have_a_code(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert icm("evict", "--max-error", "0.95").code == 0
    adapters = decoded(trained)
    add(icm, tmp_path, seed=9)
    event = updated(icm(*UPDATE, "--json"))
    assert event["version"] == 2
    after = decoded(trained)
    assert all(same(adapter, after[task]) for task, adapter in adapters.items())
    assert icm("materialize", "poems", "-o", tmp_path / "out").code == 0
    assert icm("verify", "--read-data").code == 0


@pytest.mark.slow
@pytest.mark.usefixtures("tuned_wins")
def test_what_was_measured_of_earlier_codes_is_still_known(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    icm("eval", "poems", "--source", "code", "--device", "cpu")
    before = icm("show", "poems", "--json").document
    add(icm, tmp_path, seed=9)
    icm(*UPDATE)
    tasks = {task["task"]: task for task in icm("stats", "--json").document["fleets"][0]["tasks"]}
    measured = [row["retained_gain"] for row in before["evaluations"] if row["source"] == "code"]
    assert [tasks["poems"]["retained_gain"]] == measured


def test_a_fleet_without_new_tasks_is_left_as_it_is(icm: Icm, trained: Path) -> None:
    before = codes(trained)
    ran = icm("train", "--update", "--device", "cpu")
    assert (ran.code, "nothing to do: every task" in ran.out) == (0, True)
    assert codes(trained) == before


def test_without_a_generator_it_names_the_command_that_makes_one(icm: Icm, mixed: Path) -> None:
    ran = icm(*UPDATE, "--json")
    assert ran.code == ExitCode.FAILED
    assert f"icm train --base-model {LABEL}" in ran.error["hint"]


@pytest.mark.parametrize("option", [("--fresh",), ("--width", "8")])
def test_options_of_another_generator_do_not_go_with_it(icm: Icm, trained: Path, option: tuple[str, ...]) -> None:
    assert icm(*UPDATE, *option).code == ExitCode.USAGE


@pytest.mark.slow
def test_a_quality_is_that_of_the_new_codes(icm: Icm, trained: Path, tmp_path: Path) -> None:
    add(icm, tmp_path, seed=9)
    icm(*UPDATE, "--quality", 1)
    assert icm("show", "extra", "--json").document["code"]["asked"]["tolerance"] == 0.35


@pytest.mark.slow
def test_limits_are_kept_by_the_new_codes_and_leave_the_others_alone(icm: Icm, trained: Path, tmp_path: Path) -> None:
    before = codes(trained)
    add(icm, tmp_path, seed=9)
    assert icm(*UPDATE, "--max-error", "0.22").code == 0
    after = codes(trained)
    assert after.pop("extra").asked.max_error == 0.22
    assert after == before


@pytest.mark.slow
def test_only_the_new_codes_are_measured(icm: Icm, trained: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "extra", seed=9)
    write_texts(folder, "eval.jsonl", count=2)
    icm("ingest", folder, "--no-vectors")
    ran = icm("train", "--update", "--device", "cpu", "--steps", STEPS, "--json")
    assert [event["task"] for event in ran.events if event["type"] == "task"] == ["extra"]


@pytest.mark.slow
def test_ctrl_c_changes_nothing(icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*arguments: Any) -> Generator[Any, None, None]:
        for at in real(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            yield at

    real = training.fit
    monkeypatch.setattr(training, "fit", fit)
    add(icm, tmp_path, seed=9)
    before = codes(trained)
    assert icm(*UPDATE).code == ExitCode.INTERRUPTED
    assert codes(trained) == before


@pytest.mark.slow
def test_a_diverged_tuning_changes_nothing(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*arguments: Any) -> Generator[Any, None, None]:
        yield from (replace(at, bits=float("nan")) for at in real(*arguments))

    real = training.fit
    monkeypatch.setattr(training, "fit", fit)
    add(icm, tmp_path, seed=9)
    before = codes(trained)
    assert icm(*UPDATE, "--json").error["kind"] == "generator_error"
    assert codes(trained) == before


def while_it_tunes(monkeypatch: pytest.MonkeyPatch, happen: Callable[[], object]) -> None:
    """Let something happen once, after the training of the tuned decoder."""

    def differences(*arguments: Any) -> bytes:
        happen()
        monkeypatch.setattr(candidates, "differences_to_words", real)
        return bytes(real(*arguments))

    real = candidates.differences_to_words
    monkeypatch.setattr(candidates, "differences_to_words", differences)


@pytest.mark.slow
@pytest.mark.usefixtures("tuned_wins")
def test_a_generator_that_becomes_current_during_the_update_does_not_stop_it(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = decoded(trained)
    while_it_tunes(monkeypatch, lambda: make_another_current(trained))
    add(icm, tmp_path, seed=9)
    assert updated(icm(*UPDATE, "--json"))["version"] == 3
    after = decoded(trained)
    assert set(after) == {*before, "extra"}
    assert all(same(adapter, after[task]) for task, adapter in before.items())


@pytest.mark.slow
@pytest.mark.usefixtures("tuned_wins")
def test_the_earlier_network_goes_with_the_next_prune(icm: Icm, trained: Path, tmp_path: Path) -> None:
    assert icm("evict", "poems", "--max-error", "0.95").code == 0
    before = current(trained)
    add(icm, tmp_path, seed=9)
    event = updated(icm(*UPDATE, "--json"))
    assert event["replaced_bytes"] == before.size
    with Store.open(trained) as store:
        assert {task.code and str(task.code.generator) for task in store.tasks()} == {event["generator"]}
        store.prune(grace=0)
        assert not store.blobs.exists(before.blob)


@pytest.mark.slow
def test_a_new_task_that_is_replaced_meanwhile_gets_no_code_and_is_named(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_it() -> None:
        icm_quietly(trained, "ingest", other, "--on-conflict", "version", "--no-vectors")

    other = write_lora(tmp_path / "other" / "extra", seed=77)
    add(icm, tmp_path, seed=9)
    add(icm, tmp_path, "more", seed=5)
    while_it_tunes(monkeypatch, replace_it)
    ran = icm(*UPDATE, "--json")
    assert (ran.code, ran.events[-1]["tasks"]) == (ExitCode.PARTLY, ["more"])
    assert "replaced" in ran.events[-1]["left_out"]["extra"]


@pytest.mark.slow
def test_each_base_model_begins_with_the_generator_that_it_has_when_its_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        """The second base model has its turn."""

    def unchanged(work: UpdateCandidates, data: bytes) -> Candidate:
        begun.append(data)
        if len(begun) == 2:
            raise Reached
        make_another_current(store_path, second, "two")
        work.left_out = {"task-of-one": "not encoded here"}
        return Candidate(data, {})

    store_path, begun = tmp_path / "store", list[bytes]()
    first, second = trained_file(sets=2), trained_file(sets=0)
    monkeypatch.setattr(UpdateCandidates, "unchanged", unchanged)
    with new_store(store_path) as store:
        for label in ("one", "two"):
            ingest(store, f"task-of-{label}", base_model=label)
            make_another_current(store_path, first, label)
    with pytest.raises(Reached):
        Fleet(store_path).update(device="cpu", refine=0, evaluate=False)
    assert begun == [first, second]


@pytest.mark.slow
def test_a_full_training_after_updates_makes_one_network_of_all_again(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(icm, tmp_path, rank=8, targets=("self_attn.k_proj", "mlp.down_proj"))
    icm(*UPDATE)
    assert icm("train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS).code == 0
    with Store.open(trained) as store:
        assert len(GeneratorFile(store.blobs.read(current(trained).blob)).digests) == 1
    assert len(codes(trained)) == 4


@pytest.mark.slow
def test_a_bundle_carries_codes_of_several_epochs(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(icm, tmp_path, rank=8, targets=("self_attn.k_proj", "mlp.down_proj"))
    icm(*UPDATE)
    bundle = tmp_path / "fleet.icm"
    assert icm("export", bundle).code == 0
    for task in ("extra", "poems"):
        icm("materialize", task, "--source", "code", "-o", tmp_path / "here" / task)
        assert icm("materialize", task, "--from", bundle, "-o", tmp_path / "there" / task).code == 0
        here, there = (tmp_path / side / task / "adapter_model.safetensors" for side in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()
    shutil.rmtree(trained)
    assert icm("import", bundle).code == 0
    assert icm("materialize", "extra", "-o", tmp_path / "again").code == 0
